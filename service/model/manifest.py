"""The manifest of a model version: the names, lengths and SHA-256 sums of its files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidArtifact

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 1024
_MAX_FILES = 32
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What systems, editors and DVC put beside files, with names that a file of a version could have.
_STRAY = re.compile(r"(?i)desktop\.ini|(?:eh)?thumbs\.db|.*\.(?:bak|orig|tmp|dvc)")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Length and SHA-256 sum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bytes: int = Field(ge=0)
    sha256: Sha256


class Manifest(BaseModel):
    """The files of a version, except the manifest itself.

    It is stored in one canonical form, so every changed byte is noticed, also in the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry] = Field(max_length=_MAX_FILES)  # by name
    sha256: Sha256  # sum of the entries in `files`

    @classmethod
    def of(cls, directory: Path) -> Manifest:
        """Make the manifest of the files that are in a directory now, without stray ones."""
        entries = {}
        for path in sorted(path for path in directory.iterdir() if not is_stray(path.name)):
            data = path.read_bytes()
            entries[path.name] = FileEntry(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        return cls(files=entries, sha256=_sum_of_sums(entries))

    @classmethod
    def read(cls, directory: Path, needed: Collection[str] | None = None) -> Manifest:
        """Read a directory's manifest, and check that the directory has the files that it lists and no others.

        The contents of these files are not read; see `read_file`. Stray files are ignored; see `is_stray`.

        Args:
            directory: where the files are.
            needed: the files that must not be missing; None for all.

        Raises InvalidArtifact.
        """
        data = read_regular_file(directory / MANIFEST, _MAX_MANIFEST_BYTES)
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidArtifact(f"{directory / MANIFEST}: {describe_first_error(error)}") from error
        canonical = manifest.to_json().encode()
        if canonical == data.replace(b"\r\n", b"\n") != data:
            raise InvalidArtifact(
                f"{directory / MANIFEST}: its line ends were converted, as git does with core.autocrlf=true: write "
                "`model_store/** -text` into .gitattributes, and check the files out again"
            )
        if canonical != data:
            raise InvalidArtifact(f"{directory / MANIFEST} is not in canonical form: it was edited or damaged")
        if manifest.sha256 != _sum_of_sums(manifest.files):
            raise InvalidArtifact(f"{directory / MANIFEST}: its own sum doesn't match its entries")
        try:
            present = set(os.listdir(directory)) - {MANIFEST}
        except OSError as error:
            raise InvalidArtifact(describe_os_error(directory, error)) from error
        missing = sorted(set(manifest.files) - present)
        if missing := [n for n in missing if needed is None or n in needed or not _FILE_NAME.fullmatch(n)]:
            raise InvalidArtifact(f"{directory}: {missing[0]} is missing")
        if foreign := sorted(name for name in present - set(manifest.files) if not is_stray(name)):
            raise InvalidArtifact(f"{directory}: {foreign[0]} is not in the manifest: move it elsewhere")
        return manifest

    def to_json(self) -> str:
        """Return the canonical form, the only one in which a manifest is accepted."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"

    def read_file(
        self, directory: Path, name: str, max_bytes: int, check_start: Callable[[BinaryIO], object] | None = None
    ) -> bytes:
        """Return the content of a file, after checking its length and sum.

        Args:
            directory: where the manifest was read.
            name: the file's name, which the manifest must contain.
            max_bytes: the length above which the file is refused unread.
            check_start: called with the open file before it is read as a whole, for example to check a header. It may
                raise, and may leave the file at any position.

        Raises:
            InvalidArtifact: the file is missing, too long, not a regular file, or not what the manifest says.
        """
        if not _FILE_NAME.fullmatch(name) or name not in self.files:
            raise InvalidArtifact(f"{directory}: the manifest has no file {name!r}")
        entry = self.files[name]
        if entry.num_bytes > max_bytes:
            raise InvalidArtifact(f"{directory / name}: {entry.num_bytes} bytes, at most {max_bytes} are accepted")
        data = read_regular_file(directory / name, entry.num_bytes, check_start)
        if len(data) != entry.num_bytes:
            raise InvalidArtifact(f"{directory / name}: {len(data)} bytes, the manifest says {entry.num_bytes}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise InvalidArtifact(
                f"{directory / name}: its SHA-256 sum is not the one in the manifest; the file was changed"
            )
        return data


def is_stray(name: str) -> bool:
    """Return whether a name is one that systems and programs give to files of their own, such as `.DS_Store`.

    These files are not part of a version. Neither is anything whose name a file of a version can't have, such as
    `@eaDir`, `..data` or `README.md~`.
    """
    return not _FILE_NAME.fullmatch(name) or _STRAY.fullmatch(name) is not None


def read_regular_file(path: Path, max_bytes: int, check_start: Callable[[BinaryIO], object] | None = None) -> bytes:
    """Return the content of a regular file of at most `max_bytes`. Raises InvalidArtifact.

    Links are followed, once: what is opened then is a regular file, and all of it is read from the one descriptor.
    Pipes and devices are not opened. For `check_start` see `Manifest.read_file`.
    """
    try:
        with open(_open_regular_file(path), "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > max_bytes:
                raise InvalidArtifact(f"{path}: {num_bytes} bytes, at most {max_bytes} are expected")
            if check_start is not None:
                check_start(file)
                file.seek(0)
            return file.read(max_bytes)
    except OSError as error:
        raise InvalidArtifact(describe_os_error(path, error)) from error


def _open_regular_file(path: Path) -> int:
    """Return a descriptor of the regular file at a path or at the end of its links. Raises InvalidArtifact, OSError."""
    real = os.path.realpath(path, strict=True)
    # Checked twice: before opening, which has effects on devices, and after it, because the path may have changed.
    if stat.S_ISREG(os.stat(real, follow_symlinks=False).st_mode):
        try:
            # O_NONBLOCK, because opening a pipe would otherwise wait until somebody writes to it.
            descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    raise InvalidArtifact(f"{path} is not a regular file")


def is_broken_link(path: Path) -> bool:
    """Return whether a path is a link to nothing. One that may not be followed counts as a link to something."""
    try:
        return os.path.islink(path) and not os.path.lexists(os.path.realpath(path))
    except OSError:  # realpath reads every link on the way
        return False


def describe_os_error(path: Path, error: OSError) -> str:
    """Return in one line why a path can't be read, and what to do about it."""
    for link in (path, path.parent):
        if is_broken_link(link):
            return f"{link} is a link to {os.readlink(link)}, which is not there: in a container, mount that place too"
    if error.errno == errno.ELOOP:
        return f"{path} is a link that leads back to itself"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not read {path}: {error.strerror}: allow it, for example with `chmod -R a+rX`"
    return f"can't read {path}: {error.strerror}"


def describe_first_error(error: ValidationError) -> str:
    """Return the first error in one line: the field, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _sum_of_sums(files: dict[str, FileEntry]) -> str:
    lines = "".join(f"{files[name].sha256} {files[name].num_bytes} {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
