"""How long a tick is."""

from __future__ import annotations

_TICK_S = 0.005  # long enough that what a tick costs beside its steps is small, short enough that nobody notices it
_MIN_TICK_CHARS = 4  # with hundreds of texts: rather a tick of 20 ms than what it costs beside its steps at every one
_MAX_TICK_CHARS = 256


class Pace:
    """How many characters a tick should have to last about `tick_s` seconds, from what the last one took."""

    def __init__(self, tick_s: float = _TICK_S) -> None:
        self._tick_s = tick_s
        self._row_s = 1e-3  # seconds for one character of one row, in a batch like the last one
        self._num_rows = 1

    def num_chars(self, num_rows: int) -> int:
        """For a batch of this size. A larger batch than the last counts as if rows shared nothing, a smaller one as if
        they shared everything: both err towards a short tick.
        """
        step_s = self._row_s * max(num_rows, self._num_rows)
        return max(_MIN_TICK_CHARS, min(_MAX_TICK_CHARS, round(self._tick_s / step_s)))

    def measured(self, num_rows: int, num_chars: int, duration_s: float) -> None:
        """A tick of this many characters a row has taken so long."""
        row_s = duration_s / (num_rows * num_chars)
        self._row_s = row_s if num_rows != self._num_rows else 0.7 * self._row_s + 0.3 * row_s
        self._num_rows = num_rows
