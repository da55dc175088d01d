"""How much memory transcripts take that share what they have in common."""

from __future__ import annotations

import sys

from service.sessions.transcript import Segment, Transcript

_SEGMENT_BYTES = 256  # what a segment takes beside its state and its text


class SharedSegments:
    """Counts the holders of each segment. num_bytes: of all segments that have any, each once. Not for several threads."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._num_holders: dict[Segment, int] = {}

    def hold(self, transcript: Transcript) -> None:
        """One more session has this transcript."""
        for segment in transcript.segments:
            num_holders = self._num_holders.get(segment, 0)
            self._num_holders[segment] = num_holders + 1
            self.num_bytes += 0 if num_holders else _num_bytes(segment)

    def let_go(self, transcript: Transcript) -> None:
        """One less."""
        for segment in transcript.segments:
            self._num_holders[segment] -= 1
            if not self._num_holders[segment]:
                del self._num_holders[segment]
                self.num_bytes -= _num_bytes(segment)

    def would_add(self, transcript: Transcript) -> int:
        """Bytes that a transcript has which no other one has yet."""
        return sum(_num_bytes(segment) for segment in transcript.segments if segment not in self._num_holders)


def _num_bytes(segment: Segment) -> int:
    return _SEGMENT_BYTES + segment.hidden.nbytes + sys.getsizeof(segment.text)
