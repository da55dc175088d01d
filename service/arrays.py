"""Array types, and what is done with hidden states without releasing the interpreter's lock.

numpy releases the lock even to copy 1,024 numbers. On a busy server, waiting to get it back takes far longer than the
copy: the two functions that copy made small requests a third faster (docs/LOG.md).

This module may import nothing of this project.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Ids = NDArray[np.int64]  # character ids: indices into a model's charset

# Characters that a text may have. Every client reads JSON integers up to this one exactly, and positions can't overflow
# the kernel's int64.
MAX_POSITION = 2**53
_PIECE = 500  # numbers of a state in one numpy call: for more than that numpy releases the interpreter's lock


def read_state(state: Float32) -> Float32:
    """Return a read-only copy of an (L, H) float32 state."""
    return np.frombuffer(state.tobytes(), np.float32).reshape(state.shape)


def write_state(target: Float32, state: Float32) -> None:
    """Copy an (L, H) float32 state into `target`. Both must have the same shape and be contiguous."""
    target.data.cast("B")[:] = state.data.cast("B")


def is_state(state: Float32) -> bool:
    """Whether a GRU can have the numbers of this contiguous array as its state: all are within -1 to 1."""
    numbers = state.ravel()
    parts = (numbers[start : start + _PIECE] for start in range(0, numbers.size, _PIECE))
    return all(part.max() <= 1 and part.min() >= -1 for part in parts)
