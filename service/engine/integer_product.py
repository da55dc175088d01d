"""Exact products of int8 matrices through torch, on every processor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EXACT_FLOAT32 = 2**24  # float32 holds every integer up to this one


class IntegerProduct:
    """Multiplies (B, K) int8 with the transpose of an (N, K) int8 weight, without rounding or overflow.

    torch._int_mm is fast if the processor adds products of bytes in 32 bits. If this build of torch lacks it, or its
    sums saturate at 16 bits, the integers are multiplied as floats instead. That is slower, but also exact, because a
    float holds every partial sum.
    """

    def __init__(self, weight: NDArray[np.int8]) -> None:
        self._rows = torch.from_numpy(np.ascontiguousarray(weight))
        self._columns = self._rows.t().contiguous()  # this layout is three times faster for many rows, slower for one
        largest = 127 * int(np.abs(weight.astype(np.int16)).sum(axis=1).max(initial=0))
        self._floats: Tensor | None = None
        if not self._is_exact():
            self._floats = self._columns.to(torch.float32 if largest < _EXACT_FLOAT32 else torch.float64)

    def __call__(self, left: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply (B, K) int8 within +-127. Return (B, N) int32, in `out` unless that is None."""
        if out is None:
            out = torch.empty((len(left), self._columns.shape[1]), dtype=torch.int32)
        if self._floats is not None:
            return out.copy_(left.to(self._floats.dtype) @ self._floats)
        return torch._int_mm(left, self._rows.t() if len(left) == 1 else self._columns, out=out)

    def _is_exact(self) -> bool:
        """Return whether torch._int_mm is exact, tried on states at their limits, of equal and of opposite signs."""
        columns = self._rows.shape[1]
        alternating = torch.where(torch.arange(columns) % 2 == 0, 127, -127)
        signs = torch.where(self._rows[0] >= 0, 127, -127)
        trial = torch.stack([torch.full((columns,), 127), alternating, signs]).to(torch.int8)
        expected = (trial.double() @ self._columns.double()).to(torch.int32)
        try:
            return torch.equal(torch._int_mm(trial, self._columns), expected) and all(
                torch.equal(torch._int_mm(trial[i : i + 1], self._rows.t()), expected[i : i + 1]) for i in range(3)
            )
        except (RuntimeError, AttributeError):  # not implemented for this processor or in this build of torch
            return False
