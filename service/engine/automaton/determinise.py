"""From an expression to a deterministic automaton.

Glushkov's construction gives each character of an expression, repeats written out, a position; the positions that may
follow another one are its followers. The subset construction makes states of sets of positions. A condition such as a
word boundary has a position too, which takes no character: it is passed if it holds between the characters around it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.budget import MAX_POSITIONS, MAX_STATES, TooLarge, check_table
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.expression import (
    Assertion,
    Chars,
    Condition,
    Either,
    Expression,
    Listed,
    Machine,
    Repeat,
    Sequence,
)

_Places = tuple[int, ...]  # positions in ascending order
# Since Python 3.14, \B holds in an empty text.
_NO_EDGE_OF_NOTHING = re.fullmatch(r"\B", "") is not None
# What is known of the characters around a place: bits, or none because the text begins or ends there.
_NEWLINE, _WORD, _ASCII_WORD = 1, 2, 4
_NONE = 8


def determinise(expression: Expression, alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of the texts of an expression. Raises TooLarge."""
    if size(expression) > MAX_POSITIONS:
        raise TooLarge(f"it has more than {MAX_POSITIONS:,} characters after its repeats are written out")
    positions = _Positions(alphabet)
    whole = positions.add(expression)
    return _Subsets(positions, whole, alphabet).dfa().minimised(alphabet.budget)


def size(expression: Expression, known: Mapping[int, tuple[int, Expression]] = {}) -> int:
    """Return the number of positions of an expression, which may be far more than can be built.

    known: sizes of parts, by the identities of the parts.
    """
    if id(expression) in known:
        return known[id(expression)][0]
    match expression:
        case Chars() | Condition():
            return 1
        case Sequence(parts) | Either(parts):
            return sum(size(part, known) for part in parts)
        case Repeat(body, least, most, separator):
            copies = max(least, 1) if most is None else most
            return copies * max(size(body, known) + (size(separator, known) if separator else 0), 1)
        case Listed(items, separator):
            return sum(size(item, known) + size(separator, known) for item, _ in items)
        case Machine(edges):
            return len(edges)


@dataclass(slots=True)
class _Fragment:
    """A part of an expression: whether it may be empty, and with which positions it begins and ends."""

    is_nullable: bool
    first: _Places
    last: _Places


_EMPTY = _Fragment(True, (), ())


class _Positions:
    """The positions of an expression. A position's followers are the union of some tuples, which others share."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._budget = alphabet.budget
        self.labels: list[int] = []  # of each position: the number of its set; -1 - assertion for a condition
        self.followers: list[list[_Places]] = []

    def add(self, expression: Expression) -> _Fragment:
        """Add the positions of an expression."""
        match expression:
            case Chars(number):
                return self._add_position(number)
            case Condition(assertion):
                return self._add_position(-1 - assertion)
            case Sequence(parts):
                return self._in_sequence(self.add(part) for part in parts)
            case Either(parts):
                fragments = [self.add(part) for part in parts]
                first = tuple(place for one in fragments for place in one.first)
                last = tuple(place for one in fragments for place in one.last)
                self._budget.spend(len(first) + len(last))
                return _Fragment(any(one.is_nullable for one in fragments), first, last)
            case Repeat():
                return self._add_repeat(expression)
            case Listed(items, separator):
                return self._add_listed(items, separator)
            case Machine():
                return self._add_machine(expression)

    def _add_position(self, label: int) -> _Fragment:
        self._budget.spend(12)
        place = len(self.labels)
        if place > 2 * MAX_POSITIONS:  # size() leaves out copies of separators only
            raise TooLarge(f"it has more than {MAX_POSITIONS:,} characters after its repeats are written out")
        self.labels.append(label)
        self.followers.append([])
        return _Fragment(False, (place,), (place,))

    def _in_sequence(self, fragments: Iterable[_Fragment]) -> _Fragment:
        whole = _EMPTY
        for one in fragments:
            whole = self._joined(whole, one)
        return whole

    def _joined(self, left: _Fragment, right: _Fragment) -> _Fragment:
        self._connect(left.last, right.first)
        first = left.first + right.first if left.is_nullable else left.first
        last = left.last + right.last if right.is_nullable else right.last
        self._budget.spend(8 + (len(first) + len(last)) // 16)
        return _Fragment(left.is_nullable and right.is_nullable, first, last)

    def _connect(self, last: _Places, first: _Places) -> None:
        if first:
            self._budget.spend(len(last))
            for place in last:
                self.followers[place].append(first)

    def _add_repeat(self, repeat: Repeat) -> _Fragment:
        """Add copies of a body: those that are needed, then others each of which may follow the one before."""
        num_copies = repeat.most if repeat.most is not None else max(repeat.least, 1)
        least = repeat.least
        copies: list[_Fragment] = []
        joints: list[_Fragment] = []  # the separators before them
        for index in range(num_copies):
            one = self.add(repeat.body)
            if one.is_nullable and repeat.separator is None:
                # A body that may be empty may be left out. So a copy need not be, and can be skipped only at the end.
                least = 0
                one = _Fragment(False, one.first, one.last)
            copies.append(one)
            joints.append(_EMPTY if not index or repeat.separator is None else self.add(repeat.separator))
        whole = _EMPTY
        last: list[int] = []
        for index, (joint, one) in enumerate(zip(joints, copies, strict=True)):
            whole = self._joined(self._joined(whole, joint), one)
            if index + 1 >= least:
                self._budget.spend(len(whole.last))
                last.extend(whole.last)
        if repeat.most is None and copies:
            if repeat.separator is None:
                self._connect(copies[-1].last, copies[-1].first)
            else:
                joint = self.add(repeat.separator)
                self._connect(copies[-1].last, joint.first)
                self._connect(joint.last, copies[-1].first)
        return _Fragment(least == 0 or whole.is_nullable, whole.first, tuple(last))

    def _add_listed(self, items: tuple[tuple[Expression, bool], ...], separator: Expression) -> _Fragment:
        """Add items that each have their own separator before them, which is passed unless none is there before."""
        begun, fresh = (
            _Fragment(False, (), ()),
            True,
        )  # what was written if something was; whether nothing may have been
        first: _Places = ()
        for item, is_optional in items:
            joint, one = self.add(separator), self.add(item)
            self._connect(begun.last, joint.first)
            self._connect(joint.last, one.first)
            if fresh:
                first += one.first
            last = begun.last + one.last if is_optional else one.last
            fresh = fresh and is_optional
            begun = _Fragment(False, (), last)
            self._budget.spend(2 + (len(first) + len(last)) // 16)
        return _Fragment(fresh, first, begun.last)

    def _add_machine(self, machine: Machine) -> _Fragment:
        """Add a position for each set of characters with which the graph enters a state."""
        self._budget.spend(3 * len(machine.edges))
        places: dict[tuple[int, int], int] = {}
        leaving: dict[int, list[int]] = {}
        for source, number, target in machine.edges:
            place = places.get((number, target))
            if place is None:
                place = places[number, target] = self._add_position(number).first[0]
            leaving.setdefault(source, []).append(place)
        firsts = {state: tuple(found) for state, found in leaving.items()}
        for (_, state), place in places.items():
            if state in firsts:
                self.followers[place].append(firsts[state])
        last = tuple(place for (_, state), place in places.items() if state in machine.accepting)
        return _Fragment(0 in machine.accepting, firsts.get(0, ()), last)


@dataclass(slots=True)
class _Edges:
    """The edges with one mask of classes."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class _Subsets:
    """The subset construction.

    What matters of a position is what may follow it, and whether a text may end there: its *key*. A state is a set of
    keys and, if there are conditions, what is known of the last character. In a state that was reached through
    LAST_LINE_END before a newline, keys are negative: the text has to end there.
    """

    def __init__(self, positions: _Positions, whole: _Fragment, alphabet: Alphabet) -> None:
        self._budget = alphabet.budget
        self._alphabet = alphabet
        self._labels = positions.labels
        has_conditions = any(label < 0 for label in positions.labels)
        numbers = sorted({label for label in positions.labels if label >= 0})
        kinds: list[int] = []
        if has_conditions:
            kinds.append(alphabet.chars("\n", is_needed=False))
            kinds += (alphabet.matching(r"\w", flags) for flags in (0, re.ASCII))
        self.classes, classes_of = alphabet.partition([*numbers, *kinds])
        self._num_classes = int(self.classes.max()) + 1
        masks = [sum(1 << one for one in found) for found in map(np.ndarray.tolist, classes_of)]
        self._mask_of = dict(zip(numbers, masks, strict=False))
        # The masks of the classes of each kind of character.
        self._kinds = {0: (1 << self._num_classes) - 1}
        for bit, mask in zip((_NEWLINE, _WORD, _ASCII_WORD), masks[len(numbers) :], strict=False):
            parts = [(kind, known & ~mask) for kind, known in self._kinds.items()]
            parts += [(kind | bit, known & mask) for kind, known in self._kinds.items()]
            self._kinds = {kind: known for kind, known in parts if known}
        self._has_conditions = has_conditions
        self._make_keys(positions, whole)

    def _make_keys(self, positions: _Positions, whole: _Fragment) -> None:
        last = set(whole.last)
        self._followers: list[_Places] = []  # of each key
        self._ends: list[bool] = []
        shared: dict[int, int] = {}  # the identity of a tuple of followers -> the number of its content
        contents: dict[_Places, int] = {}
        seen: dict[tuple[tuple[int, ...], bool], int] = {}

        def key_of(found: list[_Places], ends: bool) -> int:
            parts = []
            for places in found:
                part = shared.get(id(places))
                if part is None:
                    self._budget.spend(1 + len(places) // 8)
                    part = shared[id(places)] = contents.setdefault(places, len(contents))
                parts.append(part)
            self._budget.spend(2 + len(parts))
            known = (tuple(sorted(set(parts))), ends)
            key = seen.get(known)
            if key is None:
                key = seen[known] = len(seen)
                distinct = set().union(*found)
                self._budget.spend(len(distinct))
                self._followers.append(tuple(sorted(distinct)))
                self._ends.append(ends)
            return key

        self._keys = [key_of(found, place in last) for place, found in enumerate(positions.followers)]
        self._start = key_of([whole.first], whole.is_nullable)

    def dfa(self) -> Dfa:
        """Return the automaton, whose states are all reachable."""
        start = (frozenset([self._start]), _NONE if self._has_conditions else 0)
        numbers = {start: 0}
        states = [start]
        edges: dict[int, _Edges] = {}
        for number, (keys, before) in enumerate(states):
            for mask, target_keys, kind in self._leaving(keys, before):
                target = (target_keys, kind)
                to = numbers.get(target)
                if to is None:
                    to = numbers[target] = len(states)
                    if to >= MAX_STATES:
                        raise TooLarge(f"its automaton has more than {MAX_STATES:,} states")
                    states.append(target)
                found = edges.get(mask)
                if found is None:
                    found = edges[mask] = _Edges()
                found.sources.append(number)
                found.targets.append(to)
        check_table(len(states), self._num_classes)
        transitions = np.full((len(states), self._num_classes), -1, np.int32)
        for mask, found in edges.items():
            classes = _bits(mask)
            self._budget.spend(20 + len(classes) + len(found.sources) * len(classes) // 50)
            transitions[np.array(found.sources)[:, None], classes] = np.array(found.targets, np.int32)[:, None]
        accepting = np.array([self._may_end(keys, before) for keys, before in states], np.bool_)
        return Dfa(self.classes, transitions, accepting)

    def _leaving(self, keys: frozenset[int], before: int) -> list[tuple[int, frozenset[int], int]]:
        """Return the edges of a state: disjoint masks of classes, with the keys of the next state and its kind."""
        found: list[tuple[int, frozenset[int], int]] = []
        for kind, kind_mask in self._kinds.items():
            by_set = self._next_keys(keys, before, kind)
            taken = 0
            pieces: list[tuple[int, set[int]]] = []
            for number, targets in by_set.items():
                mask = self._mask_of[number] & kind_mask
                if not mask & taken:
                    if mask:
                        pieces.append((mask, targets))
                else:
                    pieces = self._split(pieces, mask, targets)
                taken |= mask
            next_kind = kind if self._has_conditions else 0
            found += [(mask, frozenset(targets), next_kind) for mask, targets in pieces]
        return found

    def _split(self, pieces: list[tuple[int, set[int]]], mask: int, targets: set[int]) -> list[tuple[int, set[int]]]:
        """Return pieces to which other targets are added for the classes of a mask."""
        split = []
        for known, there in pieces:
            both = known & mask
            if both:
                self._budget.spend(8 + len(there) + len(targets))
                split.append((both, there | targets))
                if known != both:
                    split.append((known & ~both, there))
                mask &= ~both
            else:
                split.append((known, there))
        self._budget.spend(len(split))
        if mask:
            split.append((mask, targets))
        return split

    def _next_keys(self, keys: frozenset[int], before: int, after: int) -> dict[int, set[int]]:
        """Return the next state's keys by the number of the set of characters that leads there."""
        by_set: dict[int, set[int]] = {}
        if self._has_conditions:
            for place, must_end in self._closure(keys, before, after)[0]:
                if self._labels[place] >= 0:
                    key = self._keys[place]
                    by_set.setdefault(self._labels[place], set()).add(~key if must_end else key)
            return by_set
        places: Collection[int]
        if len(keys) == 1:
            (key,) = keys
            places = self._followers[key]
        else:
            places = set().union(*(self._followers[key] for key in keys))
        self._budget.spend(16 + 3 * len(keys) + 3 * len(places))
        for place in places:
            label = self._labels[place]
            if label in by_set:
                by_set[label].add(self._keys[place])
            else:
                by_set[label] = {self._keys[place]}
        return by_set

    def _may_end(self, keys: frozenset[int], before: int) -> bool:
        if not self._has_conditions:
            return any(self._ends[key] for key in keys)
        return self._closure(keys, before, _NONE)[1]

    def _closure(self, keys: frozenset[int], before: int, after: int) -> tuple[set[tuple[int, bool]], bool]:
        """Pass the conditions that hold between two characters.

        Returns the positions that can be reached, each with whether the text has to end there, and whether the text may
        end before the next character.
        """
        waiting = [(key if key >= 0 else ~key, False) for key in keys if key >= 0 or after == _NONE]
        reached: set[tuple[int, bool]] = set()
        may_end = False
        for key, must_end in waiting:
            may_end = may_end or self._ends[key]
            self._budget.spend(8 + 4 * len(self._followers[key]))
            for place in self._followers[key]:
                label = self._labels[place]
                ends = must_end
                if label < 0:
                    if not _holds(-1 - label, before, after):
                        continue
                    ends = must_end or (label == -1 - Assertion.LAST_LINE_END and after != _NONE)
                if (place, ends) not in reached:
                    reached.add((place, ends))
                    if label < 0:
                        waiting.append((self._keys[place], ends))
        return reached, may_end


@cache
def _holds(assertion: int, before: int, after: int) -> bool:
    """Whether a condition holds between characters of two kinds."""
    match assertion:
        case Assertion.TEXT_START:
            return before == _NONE
        case Assertion.LINE_START:
            return before == _NONE or bool(before & _NEWLINE)
        case Assertion.TEXT_END:
            return after == _NONE
        case Assertion.LINE_END | Assertion.LAST_LINE_END:
            return after == _NONE or bool(after & _NEWLINE)
        case Assertion.EDGE:
            return (before ^ after) & _WORD != 0
        case Assertion.ASCII_EDGE:
            return (before ^ after) & _ASCII_WORD != 0
        case _:
            bit = _WORD if assertion == Assertion.NO_EDGE else _ASCII_WORD
            return not (before ^ after) & bit and (before & after != _NONE or _NO_EDGE_OF_NOTHING)


def _bits(mask: int) -> list[int]:
    """Return the numbers of the bits that are set."""
    digits = bin(mask)[:1:-1]
    return [index for index, digit in enumerate(digits) if digit == "1"]
