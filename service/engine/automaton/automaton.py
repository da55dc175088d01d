"""The tables of a deterministic automaton over the characters of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.arrays import Int32

# "Fewest characters" where no transition is left. No number of characters reaches it.
NEVER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Automaton:
    """Says for a text that is generated which characters may come next, and where it ends. It never changes.

    The text that was generated so far leads from state 0 to one state. From every state a text that may end can be
    reached, so a text that follows the transitions can always be completed.
    """

    classes: Int32  # (V,): the class of each character, from 0 to C - 1
    transitions: Int32  # (S, C): the next state; -1 if no character of the class may come next
    fewest: Int32  # (S,): the fewest characters that complete a text from here. 0: the text may end here.
    # (S,): the characters of the longest stop string that is complete here, which ends the text. 0: none is.
    stop_chars: Int32
    # (S,): how many of the last characters may turn out to belong to a stop string, complete ones included.
    withheld: Int32

    @property
    def num_states(self) -> int:
        """S, the number of states."""
        return len(self.fewest)

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        tables = (self.classes, self.transitions, self.fewest, self.stop_chars, self.withheld, self.fewest_after)
        return sum(table.nbytes for table in tables)

    @cached_property
    def is_sound(self) -> bool:
        """Whether the tables fit together, so that following them never leaves them."""
        num_states = self.num_states
        per_state = (self.fewest, self.stop_chars, self.withheld)
        if not num_states or self.classes.ndim != 1 or self.transitions.ndim != 2:
            return False
        if any(table.shape != (num_states,) for table in per_state) or len(self.transitions) != num_states:
            return False
        if any(table.dtype != np.int32 for table in (self.classes, self.transitions, *per_state)):
            return False
        classes, following = self.classes, self.transitions
        return bool(
            classes.min(initial=0) >= 0
            and classes.max(initial=0) < following.shape[1]
            and following.min() >= -1
            and following.max() < num_states
        )

    @cached_property
    def restricts(self) -> bool:
        """Whether some character may not come next somewhere. Stop strings alone restrict nothing."""
        return bool((self.transitions < 0).any() or self.fewest.any())

    @cached_property
    def fewest_after(self) -> Int32:
        """(S,): the fewest characters that complete a text from here if it has to get longer; NEVER if it can't."""
        after = np.where(self.transitions < 0, NEVER - 1, self.fewest[self.transitions])
        return np.asarray(np.minimum(after.min(axis=1, initial=NEVER - 1), NEVER - 1) + 1, np.int32)

    def next_state(self, state: int, char: int) -> int:
        """Return the state after one more character; -1 if it is not allowed."""
        return int(self.transitions[state, self.classes[char]])

    def walk(self, state: int, chars: Iterable[int]) -> int:
        """Return the state after more characters; -1 if one of them is not allowed."""
        ids = np.fromiter(chars, np.int64)
        for char_class in self.classes[ids].tolist():
            if state < 0:
                break
            state = self.transitions.item(state, char_class)
        return state

    def allowed(self, state: int, num_left: int) -> NDArray[np.bool_]:
        """Return (V,): which characters may come next if the text may get `num_left` more, this one included.

        A character is not allowed either if the text could not be completed within the rest.
        """
        following = self.transitions[state]
        by_class = (following >= 0) & (self.fewest[following] < num_left)
        return np.asarray(by_class[self.classes])

    def ends(self, state: int, num_left: int) -> bool:
        """Whether a text that may get `num_left` more characters is over: it is complete, and nothing may come next.

        Not where only `num_left` = 0 forbids more: that text ends by its length.
        """
        after = int(self.fewest_after[state])
        return after == NEVER or 0 < num_left < after
