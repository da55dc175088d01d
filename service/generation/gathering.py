"""How long a stream gathers characters into one piece."""

from __future__ import annotations

from service.engine.engine import Engine

# Every piece wakes a thread, for which the engine's stops: above this many in all, pieces become longer instead.
_MAX_PIECES_PER_S = 800


def gathering_s(engine: Engine, least_s: float) -> float:
    """Seconds between two pieces of a text: least_s, or longer if the engine is busy."""
    return max(least_s, engine.num_open / _MAX_PIECES_PER_S)
