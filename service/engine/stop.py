"""Stop strings: where a text ends, and what has to be held back until it is certain that it doesn't end there."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


class StopFilter:
    """Lets characters through one by one, but never a character of a stop string.

    What may still become a stop string is held back, and released as soon as it can't. Of several that end at the same
    character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # In NFC, as models write.
        self._stops = sorted((unicodedata.normalize("NFC", stop) for stop in stops), key=len, reverse=True)
        self._held = ""
        self.stopped = False

    def feed(self, char: str) -> str:
        """Take in one character; what may be shown now. After a stop string: `stopped`, and nothing more is shown."""
        if self.stopped:
            return ""
        self._held += char
        for stop in self._stops:
            if self._held.endswith(stop):
                self.stopped = True
                shown, self._held = self._held[: -len(stop)], ""
                return shown
        keep = self._longest_start()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text is over: what was held back, if it didn't become a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _longest_start(self) -> int:
        """How many of the last characters are the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
