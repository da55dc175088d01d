"""The virtual environments of other libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_INSTALL_S = 1800


class Skipped(Exception):
    """A library can't be compared with. The message says why."""


def environment(name: str) -> Path:
    """Return the Python interpreter of `.venv-<name>`. The first call installs the pinned requirements in it.

    A copy of the requirements is written when the installation is complete. If it is missing or differs, because an
    attempt failed or the requirements changed, they are installed again. Raises Skipped if that fails.
    """
    requirements = _HERE / f"requirements-{name}.txt"
    folder = _HERE / f".venv-{name}"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return python
    print(f"installing {name} into {folder.name}", file=sys.stderr)
    # This interpreter's pip installs into the other environment: to install pip itself there takes seconds.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--retries", "0", "--timeout", "10"]
    # --no-deps, because the requirements already list all dependencies.
    create = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    for command in (create, [*pip, "--no-deps", "-r", str(requirements)]):
        _run(command)
    installed.write_text(requirements.read_text())
    return python


def _run(command: list[str]) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        subprocess.run(command, env=clean, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.CalledProcessError as error:
        raise Skipped(reason(error.stderr or error.stdout)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skipped(str(error)) from error


def reason(text: str) -> str:
    """Return the line of a failed program's output that says why: the last with "error" in it, or else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith(" ")]
    return (errors or lines or ["it failed without a message"])[-1]
