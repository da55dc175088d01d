"""Writing aside: a directory that is filled where nobody looks, and cleared away if its writer died.

May not: know what a model is.
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
    """Hold the only write lock of a name. It is a file lock: the system lets go of it if the holder dies."""
    with (directory / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """A new directory to write a version into; removed at the end unless it was renamed away.

    It is locked as long as its writer lives, by which the next writer tells abandoned ones from those in use.
    """
    with locked(directory):
        _remove_abandoned(directory)
        path = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
        path.chmod(0o755)
        held = os.open(path, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        # The lock goes last: while it is held nobody else removes the directory.
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def _remove_abandoned(directory: Path) -> None:
    for entry in list(os.scandir(directory)):
        if entry.name.startswith(TRASH):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name.startswith(STAGING) and entry.is_dir(follow_symlinks=False):
            try:
                held = os.open(entry.path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its writer has just removed it
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            except BlockingIOError:
                pass  # its writer is at work
            finally:
                os.close(held)
        elif entry.name.startswith(STAGING):
            os.unlink(entry.path)  # an index that never replaced the old one; writers of it hold our lock


def fsync(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
