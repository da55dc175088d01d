"""How many characters a tick has, and how often a stream is flushed."""

from __future__ import annotations

_TICK_S = 0.005  # the fixed cost of a tick is small beside this, and nobody notices the delay
_MIN_TICK_CHARS = 4  # with hundreds of texts a tick then takes 20 ms: shorter ticks would mostly be fixed cost
_MAX_TICK_CHARS = 256

# A chunk of a stream takes about 50 us of Python. Above this many chunks a second in all streams, chunks get longer
# instead. Without the limit, 256 streams get half as many characters.
_MAX_CHUNKS_PER_S = 1600


class Pace:
    """Chooses how many characters a tick has, so that it takes `tick_s` seconds, from the time of the last one."""

    def __init__(self, tick_s: float = _TICK_S) -> None:
        self._tick_s = tick_s
        self._row_s = 1e-3  # seconds for one character of one row, in a batch of the last size
        self._num_rows = 1

    def num_chars(self, num_rows: int) -> int:
        """Return the number of characters for a batch of num_rows.

        If the batch has grown since the last tick, assumes that its time grows with the number of rows; if it has
        shrunk, assumes that its time stays the same. Both errors make the tick shorter.
        """
        step_s = self._row_s * max(num_rows, self._num_rows)
        return max(_MIN_TICK_CHARS, min(_MAX_TICK_CHARS, round(self._tick_s / step_s)))

    def measured(self, num_rows: int, num_chars: int, duration_s: float) -> None:
        """Record how long a tick of num_chars characters in each of num_rows rows took."""
        row_s = duration_s / (num_rows * num_chars)
        self._row_s = row_s if num_rows != self._num_rows else 0.7 * self._row_s + 0.3 * row_s
        self._num_rows = num_rows


def flush_interval(num_open: int, minimum_s: float) -> float:
    """Return the seconds between two chunks of a stream: minimum_s, or more if the engine has many open texts."""
    return max(minimum_s, num_open / _MAX_CHUNKS_PER_S)
