"""Environments of other programs' own, in which tests run clients that must not meet the libraries of this project.

They are in `.clients`, beside `.venv`: one for each client, made at its first use, and again when its requirements
change.
uv installs Python packages: it takes a tenth of pip's time, and the environments share files with its cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NoReturn

from tests.harness.programs import program

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".clients"
UV = "uv==0.13.8"
# Indirect requirements are as they were on this day.
NEWEST = "2026-11-26"
INSTALL_S = 600


def environment(source: Path) -> Path:
    """Return the folder of an environment with what `requirements.txt` or `package.json` of a folder names.

    Skips the test if it can't be installed; fails it where CI is set.
    """
    requirements = source / "requirements.txt"
    is_python = requirements.exists()
    content = (requirements if is_python else source / "package.json").read_bytes()
    folder, digest = FOLDER / source.name, hashlib.sha256(content + NEWEST.encode()).hexdigest()
    finished = folder / "finished"
    if finished.exists() and finished.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if is_python:
        _uv("venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder))
        # torch's CPU build, where pip finds it too: the default wheel installs several GB of CUDA libraries.
        torch = os.environ.get("PIP_FIND_LINKS") or f"{os.environ.get('TORCH_INDEX')}/torch"
        links = ["--find-links", torch] if b"torch==" in content else []
        python = str(folder / "bin" / "python")
        _uv("pip", "install", "--quiet", "--exclude-newer", NEWEST, *links, "--python", python, "-r", str(requirements))
    else:
        (folder / "package.json").write_bytes(content)
        npm = [
            program("npm"),
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--no-package-lock",
            "--ignore-scripts",
        ]
        _install([*npm, f"--before={NEWEST}"], folder)
    finished.write_text(digest)
    return folder


def _uv(*words: str) -> None:
    """Run uv, which is installed in an environment of its own."""
    folder = FOLDER / UV.replace("==", "-")
    executable, finished = folder / "bin" / "uv", folder / "finished"
    if not finished.exists():
        venv.create(folder, clear=True, with_pip=True)
        _install([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", UV], folder)
        finished.touch()
    _install([str(executable), *words], folder)


def _install(command: list[str], folder: Path) -> None:
    variables = os.environ | {"UV_CACHE_DIR": str(FOLDER / "cache"), "UV_NATIVE_TLS": "true"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        _absent(f"not installed within {INSTALL_S} s: {' '.join(command)}")
    if done.returncode != 0:
        _absent(f"can't be installed: {' '.join(command)}\n{(done.stderr or done.stdout).strip()[-2000:]}")


def _absent(reason: str) -> NoReturn:
    import pytest  # not at the top: see `program`

    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
