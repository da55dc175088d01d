"""Portable states that are no longer what was sealed."""

from __future__ import annotations

import random

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.=+/ \n\0é"


def changed(good: str, chance: random.Random) -> str:
    """Return the state with a character changed, dropped or added, or with its pieces in another order."""
    place, other = chance.randrange(len(good)), chance.randrange(len(good))
    new = chance.choice(ALPHABET)
    return chance.choice(
        [
            good[:place] + new + good[place + 1 :],
            good[:place] + good[place + 1 :],
            good[:place] + new + good[place:],
            good[:place],
            good[min(place, other) : max(place, other)],
            good[place:] + good[:place],
            good + good[place:],
            good[: min(place, other)] + good[max(place, other) :],
        ]
    )
