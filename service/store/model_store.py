"""The model store: `<root>/<name>/<version>/`, versions numbered from 1, each whole and never changed.

    model_store/shakespeare/1/...        one version: an artifact
    model_store/shakespeare/store.json   aliases, and the highest number ever given out
    model_store/shakespeare/.staging-*   a version being written; readers never look at it

A version appears by one `rename` of a directory that is complete and on disk, so a reader or a crash sees all of it or
nothing. Writers of one name take turns by a lock that dies with its holder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidArtifact, InvalidValue, ModelNotFound, StoreError
from service.model.artifact import Artifact, TrainingFacts, read_artifact, read_description
from service.model.config import ModelConfig
from service.store.staging import STAGING, TRASH, fsync, locked, staging_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_INDEX, _LATEST = "store.json", "latest"


@dataclass(frozen=True, order=True)
class ModelVersion:
    """One published version; `ref` is its full name, such as `shakespeare@3`."""

    name: str
    number: int
    path: Path

    @property
    def ref(self) -> str:
        """`name@number`, which always means this version."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Description:
    """What a version is, and every alias that means it."""

    version: ModelVersion
    config: ModelConfig
    training: TrainingFacts
    digest: str
    aliases: list[str]


class _Index(BaseModel):
    """What the store keeps of one name beside its versions."""

    model_config = ConfigDict(extra="forbid")

    aliases: dict[str, int] = Field(default_factory=dict)
    last_number: int = 0


class ModelStore:
    """The models in one directory. Safe for any number of readers and writers, threads or processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Names that have at least one version. What can't be read is no name of a model."""
        with suppress(OSError):
            return sorted(e.name for e in os.scandir(self.root) if _NAME.fullmatch(e.name) and self.versions(e.name))
        return []

    def versions(self, name: str) -> list[ModelVersion]:
        """Versions of a name, oldest first; none if the name isn't there or can't be read."""
        directory = self._directory(name)
        with suppress(OSError):
            numbers = sorted(
                int(entry.name)
                for entry in os.scandir(directory)
                if _VERSION.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            )
            return [ModelVersion(name, number, directory / str(number)) for number in numbers]
        return []

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number, without `latest`, which every name has."""
        return dict(self._read_index(name).aliases)

    def resolve(self, ref: str) -> ModelVersion:
        """The version that `name`, `name@3`, `name@latest` or `name@alias` means. Raises ModelNotFound."""
        name, at, wanted = ref.partition("@")
        if not _NAME.fullmatch(name) or (at and not _NAME.fullmatch(wanted)):
            raise ModelNotFound(f"{ref[:80]!r} is not a model's name: name, name@version or name@alias", param="model")
        versions = self.versions(name)
        if not versions:
            known = ", ".join(self.names()[:8]) or "none"
            raise ModelNotFound(f"no model {name!r} is in the store; there are: {known}", param="model")
        if not at or wanted == _LATEST:
            return versions[-1]
        number = int(wanted) if _VERSION.fullmatch(wanted) else self.aliases(name).get(wanted)
        for version in versions:
            if version.number == number:
                return version
        known = ", ".join(str(version.number) for version in versions[-8:])
        raise ModelNotFound(f"model {name!r} has no version or alias {wanted!r}; its versions: {known}", param="model")

    def load(self, ref: str) -> tuple[ModelVersion, Artifact]:
        """The version that `ref` means and its checked contents. Raises ModelNotFound, InvalidArtifact."""
        version = self.resolve(ref)
        return version, read_artifact(version.path)

    def publish(self, name: str, write: Callable[[Path], None]) -> ModelVersion:
        """Make a new version of what `write` puts into the empty directory that it is given.

        The version is read back and checked before it appears. Raises InvalidArtifact or StoreError, and then the store
        is as it was. Concurrent publishers get different numbers; a number is never given out twice.
        """
        directory = self._directory(name)
        with _reporting(f"can't publish into {directory}"):
            self._make(directory)
            with staging_directory(directory) as staging:
                write(staging)
                read_artifact(staging)
                for path in staging.iterdir():
                    fsync(path)
                fsync(staging)
                with locked(directory):
                    index = self._read_index(name)
                    there = [version.number for version in self.versions(name)]
                    index.last_number = max([index.last_number, *there]) + 1
                    # The number is spent before it is used: a crash in between skips it, never repeats it.
                    self._write_index(directory, index)
                    final = directory / str(index.last_number)
                    staging.rename(final)
                    fsync(directory)
        return ModelVersion(name, index.last_number, final)

    def prepare(self, name: str) -> None:
        """Find out whether a version of `name` could be published. Raises InvalidValue, StoreError."""
        directory = self._directory(name)
        with _reporting(f"can't publish into {directory}"):
            self._make(directory)
            with staging_directory(directory):
                self._read_index(name)

    def describe(self, version: ModelVersion) -> Description:
        """What a version is, without reading its weights. Raises ModelNotFound if it is gone, InvalidArtifact."""
        try:
            config, training, digest = read_description(version.path)
        except InvalidArtifact:
            if not version.path.exists():
                raise ModelNotFound(f"{version.ref} was deleted", param="model") from None
            raise
        aliases = sorted(alias for alias, number in self.aliases(version.name).items() if number == version.number)
        if self.versions(version.name)[-1:] == [version]:
            aliases.insert(0, _LATEST)
        return Description(version, config, training, digest, aliases)

    def verify(self, ref: str) -> ModelVersion:
        """Check a version wholly, as loading does. Raises ModelNotFound, InvalidArtifact."""
        return self.load(ref)[0]

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Let `name@alias` mean a version that is there."""
        if not _NAME.fullmatch(alias) or alias.isdigit() or alias == _LATEST:
            raise InvalidValue(f"{alias[:80]!r} can't be an alias: letters, digits, . _ -, not a number, not latest")
        directory = self._directory(name)
        self.resolve(f"{name}@{number}")
        with _reporting(f"can't change aliases in {directory}"), locked(directory):
            self.resolve(f"{name}@{number}")  # once more, now that nobody else can delete it
            index = self._read_index(name)
            index.aliases[alias] = number
            self._write_index(directory, index)

    def remove_alias(self, name: str, alias: str) -> None:
        """Forget an alias. Raises ModelNotFound if there is none of that name."""
        directory = self._directory(name)
        if alias not in self.aliases(name):
            raise ModelNotFound(f"model {name!r} has no alias {alias!r}")
        with _reporting(f"can't change aliases in {directory}"), locked(directory):
            index = self._read_index(name)
            index.aliases.pop(alias, None)
            self._write_index(directory, index)

    def delete(self, ref: str) -> ModelVersion:
        """Remove the version that `ref` means, which has to be a `name@number` that no alias points to."""
        version = self.resolve(ref)
        if ref != version.ref:
            raise StoreError(f"say which version to delete by its number: {version.ref}")
        directory = self._directory(version.name)
        with _reporting(f"can't delete {version.ref}"), locked(directory):
            self.resolve(ref)  # once more, now that nobody else can delete it
            index = self._read_index(version.name)
            pointing = sorted(alias for alias, number in index.aliases.items() if number == version.number)
            if pointing:
                raise StoreError(f"{version.ref} is {version.name}@{pointing[0]}: move or remove that alias first")
            index.last_number = max(index.last_number, self.versions(version.name)[-1].number)
            self._write_index(directory, index)
            trash = directory / f"{TRASH}{version.number}"
            version.path.rename(trash)  # gone for readers in one step, then removed at leisure
            fsync(directory)
            shutil.rmtree(trash)
        return version

    def _directory(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidValue(f"{name[:80]!r} can't be a model's name: up to 64 letters, digits, . _ -", param="name")
        return self.root / name

    def _make(self, directory: Path) -> None:
        """Make a name's directory, on the disk before anything is in it."""
        new = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for path in new:
            fsync(path.parent)

    def _read_index(self, name: str) -> _Index:
        path = self._directory(name) / _INDEX
        try:
            return _Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Index()
        except (OSError, ValidationError) as error:
            raise StoreError(
                f"{path} is damaged: write aliases and last_number, the highest version there ever was, into it again"
            ) from error

    def _write_index(self, directory: Path, index: _Index) -> None:
        text = json.dumps(index.model_dump(), indent=1, sort_keys=True) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=STAGING, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, directory / _INDEX)
        fsync(directory)


@contextmanager
def _reporting(what: str) -> Iterator[None]:
    """A failing disk, full or read-only, as our error."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}") from error
