"""Types of arrays, and copies of hidden states that keep the interpreter's lock.

numpy releases the lock to copy 1,024 numbers. On a busy server getting it back takes far longer than the copy: these
two functions made small requests a third faster (docs/LOG.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ids = NDArray[np.int64]  # of characters: indices into a model's charset


def read_state(state: Float32) -> Float32:
    """Return a read-only copy of an (L, H) state."""
    return np.frombuffer(state.tobytes(), np.float32).reshape(state.shape)


def write_state(place: Float32, state: Float32) -> None:
    """Copy an (L, H) state into `place`, which has the same shape. Both must be contiguous."""
    place.data.cast("B")[:] = state.data.cast("B")
