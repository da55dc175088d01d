"""Starts another library in a process of its own and talks to it. See `worker` for its side."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.environment import Skipped, reason

_ROOT = Path(__file__).parent.parent.parent
_WARMUP_S = 0.01
_TOLERANCE = 1e-3  # of logits: libraries sum float32 in different orders


class Peer:
    """The process of a worker's command, which gets the model's directory and a number of threads as arguments.

    It computes only during its turns, and ends with the `with` block. All methods raise Skipped if it has ended early.
    """

    def __init__(self, worker: Sequence[str], directory: Path, threads: int) -> None:
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 it is closed when the process has ended
        self._process = subprocess.Popen(
            [*worker, str(directory.resolve()), str(threads)],
            cwd=_ROOT,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def check(self, text: str, expected: NDArray[np.float32], rows: Sequence[int]) -> None:
        """Compare the logits after a text with `expected`, (V,), and run a short warm-up with each number of rows.

        Raises Skipped if the logits differ.
        """
        logits = np.array(self._ask({"text": text})["logits"])
        if logits.shape != expected.shape or not np.allclose(logits, expected, atol=_TOLERANCE):
            raise Skipped("its logits are not the model's")
        for num_rows in rows:
            self.chars_per_s(num_rows, _WARMUP_S)

    def chars_per_s(self, num_rows: int, seconds: float) -> float:
        """Generate `num_rows` texts for a number of seconds, and return the characters/s of all together."""
        return float(self._ask({"rows": num_rows, "seconds": seconds})["chars_per_s"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self._errors.seek(0)
            raise Skipped(reason(self._errors.read())) from error
        return answer
