"""How long a stream gathers characters into one piece."""

from __future__ import annotations

from service.engine.engine import Engine

# Every piece takes Python's time, some 50 us of it: above this many in all, pieces become longer instead. Without a
# limit 256 streams get half of the characters.
_MAX_PIECES_PER_S = 1600


def gathering_s(engine: Engine, least_s: float) -> float:
    """Seconds between two pieces of a text: least_s, or longer if the engine is busy."""
    return max(least_s, engine.num_open / _MAX_PIECES_PER_S)
