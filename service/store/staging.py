"""Staging directories: a version is written where readers don't look for it, and is removed if its writer dies.

This module doesn't know what a model is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING, TRASH = ".staging-", ".trash-"
_LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait for a directory's write lock and hold it during the block. The system releases it if the process dies."""
    with (directory / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Yield a new, empty directory to write a version into. It is removed after the block unless it was renamed.

    Its writer holds a lock on it. A staging directory without a lock is therefore abandoned, and the next writer
    removes it.
    """
    with locked(directory):
        _remove_abandoned(directory)
        path = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
        path.chmod(0o755)
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        # The lock is released last: without it, another writer would remove the directory at the same time.
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(directory: Path) -> None:
    """Remove what dead writers left. The caller holds the directory's lock."""
    for entry in list(os.scandir(directory)):
        if entry.name.startswith(TRASH):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name.startswith(STAGING) and entry.is_dir(follow_symlinks=False):
            try:
                descriptor = os.open(entry.path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its writer has just removed it
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            except BlockingIOError:
                pass  # its writer is alive
            finally:
                os.close(descriptor)
        elif entry.name.startswith(STAGING):
            os.unlink(
                entry.path
            )  # an unfinished index: its writer is dead, because this writer holds the directory's lock


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
