"""Stop strings as an automaton, alone or after a text of some form.

Alone they are the automaton of Aho and Corasick (1975), which allows everything and knows where a stop string is
complete. After a form, they are allowed only where the text before them is complete and may continue: where nothing may
follow, the text ends by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from service.arrays import Ids, Int32
from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.automaton.automaton_cache import AutomatonCache
from service.engine.automaton.budget import MAX_TABLE_BYTES
from service.errors import InvalidValue

MAX_STOPS = 132  # as many as a request may have strings and ids
MAX_STOP_CHARS = 256  # of one stop string

_MAX_ALL_CHARS = 8192  # of all stop strings of a text together
_MAX_STEPS = 300_000  # of the construction
_MAX_NEW_STATES = 20_000  # beside those of the form: some 0.2 s of processor time

_Nodes = tuple[int, ...]  # nodes of the trie, in rising order: how far stop strings may have come

_cache = AutomatonCache(16 * 2**20)


def with_stops(form: Automaton | None, stops: Sequence[Ids], vocab_size: int) -> Automaton | None:
    """Return the automaton of the texts that have a form and may end with a stop string after it.

    Args:
        form: what the text before the stop string has to be; None: anything. Then nothing is forbidden, and the
            automaton only tells where a stop string is complete, also if the text continues after it. Each of its
            classes has a character, as in the automata of `compile_form`.
        stops: (n,) int64 ids of each stop string, n > 0.
        vocab_size: V, the characters of the model.

    Returns the form itself if there are no stop strings. Any thread may call; what was used lately takes no time.

    Raises InvalidValue: there are too many stop strings, or too long ones, or together with this form they need too
    large an automaton; and Overloaded: too many others wait to be compiled.
    """
    if not stops:
        return form
    check_stops(stops, vocab_size)
    distinct = tuple(sorted({stop.astype(np.int64).tobytes() for stop in stops}))
    # Only this cache may still have the form.
    key_bytes = sum(map(len, distinct)) + (form.num_bytes if form is not None else 0)

    def make() -> Automaton:
        return _Construction(form, [np.frombuffer(stop, np.int64) for stop in distinct], vocab_size).automaton()

    return _cache.get((form, distinct, vocab_size), key_bytes, make)


def check_stops(stops: Sequence[Ids], vocab_size: int) -> None:
    """Raise InvalidValue unless these are stop strings that a text may have."""
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > _MAX_ALL_CHARS or not all(map(len, stops)):
        raise InvalidValue(
            f"stop: at most {MAX_STOPS} strings, not empty, of together {_MAX_ALL_CHARS} characters", param="stop"
        )
    if any(stop.min() < 0 or stop.max() >= vocab_size for stop in stops):
        raise InvalidValue("stop: a character that the model doesn't have", param="stop")


@dataclass(frozen=True)
class _Trie:
    """The beginnings of stop strings. Node 0 is the empty one; the nodes of a string have rising numbers."""

    children: list[dict[int, int]]  # by class
    depths: list[int]
    is_stop: list[bool]
    heights: list[int]  # the fewest characters that complete a stop string

    @classmethod
    def of(cls, stops: Sequence[list[int]]) -> _Trie:
        trie = cls([{}], [0], [False], [])
        for stop in stops:
            node = 0
            for char in stop:
                following = trie.children[node].get(char)
                if following is None:
                    following = trie.children[node][char] = len(trie.depths)
                    trie.children.append({})
                    trie.depths.append(trie.depths[node] + 1)
                    trie.is_stop.append(False)
                node = following
            trie.is_stop[node] = True
        trie.heights.extend([NEVER] * len(trie.depths))
        for node in reversed(range(len(trie.depths))):  # children have larger numbers
            below = min((trie.heights[child] + 1 for child in trie.children[node].values()), default=NEVER)
            trie.heights[node] = 0 if trie.is_stop[node] else below
        return trie


class _Construction:
    """The subset construction over a form and a trie: a state is one of the form and nodes of the trie.

    A text leads to the form's state, if it has this form so far, and to the nodes of all stop strings that may have
    begun where it was complete.
    """

    def __init__(self, form: Automaton | None, stops: Sequence[Ids], vocab_size: int) -> None:
        self._is_free = form is None
        chars = np.unique(np.concatenate(stops))
        base = np.zeros(vocab_size, np.int32) if form is None else form.classes.astype(np.int32)
        # Characters of stop strings are classes of their own; the others keep those of the form.
        merged = base.copy()
        merged[chars] = base.max() + 1 + np.arange(len(chars), dtype=np.int32)
        _, first, classes = np.unique(merged, return_index=True, return_inverse=True)
        self._classes: Int32 = classes.astype(np.int32)
        self._class_of_char = {int(char): int(self._classes[char]) for char in chars}
        # (F + 1, C): the form's transitions. The last row is for texts that don't have the form any more.
        moves = np.zeros((1, 1), np.int32) if form is None else form.transitions
        self._moves = np.concatenate([moves[:, base[first]], np.full((1, len(first)), -1, np.int32)])
        self._dead = len(moves)
        self._fewest: list[int] = [*([0] if form is None else form.fewest.tolist()), NEVER]
        self._may_stop = ((np.array(self._fewest) == 0) & (self._moves >= 0).any(axis=1)).tolist()
        self._trie = _Trie.of([[self._class_of_char[char] for char in stop.tolist()] for stop in stops])
        self._states: dict[tuple[int, _Nodes], int] = {}
        self._pending: list[tuple[int, _Nodes]] = []  # the states in the order of their numbers
        self._steps = 0

    def automaton(self) -> Automaton:
        pending = self._pending
        for state in range(self._dead):  # the form's states keep their numbers
            self._states[state, ()] = state
            pending.append((state, ()))
        self._base = self._moves[:-1].copy()
        starts = self._trie.children[0].items()
        for state in np.flatnonzero(self._may_stop).tolist():
            for char, node in starts:
                self._base[state, char] = self._number(int(self._moves[state, char]), (node,))
        rows = [self._row(*key) for key in islice(pending, self._dead, None)]  # which adds to them
        transitions = np.concatenate([self._base, *(row[None] for row in rows)])
        trie = self._trie
        stop_chars, withheld = np.zeros(len(pending), np.int32), np.zeros(len(pending), np.int32)
        for place, (_, nodes) in enumerate(pending[self._dead :], self._dead):
            stop_chars[place] = max((trie.depths[node] for node in nodes if trie.is_stop[node]), default=0)
            withheld[place] = max(trie.depths[node] for node in nodes)
        fewest = np.array([self._fewest[state] for state, _ in pending], np.int32)
        for place, (_, nodes) in enumerate(pending[self._dead :], self._dead):
            # Before a stop string can begin, the form is complete: there is no shorter way through both.
            fewest[place] = min(int(fewest[place]), *(trie.heights[node] for node in nodes))
        made = Automaton(self._classes, transitions, fewest, stop_chars, withheld)
        for table in (made.classes, made.transitions, made.fewest, stop_chars, withheld):
            table.flags.writeable = False
        return made

    def _row(self, state: int, nodes: _Nodes) -> Int32:
        """Return the (C,) transitions of a state that has nodes. Gives numbers to the states that are new."""
        self._spend(1 + len(nodes))
        children, may_stop = self._trie.children, self._may_stop[state]
        if not self._is_free and any(self._trie.is_stop[node] for node in nodes):
            return np.full(self._moves.shape[1], -1, np.int32)  # the text has ended
        # As without the nodes, but for the characters with which one of them continues.
        row: Int32 = (self._base[state] if state != self._dead else self._moves[state]).copy()
        continued: dict[int, list[int]] = {}
        for node in nodes:
            for char, child in children[node].items():
                continued.setdefault(char, []).append(child)
        for char, following in continued.items():
            if may_stop and char in children[0]:
                following.append(children[0][char])
            self._spend(len(following))
            row[char] = self._number(int(self._moves[state, char]), tuple(sorted(following)))
        return row

    def _number(self, state: int, nodes: _Nodes) -> int:
        self._spend(1)
        key = (state if state >= 0 else self._dead, nodes)
        if key not in self._states:
            self._states[key] = num_states = len(self._pending)
            self._pending.append(key)
            num_bytes = 4 * num_states * self._moves.shape[1]
            if num_states - self._dead >= _MAX_NEW_STATES or num_bytes > MAX_TABLE_BYTES:
                raise self._too_large()
        return self._states[key]

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise self._too_large()

    def _too_large(self) -> InvalidValue:
        advice = "" if self._is_free else ", or none with this form"
        return InvalidValue(f"stop: fewer or shorter strings{advice}: they take too large an automaton", param="stop")
