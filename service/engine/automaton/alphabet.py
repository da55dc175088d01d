"""Sets of a model's characters, and the classes of characters that a form doesn't tell apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids, Int32
from service.engine.automaton.budget import Budget, TooLarge
from service.errors import plural
from service.model.charset import describe

_MAX_NAMED = 10  # unknown characters that an error names at most
_MAX_MEMBERS = 2_000_000  # characters of all sets of one form, with repetitions


class Alphabet:
    """The characters that texts of one form may have, and sets of them, each with a number.

    Made for one compilation, whose budget it has.
    """

    def __init__(self, charset: str, allowed: Sequence[int] | None, budget: Budget) -> None:
        self.budget = budget
        self.num_chars = len(charset)  # V
        usable = range(len(charset)) if allowed is None else sorted({i for i in allowed if 0 <= i < len(charset)})
        # The characters that texts may have.
        self.text = charset if allowed is None else "".join(charset[id_] for id_ in usable)
        self._ids = np.asarray(usable, np.int64)  # of these
        points = np.frombuffer(self.text.encode("utf-32-le"), np.uint32)
        self._order = np.argsort(points, kind="stable")
        self._sorted = points[self._order]
        self._members: list[Ids] = []
        self._numbers: dict[bytes, int] = {}
        self._of_chars: dict[str, int] = {}
        self._of_pattern: dict[tuple[str, int], int] = {}
        self._num_members = 0
        self.missing: dict[str, None] = {}  # characters that a form named and that texts can't have, in its order

    def set_of(self, members: Ids) -> int:
        """Return the number of a set of ids, which are in ascending order and unique."""
        key = members.tobytes()
        number = self._numbers.get(key)
        if number is None:
            self._num_members += len(members)
            if self._num_members > _MAX_MEMBERS:
                raise TooLarge("its classes have too many characters")
            self.budget.spend(5 + len(members) // 10)
            number = self._numbers[key] = len(self._members)
            self._members.append(members)
        return number

    def members(self, number: int) -> Ids:
        """Return the ids of a set, in ascending order."""
        return self._members[number]

    def chars(self, chars: str, *, is_needed: bool = True) -> int:
        """Return the number of the set of these characters. Those that the model lacks are left out.

        is_needed: whether to remember them, for an error, if the model lacks all of them.
        """
        number = self._of_chars.get(chars)
        if number is None:
            self.budget.spend(10 + len(chars))
            ids = self.indices(np.fromiter(map(ord, chars), np.int64, len(chars)))
            number = self._of_chars[chars] = self.set_of(np.unique(ids[ids >= 0]))
        if is_needed and not len(self._members[number]):
            self.missing |= dict.fromkeys(chars)
        return number

    def ranges(self, ranges: Sequence[tuple[int, int]], others: Sequence[int] = (), *, is_negated: bool = False) -> int:
        """Return the number of the union of some ranges of code points, whose ends belong to them, and other sets.

        is_negated: return that of all other characters instead.
        """
        self.budget.spend(50 + 10 * len(ranges) + len(self.text) // 50)
        inside = np.zeros(len(self._sorted) + 1, np.int64)
        bounds = np.array(ranges, np.int64).reshape(-1, 2)
        np.add.at(inside, np.searchsorted(self._sorted, bounds[:, 0]), 1)
        np.add.at(inside, np.searchsorted(self._sorted, bounds[:, 1], side="right"), -1)
        found = np.zeros(self.num_chars, np.bool_)
        found[self._ids[self._order[np.cumsum(inside[:-1]) > 0]]] = True
        for other in others:
            found[self._members[other]] = True
        if is_negated:
            usable = np.zeros(self.num_chars, np.bool_)
            usable[self._ids] = True
            found = usable & ~found
        elif ranges and not found.any():
            self.missing[chr(ranges[0][0])] = None
        return self.set_of(np.flatnonzero(found))

    def matching(self, pattern: str, flags: int) -> int:
        """Return the number of the set of characters that a pattern matches, which matches one character at a time."""
        number = self._of_pattern.get((pattern, flags))
        if number is None:
            self.budget.spend(1_000 + 10 * len(pattern) + len(self.text) // 8)
            # Runs of such characters, because a match for each takes far longer.
            runs = [match.span() for match in re.compile(f"{pattern}+", flags).finditer(self.text)]
            self.budget.spend(2 * len(runs))
            edges = np.zeros(len(self.text) + 1, np.int64)
            if runs:
                starts, ends = np.array(runs).T
                edges[starts] += 1
                edges[ends] -= 1  # a run never ends where another one begins
            inside = np.cumsum(edges[:-1]) > 0
            number = self._of_pattern[pattern, flags] = self.set_of(np.sort(self._ids[inside]))
        return number

    def without(self, number: int, excluded: str) -> int:
        """Return the number of a set without some characters."""
        members = self._members[number]
        self.budget.spend(10 + len(members) // 20)
        found = self.indices(np.fromiter(map(ord, excluded), np.int64, len(excluded)))
        return self.set_of(np.setdiff1d(members, found[found >= 0]))

    def everything(self) -> int:
        """Return the number of the set of all characters."""
        return self.set_of(np.sort(self._ids))

    def indices(self, points: NDArray[Any]) -> Ids:
        """Return the ids of characters by their code points; -1 for characters that texts can't have."""
        if not len(self._sorted):
            return np.full(len(points), -1, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, points), len(self._sorted) - 1)
        return np.where(self._sorted[places] == points, self._ids[self._order[places]], -1)

    def partition(self, numbers: Iterable[int]) -> tuple[Int32, list[Ids]]:
        """Return (V,): the class of each character, and the classes of each of the sets.

        Two characters have the same class if and only if they are in the same ones of these sets.
        """
        numbers = list(numbers)
        classes = np.zeros(self.num_chars, np.int64)
        sizes = [self.num_chars]
        for number in numbers:
            members = self._members[number]
            self.budget.spend(20 + (len(members) + len(sizes)) // 10)
            if len(members) == 1:
                before = int(classes[members[0]])
                if sizes[before] > 1:
                    sizes[before] -= 1
                    classes[members[0]] = len(sizes)
                    sizes.append(1)
                continue
            inside = np.bincount(classes[members], minlength=len(sizes))
            renamed = np.arange(len(sizes))
            for split in np.flatnonzero((inside > 0) & (inside < np.asarray(sizes))).tolist():
                renamed[split] = len(sizes)
                sizes[split] -= int(inside[split])
                sizes.append(int(inside[split]))
            classes[members] = renamed[classes[members]]
        classes_of = [np.flatnonzero(np.bincount(classes[self._members[number]])) for number in numbers]
        return classes.astype(np.int32), classes_of

    @property
    def named_missing(self) -> str:
        """The first characters that are missing, and how many others, for a message."""
        named = ", ".join(describe(char) for char in list(self.missing)[:_MAX_NAMED])
        others = len(self.missing) - _MAX_NAMED
        return named + (f", and {plural(others, 'other')}" if others > 0 else "")
