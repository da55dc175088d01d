"""The manifest of a model version: which files it has, how long they are, and their SHA-256 sums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidArtifact

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 1024
_MAX_FILES = 32
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Length and sum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bytes: int = Field(ge=0)
    sha256: Sha256


class Manifest(BaseModel):
    """Every file of a version but the manifest itself. Stored in one canonical form, so that no byte of it is free."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry] = Field(max_length=_MAX_FILES)
    sha256: Sha256

    @classmethod
    def of(cls, directory: Path) -> Manifest:
        """The manifest of the files that lie in a directory now."""
        entries = {}
        for path in sorted(directory.iterdir()):
            data = path.read_bytes()
            entries[path.name] = FileEntry(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        return cls(files=entries, sha256=_sum_of_sums(entries))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in a directory; its files are those that it names. Raises InvalidArtifact."""
        data = read_regular_file(directory / MANIFEST, _MAX_MANIFEST_BYTES)
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidArtifact(f"{directory / MANIFEST}: {explain(error)}") from error
        if manifest.to_json().encode() != data:
            raise InvalidArtifact(
                f"{directory / MANIFEST} is not in its canonical form: it was changed by hand or damaged"
            )
        if manifest.sha256 != _sum_of_sums(manifest.files):
            raise InvalidArtifact(f"{directory / MANIFEST}: its own sum doesn't fit its entries")
        try:
            there = set(os.listdir(directory)) - {MANIFEST}
        except OSError as error:
            raise InvalidArtifact(f"can't read {directory}: {error.strerror}") from error
        if missing := sorted(set(manifest.files) - there):
            raise InvalidArtifact(f"{directory}: {missing[0]} is missing")
        if foreign := sorted(there - set(manifest.files)):
            raise InvalidArtifact(f"{directory}: {foreign[0]} is not in the manifest")
        return manifest

    def to_json(self) -> str:
        """The one form in which a manifest may be stored."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"

    def read_file(
        self, directory: Path, name: str, max_bytes: int, check_start: Callable[[BinaryIO], object] | None = None
    ) -> bytes:
        """A file's content, after its length and sum were found to be right. Raises InvalidArtifact.

        check_start: gets the open file before the whole of it is read, and may raise.
        """
        if not _FILE_NAME.fullmatch(name) or name not in self.files:
            raise InvalidArtifact(f"{directory}: the manifest names no file {name!r}")
        entry = self.files[name]
        if entry.num_bytes > max_bytes:
            raise InvalidArtifact(f"{directory / name}: {entry.num_bytes} bytes, at most {max_bytes} are accepted")
        data = read_regular_file(directory / name, entry.num_bytes, check_start)
        if len(data) != entry.num_bytes:
            raise InvalidArtifact(f"{directory / name}: {len(data)} bytes, the manifest says {entry.num_bytes}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise InvalidArtifact(f"{directory / name}: its SHA-256 sum is not the manifest's; the file was changed")
        return data


def read_regular_file(path: Path, max_bytes: int, check_start: Callable[[BinaryIO], object] | None = None) -> bytes:
    """The content of a plain file of at most `max_bytes`; links, pipes and devices are refused unread."""
    try:
        # O_NONBLOCK: a pipe that nobody writes to would be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidArtifact(f"{path} is not a plain file")
            if status.st_size > max_bytes:
                raise InvalidArtifact(f"{path}: {status.st_size} bytes, at most {max_bytes} are expected")
            if check_start is not None:
                check_start(file)
                file.seek(0)
            return file.read(max_bytes)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidArtifact(f"{path} is not a plain file") from error
        raise InvalidArtifact(f"can't read {path}: {error.strerror}") from error


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: where, and what."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _sum_of_sums(files: dict[str, FileEntry]) -> str:
    lines = "".join(f"{files[name].sha256} {files[name].num_bytes} {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
