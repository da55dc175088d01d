"""The process of another library: it waits for a turn, generates for a while, and reports its speed.

It reads a JSON document from each line of standard input and answers with a line on standard output. The first
document is {"text": ...}, answered with {"logits": ...} after the text. Each turn is {"rows": ..., "seconds": ...},
answered with {"chars_per_s": ...}. The process ends when its input ends.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

_STEPS = 8  # characters of each text between two readings of the clock


class Worker(ABC):
    """The model in another library."""

    @abstractmethod
    def logits(self, text: str) -> list[float]:
        """Return the logits (V,) after a text that is read from the zero state."""

    @abstractmethod
    def generator(self, num_rows: int) -> Callable[[], object]:
        """Return a function that generates one character for each of `num_rows` texts."""

    def serve(self) -> None:
        """Answer the documents on standard input until it ends."""
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
