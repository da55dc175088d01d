"""Memory for a great many arrays of one shape, without an allocation for each."""

from __future__ import annotations

import numpy as np

from service.arrays import Float32, write_state

_BLOCK_BYTES = 2**24


class Slab:
    """Slots for (L, H) float32 states, in blocks that are never moved. Not safe for several threads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._block_slots = max(1, _BLOCK_BYTES // (4 * int(np.prod(shape))))
        self._blocks: list[Float32] = []
        self._num_used = 0  # slots that were ever in use: the first ones
        self._free: list[int] = []  # of these

    def put(self, hidden: Float32) -> int:
        """Copy a state into a free slot; its number."""
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._num_used = self._num_used, self._num_used + 1
            if slot == len(self._blocks) * self._block_slots:
                # The system hands out the memory only as it is written to.
                self._blocks.append(np.empty((self._block_slots, *self._shape), np.float32))
        write_state(self.view(slot), hidden)
        return slot

    def view(self, slot: int) -> Float32:
        """The state in a slot, as it is and will be."""
        block, place = divmod(slot, self._block_slots)
        view: Float32 = self._blocks[block][place]
        return view

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)
