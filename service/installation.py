"""How to add torch to this installation: in a checkout, in the container image, or where the package was installed."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent
_IMAGE_PREFIX = "/opt/gru-serve"  # of Python in the image: see Dockerfile


def how_to_get_torch() -> str:
    """Return what to run, as the end of a sentence."""
    checkout = _PACKAGE.parent
    if sys.prefix == _IMAGE_PREFIX:
        return "build the image with --build-arg WITH_TORCH=1"
    if (checkout / "Makefile").is_file() and (checkout / "pyproject.toml").is_file():
        return f"run make setup in {checkout}"
    return "run pip install torch matplotlib"
