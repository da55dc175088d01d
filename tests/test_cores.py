"""How many cores this process may use: its affinity, and the quota of its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service import cores
from service.settings import read_settings


def container(root: Path, memberships: str, files: dict[str, str]) -> Path:
    """Write what /proc and /sys show in a container; return the root of both."""
    for name, text in {"proc/self/cgroup": memberships, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n"
V1_PLACE = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("memberships", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 0\n"}, 8),
        ("0::/\n", {}, 8),
        # systemd and Kubernetes limit a group around this one.
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 1"}, 3),
        (V1, {f"{V1_PLACE}/cpu.cfs_quota_us": "250000\n", f"{V1_PLACE}/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {f"{V1_PLACE}/docker/ab/cpu.cfs_quota_us": "1\n", f"{V1_PLACE}/docker/ab/cpu.cfs_period_us": "100000"}, 1),
        (V1, {f"{V1_PLACE}/cpu.cfs_quota_us": "-1\n", f"{V1_PLACE}/cpu.cfs_period_us": "100000\n"}, 8),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 1),
        ("0::/../../../etc\nrubbish\n4:cpu\n", {}, 8),
    ],
)  # fmt: skip
def test_available_cores__counts_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memberships: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.available_cores(container(tmp_path, memberships, files)) == expected


def test_available_cores__without_proc_and_affinity_counts_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.available_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.available_cores(tmp_path) == 1


@pytest.mark.parametrize(("told", "expected"), [(2097152, 2097152), (0, None), (ValueError(), None), (OSError(), None)])
def test_second_cache_bytes__is_none_where_the_system_does_not_say_it(
    told: int | Exception, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sysconf(_name: str) -> int:
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert cores.second_cache_bytes() == expected


def test_settings__the_engine_has_a_default_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert read_settings().num_engine_threads >= 1
