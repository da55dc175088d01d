"""What an engine has done since it was created, as plain numbers. Counting costs its thread 1 to 16 us per tick."""

from __future__ import annotations

from bisect import bisect_left

from service.engine.stepper import FinishReason


class Buckets:
    """A histogram: how many values were at most each bound, and how many were above the last."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0  # sum of the values

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """Written by the thread that holds the stepper, read by any thread.

    A reader may see one number from a tick earlier than another.
    """

    def __init__(self) -> None:
        self.num_read = 0  # characters of prompts and of fed text
        self.num_generated = 0
        # Ended texts with max_chars > 0, by reason. None: cancelled, or the engine failed.
        self.ends: dict[FinishReason | None, int] = {"stop": 0, "length": 0, None: 0}
        self.batch = Buckets((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))  # texts in a tick
        # Seconds that a tick took.
        self.tick_s = Buckets((0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 10))

    def ticked(self, num_rows: int, num_read: int, num_generated: int, duration_s: float) -> None:
        """Count a tick."""
        self.num_read += num_read
        self.num_generated += num_generated
        self.batch.add(num_rows)
        self.tick_s.add(duration_s)

    def ended(self, reason: FinishReason | None) -> None:
        """Count the end of a text with max_chars > 0."""
        self.ends[reason] += 1
