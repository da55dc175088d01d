"""The far side of a comparison: a process that waits for its turn, generates for a while, and tells how fast.

One JSON document a line. On standard input first {"text": ...}, answered by the logits after it; then
{"rows": ..., "seconds": ...} for each turn, answered by {"chars_per_s": ...}. The end of the input ends it.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

_STEPS = 8  # between two looks at the clock


class Worker(ABC):
    """A library that steps the model."""

    @abstractmethod
    def logits(self, text: str) -> list[float]:
        """(V,) logits of what follows the text, read from the zero state."""

    @abstractmethod
    def generator(self, num_rows: int) -> Callable[[], object]:
        """A function that generates one character for each of the texts."""

    def serve(self) -> None:
        """Answer until the input ends."""
        _answer({"logits": self.logits(json.loads(sys.stdin.readline())["text"])})
        generators: dict[int, Callable[[], object]] = {}
        for line in sys.stdin:
            turn = json.loads(line)
            num_rows = turn["rows"]
            step = generators.get(num_rows) or generators.setdefault(num_rows, self.generator(num_rows))
            _answer({"chars_per_s": num_rows * _steps_per_s(step, turn["seconds"])})


def _steps_per_s(step: Callable[[], object], seconds: float) -> float:
    num_steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for _ in range(_STEPS):
            step()
        num_steps += _STEPS
    return num_steps / elapsed


def _answer(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)
