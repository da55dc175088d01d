"""What an engine has done so far: plain numbers, which cost its thread a microsecond a tick."""

from __future__ import annotations

from bisect import bisect_left

from service.engine.stepper import FinishReason


class Buckets:
    """How many values lie up to each of some bounds, and above them all. total: their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """TextChunk by whoever holds the stepper; who reads meanwhile may see one number a tick older than another.

    num_read, num_generated: characters of prompts and fed texts, and of continuations. ends: continuations by why they
    ended; None: cancelled, or the engine failed. batch: texts in each tick. tick_s: how long it took.
    """

    def __init__(self) -> None:
        self.num_read = self.num_generated = 0
        self.ends: dict[FinishReason | None, int] = {"stop": 0, "length": 0, None: 0}
        self.batch = Buckets((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))
        self.tick_s = Buckets((0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 10))

    def ticked(self, num_rows: int, num_read: int, num_generated: int, duration_s: float) -> None:
        """Count a tick."""
        self.num_read += num_read
        self.num_generated += num_generated
        self.batch.add(num_rows)
        self.tick_s.add(duration_s)

    def ended(self, reason: FinishReason | None) -> None:
        """Count a continuation."""
        self.ends[reason] += 1
