"""Runs all benchmarks one after the other, each in a process of its own: `python -m benchmarks`, or `make bench`.

A benchmark whose programs are not installed is skipped with a line that names them. The figures of the container image
are not measured here but by `make test-deploy`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

# Each benchmark, with the programs that it needs besides the development environment.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "train": (),
    "recipes": (),
    "corpora": (),
    "decode": (),
    "form_compilation": (),
    "roofline": (),
    "ticks": (),
    "forms": (),
    "http": (),
    "fairness": (),
    "scoring": (),
    "form_validity": (),
    "form_peers": (),
    "sessions": (),
    "memory": (),
    "deploy": ("redis-server",),
    "lists": ("redis-server",),
    "survival": ("redis-server", "haproxy"),
    "strangers": (),
    "consistency": ("redis-server", "haproxy"),
    "page": ("chromium",),
}


def main() -> None:
    """Run the benchmarks, and exit with 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks one after the other, with their default options.",
        epilog="python -m benchmarks.NAME --help lists the options of one of them. The figures of the container image "
        "are measured by `make test-deploy`.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}  [all]")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        if missing := missing_programs(name):
            print(f"== {name} is skipped: {', '.join(missing)} is not installed", flush=True)
            continue
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    print("== not run here: the figures of the container image, which `make test-deploy` measures")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def missing_programs(name: str) -> list[str]:
    """Return the programs that a benchmark needs and that are not installed."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"  # where Debian installs haproxy
    return [program for program in BENCHMARKS[name] if shutil.which(program, path=path) is None]


if __name__ == "__main__":
    main()
