"""Zip archives as Keras and PyTorch write them: members that are stored as they are, each read within a limit."""

from __future__ import annotations

import mmap
import zipfile
import zlib
from pathlib import Path
from typing import IO

from service.errors import InvalidModelFile
from service.importing.foreign import shown

MAX_MEMBERS = 1024
_ENTRY = b"PK\x01\x02"  # begins each entry of the directory


class Archive:
    """An open zip archive. Use it as a context manager."""

    def __init__(self, path: Path, name: str) -> None:
        """Open an archive. `name` is what messages call it. Raises InvalidModelFile, OSError."""
        self._name, self._num_bytes = name, path.stat().st_size
        self._bytes_left = self._num_bytes  # that members may have together
        _check_directory(path, name)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, IndexError, OverflowError) as error:
            raise InvalidModelFile(f"{name} is not a whole zip archive: it is damaged") from error
        self._infos = {info.filename: info for info in self._zip.infolist()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def names(self) -> list[str]:
        """Return the names of the members."""
        return list(self._infos)

    def size(self, member: str) -> int:
        """Return the size that the directory declares for a member."""
        return self._infos[member].file_size

    def read(self, member: str, max_bytes: int) -> bytes:
        """Return a member. Raises InvalidModelFile if it is damaged, or declares or has more than max_bytes.

        All members that are read may have together as many bytes as the archive.
        """
        info = self._infos.get(member)
        if info is None:
            raise InvalidModelFile(f"{self._name} lacks {shown(member)}")
        if info.flag_bits & 1:
            raise InvalidModelFile(f"{self._name}: {shown(member)} is encrypted")
        if info.file_size > min(max_bytes, self._num_bytes if info.compress_type == zipfile.ZIP_STORED else max_bytes):
            raise InvalidModelFile(
                f"{self._name}: {shown(member)} would have {info.file_size:,} bytes, which is too much"
            )
        if info.compress_type != zipfile.ZIP_STORED and info.file_size > self._num_bytes:
            raise InvalidModelFile(f"{self._name}: {shown(member)} would be larger than the whole archive")
        self._bytes_left -= info.file_size
        if self._bytes_left < 0:  # compressed, or members that share their bytes, or one that is read again and again
            raise InvalidModelFile(f"{self._name}: its members would expand to more than the archive has")
        try:
            with self._zip.open(info) as file:
                data = file.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OverflowError) as error:
            raise InvalidModelFile(f"{self._name}: {shown(member)} is damaged") from error
        except RuntimeError as error:  # a password, or a compression that this Python lacks
            raise InvalidModelFile(f"{self._name}: {shown(member)} can't be read: {error}") from error
        if len(data) != info.file_size:
            raise InvalidModelFile(f"{self._name}: {shown(member)} is incomplete")
        return data

    def copy(self, member: str, target: IO[bytes]) -> None:
        """Write a member, which may be as large as the archive, into a file. Raises InvalidModelFile."""
        target.write(self.read(member, self._num_bytes))


def _check_directory(path: Path, name: str) -> None:
    """Raise InvalidModelFile for more than MAX_MEMBERS entries, because zipfile lists all of them in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = -1
        for _ in range(MAX_MEMBERS + 1):
            position = data.find(_ENTRY, position + 1)
            if position < 0:
                return
    raise InvalidModelFile(f"{name} has more than {MAX_MEMBERS} members, more than any model")
