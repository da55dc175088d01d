"""What an engine has done since it was created, as plain numbers. Counting costs its thread 1 to 16 us per tick."""

from __future__ import annotations

from bisect import bisect_left

from service.engine.handle import TextTimes
from service.engine.stepper import FinishReason

_CHARS = (*(digit * 10.0**power for power in range(5) for digit in (1, 2, 5)), 100_000.0)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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


class SubmittedBatch:
    """The texts of one submission: tells when all have ended, and how long the longest became."""

    __slots__ = ("_num_open", "longest")

    def __init__(self, num_texts: int) -> None:
        self._num_open = num_texts
        self.longest = 0  # characters generated

    def ended(self, num_generated: int) -> bool:
        """Note that one text has ended; return whether it was the last."""
        self._num_open -= 1
        self.longest = max(self.longest, num_generated)
        return not self._num_open


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
        # Of each ended text with max_chars > 0. A text that never got so far has no such time.
        self.queue_s = Buckets(_SECONDS)  # from its submission to its first tick
        self.prefill_s = Buckets(_SECONDS)  # from there to its first character
        self.decode_s = Buckets(_SECONDS)  # from there to its end
        self.prompt_chars = Buckets(_CHARS)  # that were read; cached ones are not
        self.generated_chars = Buckets(_CHARS)
        self.longest_generated = Buckets(_CHARS)  # of each submission, characters of its longest text

    def ticked(self, num_rows: int, num_read: int, num_generated: int, duration_s: float) -> None:
        """Count a tick."""
        self.num_read += num_read
        self.num_generated += num_generated
        self.batch.add(num_rows)
        self.tick_s.add(duration_s)

    def ended(self, reason: FinishReason | None, num_prompt: int, num_generated: int, times: TextTimes) -> None:
        """Count the end of a text with max_chars > 0."""
        self.ends[reason] += 1
        self.prompt_chars.add(num_prompt)
        self.generated_chars.add(num_generated)
        if times.started is not None:
            self.queue_s.add(times.started - times.submitted)
            if times.first is not None and times.ended is not None:
                self.prefill_s.add(times.first - times.started)
                self.decode_s.add(times.ended - times.first)
