"""Stop strings: text is withheld until it is certain that it is not the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STOP_CHARS = 256


def completed(text: str, stops: Sequence[str]) -> str:
    """Return the longest stop string that the text ends with, or an empty string."""
    return max((stop for stop in stops if text.endswith(stop)), key=len, default="")


class StopFilter:
    """Passes a text on in pieces, without the stop string that ends the text.

    Characters that may turn out to be part of a stop string are withheld until that is decided. The engine ends a text
    with the character that completes a stop string. If several stop strings end there, the longest one is removed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._withheld = ""

    def feed(self, text: str) -> str:
        """Add text. Return what can be shown now."""
        if not self._stops:
            return text
        self._withheld += text
        num_shown = len(self._withheld) - self._num_undecided()
        shown, self._withheld = self._withheld[:num_shown], self._withheld[num_shown:]
        return shown

    def end(self, stopped: bool) -> str:
        """Return the rest of the text, which has ended. If a stop string ended it (`stopped`), that is left out."""
        shown, self._withheld = self._withheld, ""
        if stopped:
            shown = shown.removesuffix(completed(shown, self._stops))
        return shown

    def _num_undecided(self) -> int:
        """Return how many of the last characters are a stop string or the beginning of one."""
        longest = max(len(stop) for stop in self._stops)
        for length in range(min(longest, len(self._withheld)), 0, -1):
            tail = self._withheld[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
