"""How much memory transcripts take that share what they have in common."""

from __future__ import annotations

import sys

from service.sessions.transcript import Block, Transcript

_BLOCK_BYTES = 256  # what a block takes beside its state and its text


class SharedBlocks:
    """Counts the holders of each block. num_bytes: of all blocks that have any, each once. Not for several threads."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._num_holders: dict[Block, int] = {}

    def hold(self, transcript: Transcript) -> None:
        """One more session has this transcript."""
        for block in transcript.blocks:
            num_holders = self._num_holders.get(block, 0)
            self._num_holders[block] = num_holders + 1
            self.num_bytes += 0 if num_holders else _num_bytes(block)

    def let_go(self, transcript: Transcript) -> None:
        """One less."""
        for block in transcript.blocks:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                del self._num_holders[block]
                self.num_bytes -= _num_bytes(block)

    def would_add(self, transcript: Transcript) -> int:
        """Bytes that a transcript has which no other one has yet."""
        return sum(_num_bytes(block) for block in transcript.blocks if block not in self._num_holders)


def _num_bytes(block: Block) -> int:
    return _BLOCK_BYTES + block.hidden.nbytes + sys.getsizeof(block.text)
