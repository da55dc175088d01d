"""What a request generates: routes note it, and the metrics and traces of the request read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flask import g

from service.engine.handle import Handle


@dataclass(frozen=True)
class Generation:
    """The model that a request uses, and the texts that the engine generates for it."""

    model_name: str  # the full name of the version
    handles: Sequence[Handle]  # empty if the text had been generated before


def note_generation(model_name: str, handles: Sequence[Handle]) -> None:
    """Note what the current request generates."""
    g.generation = Generation(model_name, handles)


def current_generation() -> Generation | None:
    """Return what the current request generates; None if it generates nothing, or was refused before it began."""
    generation: Generation | None = g.get("generation")
    return generation
