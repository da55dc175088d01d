"""Virtual environments of other libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_INSTALL_S = 1800


class Skipped(Exception):
    """A library can't take part; the message says why."""


def environment(name: str) -> Path:
    """The interpreter of `.venv-<name>`, which is made at the first call from the pinned requirements. Raises Skipped.

    A copy of the requirements marks what is complete, so a change of them or a failed attempt makes it install again.
    """
    requirements = _HERE / f"requirements-{name}.txt"
    folder = _HERE / f".venv-{name}"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return python
    print(f"installing {name} into {folder.name}", file=sys.stderr)
    pip = [str(python), "-m", "pip", "install", "-q", "--retries", "0", "--timeout", "10"]
    # The requirements name everything that is installed, so nothing else is to come along.
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "--no-deps", "-r", str(requirements)]):
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
    """The line by which a failed program says why: the last one with an error in it, or else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith(" ")]
    return (errors or lines or ["it said nothing"])[-1]
