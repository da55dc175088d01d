"""Copies of states, made without giving the interpreter's lock away.

numpy would release it to copy 1,024 numbers, and where other threads want it, getting it back takes far longer than the
copy: small requests to a busy server gained a third by these few lines (docs/LOG.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def read_state(state: Float32) -> Float32:
    """A copy of an (L, H) state, which can't be written to."""
    return np.frombuffer(state.tobytes(), np.float32).reshape(state.shape)


def write_state(place: Float32, state: Float32) -> None:
    """Copy an (L, H) state to a place of the same shape; both have to be contiguous."""
    place.data.cast("B")[:] = state.data.cast("B")
