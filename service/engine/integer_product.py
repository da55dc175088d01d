"""Products of int8 matrices through torch, exact on every processor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EXACT_FLOAT32 = 2**24  # float32 holds every integer up to here


class IntegerProduct:
    """Left (B, K) int8 times weight.T, weight (N, K) int8 -> (B, N) int32, without rounding and without overflow.

    torch._int_mm is fast where the processor multiplies bytes into 32 bits. Where it is missing, or goes through
    products that saturate at 16 bits, the same integers are multiplied as floats: slower, and exact too, because
    every partial sum is an integer that a float holds.
    """

    def __init__(self, weight: NDArray[np.int8]) -> None:
        self._rows = torch.from_numpy(np.ascontiguousarray(weight))
        self._columns = self._rows.t().contiguous()  # this layout is three times faster for many rows, slower for one
        largest = 127 * int(np.abs(weight.astype(np.int16)).sum(axis=1).max(initial=0))
        self._floats: Tensor | None = None
        if not self._is_exact():
            self._floats = self._columns.to(torch.float32 if largest < _EXACT_FLOAT32 else torch.float64)

    def __call__(self, left: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, K) int8 within +-127 -> (B, N) int32, in `out` if it is given."""
        if out is None:
            out = torch.empty((len(left), self._columns.shape[1]), dtype=torch.int32)
        if self._floats is not None:
            return out.copy_(left.to(self._floats.dtype) @ self._floats)
        return torch._int_mm(left, self._rows.t() if len(left) == 1 else self._columns, out=out)

    def _is_exact(self) -> bool:
        """Try it on what saturates most easily: states at their limits, of equal and of opposite signs."""
        columns = self._rows.shape[1]
        alternating = torch.where(torch.arange(columns) % 2 == 0, 127, -127)
        signs = torch.where(self._rows[0] >= 0, 127, -127)
        trial = torch.stack([torch.full((columns,), 127), alternating, signs]).to(torch.int8)
        expected = (trial.double() @ self._columns.double()).to(torch.int32)
        try:
            return torch.equal(torch._int_mm(trial, self._columns), expected) and all(
                torch.equal(torch._int_mm(trial[i : i + 1], self._rows.t()), expected[i : i + 1]) for i in range(3)
            )
        except (RuntimeError, AttributeError):  # not for this processor, not in this build of torch
            return False
