"""Libraries that a server does without, for the commands that need them."""

from __future__ import annotations

from service.errors import MissingLibrary


def require_torch() -> None:
    """Raises MissingLibrary, which says how to get it."""
    try:
        import torch  # noqa: F401 - only whether it can be
    except ImportError as error:
        raise MissingLibrary(
            "this command computes with torch, which is not installed: pip install 'gru-serve[train]', or build the "
            "image with --build-arg WITH_TORCH=1"
        ) from error
