"""Staging directories: a version is written where readers don't look for it, and is removed if its writer dies.

This module doesn't know what a model is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

STAGING, TRASH = ".staging-", ".trash-"
_LOCK = ".lock"
_ADVICE = "publish into a store on a local disk and copy the version"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EISDIR)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def made_directories(directory: Path) -> Iterator[list[Path]]:
    """Make a directory and those around it, and yield those that are new, the innermost first.

    Those that are empty after the block are removed again: what was refused leaves nothing. Raises OSError.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield new
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


def remove_lonely_lock(directory: Path) -> None:
    """Remove a directory's lock file if the directory has nothing else."""
    with suppress(OSError), (directory / _LOCK).open("w") as file:
        with suppress(OSError):  # without locks, nobody could publish here
            _lock(file)
        if os.listdir(directory) == [_LOCK]:
            os.unlink(file.name)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait for a directory's write lock and hold it during the block. The system releases it if the process dies.

    Raises OSError, which says so if the file system has no locks.
    """
    # Open for writing: NFS grants an exclusive lock to no other descriptor.
    with (directory / _LOCK).open("w") as file:
        _lock(file)
        yield


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield a new, empty directory to write a version into. It is removed after the block unless it was renamed.

    Its writer holds a lock on a file beside it. A staging directory without a lock is therefore abandoned, and the next
    writer removes it.
    """
    with locked(directory):
        _remove_abandoned(directory)
        path = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
        make_readable(path)
        lock = _lock_of(path).open("w")
        try:
            _lock(lock)
        except OSError:
            lock.close()
            raise
    try:
        yield path
    finally:
        # The lock is released last: without it, another writer would remove the directory at the same time. Its file is
        # closed first, because some file systems remove no open file.
        remove(path)
        lock.close()
        _lock_of(path).unlink(missing_ok=True)


def check_file_system(staging: Path) -> None:
    """Do in a staging directory what publishing does. Raises OSError, which says what the file system lacks."""
    with tempfile.TemporaryDirectory(dir=staging) as name:
        old, new, folder = Path(name, "old"), Path(name, "new"), Path(name, "folder")
        folder.mkdir()
        for path in (old, new, folder / "file"):
            path.write_bytes(b"1")
            fsync(path)
        with _needed("rename a file over another one"):
            new.replace(old)
        with _needed("rename a folder"):
            folder.rename(folder.with_name("moved"))
        fsync(Path(name))


def make_readable(path: Path) -> None:
    """Let every user read a file or enter a directory, where the file system has such modes; umask may forbid it."""
    with suppress(OSError):  # FUSE and CIFS may refuse; then the options of the mount say who can read
        mode = path.stat().st_mode
        path.chmod(stat.S_IMODE(mode) | (0o755 if stat.S_ISDIR(mode) else 0o644))


def remove(path: Path) -> None:
    """Remove a directory as far as possible; of a link, only the link itself."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk. CIFS and FUSE may refuse it for directories: then not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise


def _lock_of(staging: Path) -> Path:
    return staging.with_name(staging.name + _LOCK)


def _lock(file: IO[str], flags: int = 0) -> None:
    """Lock an open file. Raises BlockingIOError if `flags` say not to wait, and OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        reason = f"its file system can't lock files ({error.strerror}): mount it with locks, or {_ADVICE}"
        raise OSError(error.errno, reason) from error


@contextmanager
def _needed(what: str) -> Iterator[None]:
    """Say in an OSError of the block what the file system can't do, unless the disk is full or broken."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise
        raise OSError(error.errno, f"its file system can't {what} ({error.strerror}): {_ADVICE}") from error


def _remove_abandoned(directory: Path) -> None:
    """Remove what dead writers left. The caller holds the directory's lock."""
    names = os.listdir(directory)
    for name in names:
        path = directory / name
        if name.startswith(TRASH):
            remove(path)
        elif not name.startswith(STAGING):
            continue
        elif name.endswith(_LOCK):
            if name.removesuffix(_LOCK) not in names:
                path.unlink(missing_ok=True)  # its writer has finished, or died after that
        elif not path.is_dir():
            # An unfinished index: its writer is dead, because this writer holds the directory's lock.
            path.unlink(missing_ok=True)
        elif _is_abandoned(path):
            remove(path)
            _lock_of(path).unlink(missing_ok=True)


def _is_abandoned(staging: Path) -> bool:
    with _lock_of(staging).open("w") as file:
        try:
            _lock(file, fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # its writer is alive
    return True
