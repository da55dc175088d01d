"""Packages that tests use from outside: each group is installed into an environment of its own, never beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
import venv

import pytest

INSTALL_S = 300


def own_python(cache: pytest.Cache, packages: list[str], *options: str) -> str:
    """Return the interpreter of an environment with these packages, which pytest's cache keeps between runs.

    Skip the test if they can't be installed; fail it where CI is set.

    Args:
        cache: The cache of this test run.
        packages: What to install, with exact versions.
        options: More options of `pip install`.
    """
    folder = cache.mkdir("environment-" + "-".join(package.replace("==", "-") for package in packages))
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        venv.create(folder, clear=True)  # without pip: to install it takes seconds, and that of this environment serves
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--retries", "0"]
        install += ["--timeout", "10", *options, *packages]
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        try:
            result = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            refuse(f"{', '.join(packages)} was not installed within {INSTALL_S} s")
        if result.returncode != 0:
            refuse(f"{', '.join(packages)} can't be installed: {result.stderr.strip().splitlines()[-1]}")
        finished.touch()
    return str(python)
