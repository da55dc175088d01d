"""The model store: `<root>/<name>/<version>/`. Versions are numbered from 1 and never change.

    model_store/shakespeare/1/...        one version: an artifact
    model_store/shakespeare/store.json   aliases, and the highest number ever used
    model_store/shakespeare/.staging-*   a version that is being written; readers ignore it

A writer fills a staging directory, syncs it to disk and then renames it, so readers see a whole version or none, even
after a crash. Writers of one name exclude each other with a file lock, which the system releases if its holder dies.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidArtifact, InvalidValue, ModelNotFound, StoreError
from service.model.artifact import Artifact, TrainingFacts, copy_artifact, read_artifact, read_description
from service.model.chat_template import ChatTemplate
from service.model.config import ModelConfig
from service.model.manifest import MANIFEST, describe_os_error, is_broken_link, is_stray
from service.store.staging import (
    STAGING,
    TRASH,
    check_file_system,
    fsync,
    locked,
    made_directories,
    make_readable,
    remove,
    remove_lonely_lock,
    staging_directory,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_INDEX = "store.json"
LATEST = "latest"  # the alias of the newest version, which every name has
_MAX_LISTED = 8  # names in an error


@dataclass(frozen=True, order=True)
class ModelVersion:
    """A published version."""

    name: str
    number: int
    path: Path

    @property
    def ref(self) -> str:
        """Its full name, `name@number`, which never stands for another version."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Description:
    """What is known about a version without reading its weights."""

    version: ModelVersion
    config: ModelConfig
    training: TrainingFacts
    digest: str  # see Artifact.digest
    aliases: list[str]  # all aliases of the version, sorted; `latest` is the first if it applies
    chat: ChatTemplate | None = None  # see Artifact.chat


class _Index(BaseModel):
    """The content of `store.json`."""

    model_config = ConfigDict(extra="forbid")

    aliases: dict[str, int] = Field(default_factory=dict)  # alias -> version number, without `latest`
    last_number: int = 0  # the highest version number ever used, also by a deleted version


class ModelStore:
    """The models in one directory. Any number of threads and processes may read and write at the same time."""

    def __init__(self, root: Path, *, default: str | None = None, read_only: bool = False) -> None:
        """Open the store in a directory, which need not exist.

        Args:
            root: the directory.
            default: the name of a model that errors list first.
            read_only: refuse every change.
        """
        self.root, self._default, self._read_only = root, default, read_only

    def names(self) -> list[str]:
        """Return the names that have at least one version, sorted. Raises StoreError if the store can't be read.

        A directory in it that can't be read is skipped: see `unreadable`.
        """
        return self._names()[0]

    def unreadable(self) -> dict[str, str]:
        """Return the names whose directory can't be read, each with the reason. Raises StoreError."""
        return self._names()[1]

    def versions(self, name: str) -> list[ModelVersion]:
        """Return the versions of a name, oldest first: none if the name doesn't exist.

        A version may be a link, even to nothing: loading it says so. Raises StoreError if the name can't be read.
        """
        directory = self._directory(name)
        entries = [entry for entry in _entries(directory) if _VERSION.fullmatch(entry.name)]
        numbers = sorted(int(entry.name) for entry in entries if entry.is_symlink() or entry.is_dir())
        return [ModelVersion(name, number, directory / str(number)) for number in numbers]

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias -> version number, without `latest`, which every name has. Raises StoreError."""
        return dict(self._read_index(name).aliases)

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that `name`, `name@3`, `name@latest` or `name@alias` stands for now.

        Raises ModelNotFound, or StoreError if an alias can't be read.
        """
        name, at, selector = ref.partition("@")
        if not _NAME.fullmatch(name) or (at and not _NAME.fullmatch(selector)):
            raise ModelNotFound(
                f"{ref[:80]!r} is not a model's name: write name, name@version or name@alias", param="model"
            )
        versions = self.versions(name)
        if not versions:
            names, unreadable = self._names()
            names.sort(key=lambda other: other != self._default)
            more = f"; can't be read: {_listed(list(unreadable))}" if unreadable else ""
            raise ModelNotFound(
                f"no model {name!r} is in the store; it has: {_listed(names)}{more}", param="model", others=names
            )
        if not at or selector == LATEST:
            return versions[-1]
        number = int(selector) if _VERSION.fullmatch(selector) else self.aliases(name).get(selector)
        for version in versions:
            if version.number == number:
                return version
        numbers = _listed([str(version.number) for version in reversed(versions)])
        raise ModelNotFound(
            f"model {name!r} has no version or alias {selector!r}; its versions: {numbers}", param="model"
        )

    def load(self, ref: str) -> tuple[ModelVersion, Artifact]:
        """Return the version that `ref` stands for, and its checked contents. Raises ModelNotFound, InvalidArtifact."""
        version = self.resolve(ref)
        return version, read_artifact(version.path)

    def publish(self, name: str, write: Callable[[Path], None]) -> ModelVersion:
        """Publish the files that `write` puts into an empty directory, which it gets as its argument.

        The files are read back and checked before the version appears. Concurrent publishers get different numbers,
        and no number is ever used twice.

        Raises:
            InvalidArtifact: the files are not a valid version. The store is unchanged.
            StoreError: the disk failed or the index is damaged. No version was published.
            InvalidValue: `name` can't be a model's name.
        """
        directory = self._changeable(name)
        with self._publishing_into(directory) as staging:
            write(staging)
            for warning in read_artifact(staging).warnings:
                raise InvalidArtifact(warning)
            for path in staging.iterdir():
                if not is_stray(path.name):
                    make_readable(path)
                    fsync(path)
            fsync(staging)
            with locked(directory):
                index = self._read_index(name)
                existing = [version.number for version in self.versions(name)]
                index.last_number = max([index.last_number, *existing]) + 1
                # The number is recorded before it is used: a crash in between skips a number and repeats none.
                self._write_index(directory, index)
                final = directory / str(index.last_number)
                staging.rename(final)
                fsync(directory)
        return ModelVersion(name, index.last_number, final)

    def republish(self, ref: str, files: Mapping[str, bytes]) -> ModelVersion:
        """Publish a version again as a new one of its name, with these files added or replaced.

        Raises ModelNotFound, InvalidArtifact, StoreError.
        """
        version, _ = self.load(ref)
        return self.publish(version.name, lambda directory: copy_artifact(version.path, directory, files))

    def check_writable(self, name: str, write: Callable[[Path], None] = lambda _: None) -> None:
        """Raise InvalidValue, InvalidArtifact or StoreError if no version of `name` could be published.

        Makes the name's directory unless it raises, and tries on the file system what publishing does there: locks,
        renaming, and syncing to disk. What `write` puts into an empty directory, which it gets as its argument, is read
        back as `publish` does, unless it is nothing, and removed.
        """
        directory = self._changeable(name)
        with self._publishing_into(directory) as staging:
            self._read_index(name)
            write(staging)
            if any(staging.iterdir()):
                read_artifact(staging)

    def describe(self, version: ModelVersion) -> Description:
        """Return what is known about a version, without reading its weights.

        Raises ModelNotFound if it was deleted, InvalidArtifact, or StoreError if the index is damaged.
        """
        try:
            config, training, digest, chat = read_description(version.path)
        except InvalidArtifact:
            if version not in self.versions(version.name):
                raise ModelNotFound(f"{version.ref} was deleted", param="model") from None
            raise
        aliases = sorted(alias for alias, number in self.aliases(version.name).items() if number == version.number)
        if self.versions(version.name)[-1:] == [version]:
            aliases.insert(0, LATEST)
        return Description(version, config, training, digest, aliases, chat)

    def verify(self, ref: str) -> tuple[str, ...]:
        """Check every file of a version, as loading does. Return what is wrong with files that decide nothing.

        Raises ModelNotFound, InvalidArtifact.
        """
        return self.load(ref)[1].warnings

    def snapshot(self, version: ModelVersion) -> frozenset[tuple[object, ...]]:
        """Return a value that changes when a file of a version changes, for example because it is still copied.

        It has name, size, time and inode of the files that links lead to. Never raises.
        """
        facts: set[tuple[object, ...]] = set()
        try:
            for entry in os.scandir(version.path):
                try:
                    status = entry.stat()
                    facts.add((entry.name, status.st_size, status.st_mtime_ns, status.st_ino))
                except OSError as error:
                    facts.add((entry.name, error.errno))
        except OSError as error:
            facts.add((error.errno,))
        return frozenset(facts)

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Make `name@alias` stand for an existing version, instead of any other one.

        Raises InvalidValue for an impossible name or alias, ModelNotFound, StoreError.
        """
        if not _NAME.fullmatch(alias) or alias.isdigit() or alias == LATEST:
            raise InvalidValue(
                f"{alias[:80]!r} can't be an alias: use letters, digits, . _ -; neither a number nor `latest`"
            )
        directory = self._changeable(name)
        self.resolve(f"{name}@{number}")
        with _os_errors_as_store_errors(f"can't change aliases in {directory}"), locked(directory):
            self.resolve(f"{name}@{number}")  # again, now that no other writer can delete it
            index = self._read_index(name)
            index.aliases[alias] = number
            self._write_index(directory, index)

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias. Raises ModelNotFound if it doesn't exist, StoreError."""
        directory = self._changeable(name)
        if alias not in self.aliases(name):
            raise ModelNotFound(f"model {name!r} has no alias {alias!r}")
        with _os_errors_as_store_errors(f"can't change aliases in {directory}"), locked(directory):
            index = self._read_index(name)
            index.aliases.pop(alias, None)
            self._write_index(directory, index)

    def check_deletable(self, ref: str) -> ModelVersion:
        """Return the version `ref` if `delete` would delete it now, and change nothing. Raises what `delete` raises."""
        version = self.resolve(ref)
        if ref != version.ref:
            raise StoreError(f"name the version to delete by its number: {version.ref}")
        directory = self._changeable(version.name)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise StoreError(f"can't delete {version.ref}: {directory} may not be changed; check its permissions")
        named = self._read_index(version.name).aliases
        aliases = sorted(alias for alias, number in named.items() if number == version.number)
        if aliases:
            raise StoreError(f"{version.ref} has the alias {version.name}@{aliases[0]}: move or remove that first")
        return version

    def delete(self, ref: str) -> ModelVersion:
        """Delete the version `ref`, which must be a `name@number` without aliases.

        Raises ModelNotFound, or StoreError if it has an alias, is named by one, or can't be deleted.
        """
        version = self.check_deletable(ref)
        directory = self._changeable(version.name)
        with _os_errors_as_store_errors(f"can't delete {version.ref}"), locked(directory):
            self.check_deletable(ref)  # again, now that no other writer can change it
            index = self._read_index(version.name)
            index.last_number = max(index.last_number, self.versions(version.name)[-1].number)
            self._write_index(directory, index)
            trash = directory / f"{TRASH}{version.number}"
            version.path.rename(trash)  # readers lose the whole version in one step; its files are removed after that
            fsync(directory)
            remove(trash)
        return version

    def around(self) -> Path | None:
        """Return the store in which this directory is that of a name or of a version; None if there is none."""
        root = self.root.absolute()
        if _VERSION.fullmatch(root.name) and (root / MANIFEST).is_file():
            return root.parent.parent
        versions = [path for path in root.glob("*") if _VERSION.fullmatch(path.name)]
        return root.parent if any((path / MANIFEST).is_file() for path in versions) else None

    def _directory(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                f"{name[:80]!r} can't be a model's name: use up to 64 letters, digits, . _ -", param="name"
            )
        return self.root / name

    def _changeable(self, name: str) -> Path:
        """Return a name's directory, for changes. Raises InvalidValue, StoreError."""
        if self._read_only:
            raise StoreError(
                f"the shipped models in {self.root} can't be changed: name another store with --model-store or "
                "GRU_SERVE_MODEL_STORE"
            )
        return self._directory(name)

    def _names(self) -> tuple[list[str], dict[str, str]]:
        """Return the names that have a version, and for those that can't be read the reason. Raises StoreError."""
        names, unreadable = [], {}
        if os.path.isfile(self.root):
            raise StoreError(f"{self.root} is a file, and not the folder of a model store")
        for name in sorted(entry.name for entry in _entries(self.root) if _NAME.fullmatch(entry.name)):
            try:
                if self.versions(name):
                    names.append(name)
            except StoreError as error:
                unreadable[name] = error.message
        return names, unreadable

    @contextmanager
    def _publishing_into(self, directory: Path) -> Iterator[Path]:
        """Yield an empty directory beside the versions of a name; what it has after the block is removed.

        Makes the name's directory and those around it, readable for everybody and synced to disk: if the block fails,
        those are removed again that have nothing else. Raises StoreError.
        """
        with (
            _os_errors_as_store_errors(f"can't publish into {directory}"),
            made_directories(directory) as new,
        ):
            for path in new:
                make_readable(path)
                fsync(path.parent)
            try:
                with staging_directory(directory) as staging:
                    check_file_system(staging)
                    yield staging
            except BaseException:
                if directory in new:
                    remove_lonely_lock(directory)
                raise

    def _read_index(self, name: str) -> _Index:
        path = self._directory(name) / _INDEX
        try:
            return _Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Index()
        except OSError as error:
            raise StoreError(describe_os_error(path, error)) from error
        except ValidationError as error:
            raise StoreError(
                f"{path} is damaged: restore its `aliases` and `last_number`, the highest version number ever used"
            ) from error

    def _write_index(self, directory: Path, index: _Index) -> None:
        text = json.dumps(index.model_dump(), indent=1, sort_keys=True) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=STAGING, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        make_readable(Path(file.name))
        try:
            os.replace(file.name, directory / _INDEX)
        except OSError:
            os.unlink(file.name)
            raise
        fsync(directory)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return what a directory contains: nothing if it is none.

    Raises StoreError if it can't be read, or is a link to nothing.
    """
    try:
        return list(os.scandir(directory))
    except OSError as error:
        if error.errno in _ABSENT and not is_broken_link(directory):
            return []
        raise StoreError(describe_os_error(directory, error)) from error


@contextmanager
def _os_errors_as_store_errors(what_failed: str) -> Iterator[None]:
    """Raise StoreError for an OSError of the block, such as of a full or read-only disk."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what_failed}: {error.strerror or error}") from error


def _listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more if names else "none"
