"""How many characters a tick has, and how often a stream is flushed."""

from __future__ import annotations

TICK_S = 0.005  # the fixed cost of a tick is small beside this, and nobody notices the delay
# While clients share the engine. A client that is served again waits for the end of another one's tick first.
SHARED_TICK_S = TICK_S / 2
# With hundreds of texts a tick then takes up to 20 ms. Half as many characters would take 2 to 4 % of the speed.
_MIN_TICK_CHARS = 4
_MAX_TICK_CHARS = 256
_MIN_TICK_ROWS = 16  # smaller batches would use the processor badly

# A chunk of a stream takes about 50 us of Python. Above this many chunks a second in all streams, chunks get longer
# instead. Without the limit, 256 streams get half as many characters.
_MAX_CHUNKS_PER_S = 1600


class Pace:
    """Chooses how many characters a tick has, so that it takes `tick_s` seconds, from the time of earlier ones."""

    def __init__(self) -> None:
        # Seconds for one character of one row, and the number of rows of the batch in which that was measured: of the
        # last batch of each order of magnitude, because ticks of different clients may take turns.
        self._measured: dict[int, tuple[float, int]] = {}
        self._last = (1e-3, 1)

    def num_chars(self, num_rows: int, tick_s: float = TICK_S) -> int:
        """Return the number of characters for a batch of num_rows.

        If the batch is larger than the one that was measured, assumes that its time grows with the number of rows; if
        it is smaller, assumes that its time is the same. Both errors make the tick shorter.
        """
        row_s, num_measured = self._measured.get(num_rows.bit_length(), self._last)
        step_s = row_s * max(num_rows, num_measured)
        return max(_MIN_TICK_CHARS, min(_MAX_TICK_CHARS, round(tick_s / step_s)))

    def measured(self, num_rows: int, num_chars: int, duration_s: float) -> None:
        """Record how long a tick of num_chars characters in each of num_rows rows took."""
        row_s = duration_s / (num_rows * num_chars)
        before_s, num_before = self._measured.get(num_rows.bit_length(), (row_s, num_rows))
        self._last = (row_s if num_rows != num_before else 0.7 * before_s + 0.3 * row_s), num_rows
        self._measured[num_rows.bit_length()] = self._last

    def num_rows(self, tick_s: float) -> int:
        """Return the number of rows with which the shortest tick takes about `tick_s`."""
        row_s, _ = self._measured[max(self._measured)] if self._measured else self._last
        return max(_MIN_TICK_ROWS, round(tick_s / (_MIN_TICK_CHARS * row_s)))


def flush_interval(crowd: int, minimum_s: float) -> float:
    """Return the seconds between two chunks of a stream: minimum_s, or more in a large crowd, see `Engine.crowd_of`."""
    return max(minimum_s, crowd / _MAX_CHUNKS_PER_S)
