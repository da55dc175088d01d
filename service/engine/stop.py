"""Stop strings: what has to be held back until it is certain that it isn't the beginning of one."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def completed(text: str, stops: Sequence[str]) -> str:
    """The longest of the stop strings that the text ends with; empty if there is none."""
    return max((stop for stop in _normalised(stops) if text.endswith(stop)), key=len, default="")


class StopFilter:
    """Lets text through piece by piece, but never a character of a stop string.

    What may still become a stop string is held back, and released as soon as it can't. The engine ends a text with the
    character that completes a stop string; of several that end there the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = _normalised(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """Take in more text; what may be shown now."""
        if not self._stops:
            return text
        self._held += text
        num_shown = len(self._held) - self._num_undecided()
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown

    def end(self, stopped: bool) -> str:
        """The text is over: what is left to show. stopped: a stop string was completed; it is not shown."""
        shown, self._held = self._held, ""
        if stopped:
            shown = shown.removesuffix(completed(shown, self._stops))
        return shown

    def _num_undecided(self) -> int:
        """How many of the last characters are a stop string or the start of one."""
        longest = max(len(stop) for stop in self._stops)
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _normalised(stops: Sequence[str]) -> list[str]:
    """In NFC, as models write."""
    return [unicodedata.normalize("NFC", stop) for stop in stops]
