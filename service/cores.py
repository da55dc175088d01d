"""How many cores this process may use, and how large the second cache of a core is.

This module may import nothing of this project.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """Return the number of cores that this process may use: those of its affinity, or its container's quota if less.

    A quota is rounded up. macOS has neither affinity nor quotas; there all cores count. `root` is for tests.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def second_cache_bytes() -> int | None:
    """Return the size of a core's second cache, or None where the system doesn't say it."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or None
    except (AttributeError, ValueError, OSError):  # Windows; a libc without this name
        return None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the limits, in cores, of the control groups that this process is in."""
    cgroups = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:  # version 2
            for place in _around(cgroups, group):
                yield from _quota(*_read(place / "cpu.max").split()[:2])
        elif "cpu" in controllers.split(","):  # version 1
            for mount in (controllers, "cpu"):
                for place in _around(cgroups / mount, group):
                    yield from _quota(*(_read(place / f"cpu.cfs_{name}_us") for name in ("quota", "period")))


def _around(mount: Path, group: str) -> Iterator[Path]:
    """Yield the directories of a group and of the groups around it. Inside a container only the last one may exist."""
    path = PurePosixPath(group.lstrip("/"))
    if ".." not in path.parts:
        for each in (path, *path.parents):
            yield mount / each


def _quota(quota: str = "", period: str = "") -> Iterator[float]:
    """Yield the quotient of microseconds, or nothing if there is no limit."""
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return
    if limit > 0:
        yield limit


def _read(path: Path) -> str:
    try:
        with path.open() as file:
            return file.read(65_536)
    except (OSError, ValueError):
        return ""
