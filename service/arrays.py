"""Array types, and copies of hidden states that don't release the interpreter's lock.

numpy releases the lock even to copy 1,024 numbers. On a busy server, waiting to get it back takes far longer than the
copy: these two functions made small requests a third faster (docs/LOG.md).

This module may import nothing of this project.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ids = NDArray[np.int64]  # character ids: indices into a model's charset


def read_state(state: Float32) -> Float32:
    """Return a read-only copy of an (L, H) float32 state."""
    return np.frombuffer(state.tobytes(), np.float32).reshape(state.shape)


def write_state(target: Float32, state: Float32) -> None:
    """Copy an (L, H) float32 state into `target`. Both must have the same shape and be contiguous."""
    target.data.cast("B")[:] = state.data.cast("B")
