r"""JSON as expressions: strings, numbers, constants, arrays, objects, each with one way to write a value.

- White space: at most one space after each comma and each colon, none elsewhere.
- Strings: characters as they are; only `"`, `\`, and the control characters that have a short escape are escaped.
  Other control characters are not written.
- Numbers: no exponent, no zeros that say nothing, no -0. Integers have at most 15 digits, so that every program reads
  them exactly; other numbers at most 9 digits before the point and 6 after it, so that none is rounded to another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Context, Decimal
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.choice import choice_dfa
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.expression import (
    EMPTY,
    NOTHING,
    Chars,
    Either,
    Expression,
    Listed,
    Machine,
    Repeat,
    optional,
)
from service.engine.automaton.expression import Sequence as InSequence

Json: TypeAlias = "dict[str, Any] | list[Any] | str | int | Decimal | bool | None"

INTEGER_LIMIT = 10**15 - 1
DECIMALS = 6  # digits after the point
NUMBER_LIMIT = 10 ** (9 + DECIMALS) - 1  # in units of the last digit after the point
MAX_DEPTH = 5  # of a JSON object of any form
EXACT = Context(prec=2_000)  # for numbers of schemas, none of which is rounded
_DIGITS = "0123456789"
_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_MANY = 20  # values that are written with an automaton of shared beginnings and ends
_CONTROLS = "".join(map(chr, range(32)))


class JsonText:
    """Makes expressions of JSON in one alphabet."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet
        space = optional(Chars(alphabet.chars(" ", is_needed=False)))
        self._comma = InSequence((self.written(","), space))
        self._colon = InSequence((self.written(":"), space))
        self._quote = self.written('"')
        self._backslash = Chars(alphabet.chars("\\", is_needed=False))
        self._minus = Chars(alphabet.chars("-", is_needed=False))
        self._point = Chars(alphabet.chars(".", is_needed=False))
        self._plain = alphabet.without(alphabet.everything(), '"\\' + _CONTROLS)

    def written(self, text: str) -> Expression:
        """Return the expression of exactly these characters."""
        parts = tuple(Chars(self._alphabet.chars(char)) for char in text)
        return parts[0] if len(parts) == 1 else InSequence(parts)

    def constant(self, value: Json) -> Expression:
        """Return the expression of one value."""
        return self.written(dumped(value))

    def one_of(self, values: Sequence[Json]) -> Expression:
        """Return the expression of some values."""
        if len(values) < _MANY:
            return Either(tuple(map(self.constant, values)))
        dfa = choice_dfa([dumped(value) for value in values], self._alphabet)
        return self._machine(dfa, None) if len(dfa.accepting) else NOTHING

    @cached_property
    def boolean(self) -> Expression:
        """`true` or `false`."""
        return Either((self.written("true"), self.written("false")))

    def string(self, least: int = 0, most: int | None = None) -> Expression:
        """Return the expression of strings by their number of code points."""
        escape = Chars(self._alphabet.chars("".join(_ESCAPES.values()), is_needed=False))
        char = Either((Chars(self._plain), InSequence((self._backslash, escape))))
        return self.quoted(Repeat(char, least, most))

    def quoted(self, content: Expression) -> Expression:
        """Return an expression, of characters that are written as they are, between quotes."""
        return InSequence((self._quote, content, self._quote))

    def string_of(self, dfa: Dfa) -> Expression:
        """Return the expression of the strings whose characters an automaton accepts."""
        if not len(dfa.accepting):
            return NOTHING
        return self.quoted(self._machine(dfa, _ESCAPES))

    def _machine(self, dfa: Dfa, escapes: Mapping[str, str] | None) -> Expression:
        """Return the expression of an automaton's texts.

        escapes: the characters that are written as a backslash and a letter, or not at all if they are other control
        characters; None: all are written as they are.
        """
        alphabet = self._alphabet
        special, unwritten = np.zeros(0, np.int64), np.zeros(0, np.int64)
        letters = list((escapes or {}).values())
        if escapes is not None:
            special = alphabet.indices(np.fromiter(map(ord, escapes), np.int64, len(escapes)))
            unwritten = np.concatenate([special, alphabet.indices(np.arange(32))])
            unwritten = unwritten[unwritten >= 0]
        sets: dict[tuple[int, ...], tuple[int, int]] = {}  # classes -> the plain characters, the letters of escapes
        edges: list[tuple[int, int, int]] = []
        num_states = len(dfa.accepting)
        for source, row in enumerate(dfa.transitions.tolist()):
            alphabet.budget.spend(2 + len(row) // 4)
            targets: dict[int, list[int]] = {}
            for class_, target in enumerate(row):
                if target >= 0:
                    targets.setdefault(target, []).append(class_)
            for target, classes in targets.items():
                found = sets.get(tuple(classes))
                if found is None:
                    alphabet.budget.spend(100 + len(dfa.classes) // 20)
                    inside = np.zeros(dfa.transitions.shape[1], np.bool_)
                    inside[classes] = True
                    members = inside[dfa.classes]
                    escaped = [letters[index] for index in np.flatnonzero((special >= 0) & members[special]).tolist()]
                    members[unwritten] = False
                    plain = alphabet.set_of(np.flatnonzero(members))
                    found = sets[tuple(classes)] = (plain, alphabet.chars("".join(escaped), is_needed=False))
                edges.append((source, found[0], target))
                if len(alphabet.members(found[1])):
                    edges.append((source, self._backslash.number, num_states))
                    edges.append((num_states, found[1], target))
                    num_states += 1
        return Machine(tuple(edges), frozenset(np.flatnonzero(dfa.accepting).tolist()))

    def integer(self, least: int | None = None, most: int | None = None) -> Expression:
        """Return the expression of the integers in a range."""
        least = -INTEGER_LIMIT if least is None else max(least, -INTEGER_LIMIT)
        most = INTEGER_LIMIT if most is None else min(most, INTEGER_LIMIT)
        if (least, most) == (-INTEGER_LIMIT, INTEGER_LIMIT):
            minus = optional(self._minus)
            return Either((self.written("0"), InSequence((minus, self._integers(1, most)))))
        parts = []
        if most >= max(least, 0):
            parts.append(self._integers(max(least, 0), most))
        if least <= min(most, -1):
            parts.append(InSequence((self._minus, self._integers(max(1, -most), -least))))
        return Either(tuple(parts))

    def number(self, least: int | None = None, most: int | None = None) -> Expression:
        """Return the expression of the decimal numbers in a range, whose ends are in units of the last digit."""
        least = -NUMBER_LIMIT if least is None else max(least, -NUMBER_LIMIT)
        most = NUMBER_LIMIT if most is None else min(most, NUMBER_LIMIT)
        if (least, most) == (-NUMBER_LIMIT, NUMBER_LIMIT):
            minus = optional(self._minus)
            integers, fraction = self._integers(1, NUMBER_LIMIT // 10**DECIMALS), self._fraction(1, 10**DECIMALS - 1)
            return Either(
                (
                    self.written("0"),
                    InSequence((minus, Either((InSequence((integers, optional(fraction))),
                                               InSequence((self.written("0"), fraction)))))),
                )
            )  # fmt: skip
        parts = []
        if most >= max(least, 0):
            parts.append(self._decimals(max(least, 0), most))
        if least <= min(most, -1):
            parts.append(InSequence((self._minus, self._decimals(max(1, -most), -least))))
        return Either(tuple(parts))

    def array(self, item: Expression, least: int = 0, most: int | None = None) -> Expression:
        """Return the expression of arrays of equal items."""
        return self._between("[", Repeat(item, least, most, self._comma), "]")

    def tuple_(self, first: Sequence[Expression], rest: Expression, least: int, most: int | None) -> Expression:
        """Return the expression of arrays that begin with items of their own forms, at least one."""
        limit = len(first) if most is None else min(len(first), most)
        num_more = None if most is None else max(most - len(first), 0)
        content: Expression = EMPTY
        if limit == len(first) and num_more != 0:
            content = Repeat(InSequence((self._comma, rest)), max(least - len(first), 0), num_more)
        elif least > limit:
            content = NOTHING
        for index in reversed(range(limit)):
            content = InSequence((self._comma if index else EMPTY, first[index], content))
            if index >= least:
                content = optional(content)
        return self._between("[", content, "]")

    def object(
        self, members: Iterable[tuple[str, Expression, bool]], others: tuple[Expression, Expression] | None = None
    ) -> Expression:
        """Return the expression of objects.

        Args:
            members: names, values, and whether the member may be left out; in the order in which they are written.
            others: the names and values of members that may follow, any number of them.
        """
        items: list[tuple[Expression, bool]] = [
            (InSequence((self.constant(name), self._colon, value)), is_optional) for name, value, is_optional in members
        ]
        if others is not None:
            name, value = others
            items.append((Repeat(InSequence((name, self._colon, value)), 1, None, self._comma), True))
        return self._between("{", Listed(tuple(items), self._comma), "}")

    def any_object(self, depth: int = MAX_DEPTH) -> Expression:
        """Return the expression of objects of any form, with at most `depth` levels of objects and arrays."""
        return self.object((), (self.string(), self.any_value(depth - 1)))

    def any_value(self, depth: int) -> Expression:
        """Return the expression of values of any form, with at most `depth` levels of objects and arrays."""
        parts = [self.string(), self.number(), self.boolean, self.written("null")]
        if depth:
            parts += [self.any_object(depth), self.array(self.any_value(depth - 1))]
        return Either(tuple(parts))

    def _between(self, opening: str, content: Expression, closing: str) -> Expression:
        return InSequence((self.written(opening), content, self.written(closing)))

    def _digit(self, least: int = 0, most: int = 9) -> Expression:
        return Chars(self._alphabet.chars(_DIGITS[least : most + 1]))

    def _digits(self, least: int, most: int) -> Expression:
        return Repeat(self._digit(), least, most) if most else EMPTY

    def _integers(self, least: int, most: int) -> Expression:
        """Return the expression of the integers from `least` to `most`, which are not negative."""
        parts: list[Expression] = []
        if least == 0:
            parts.append(self.written("0"))
            least = 1
        if least <= most:
            fewest, longest = len(str(least)), len(str(most))
            # The numbers of digits with which every number is in the range.
            low = fewest if least == 10 ** (fewest - 1) else fewest + 1
            high = longest if most == 10**longest - 1 else longest - 1
            if low > fewest:
                parts.append(self._of_length(str(least), str(min(most, 10**fewest - 1))))
            if low <= high:
                parts.append(InSequence((self._digit(1), self._digits(low - 1, high - 1))))
            if high < longest and (fewest < longest or low == fewest):
                parts.append(self._of_length(str(max(least, 10 ** (longest - 1))), str(most)))
        return Either(tuple(parts))

    def _of_length(self, low: str, high: str) -> Expression:
        """Return the expression of the numbers between two of equally many digits, with zeros before them."""
        if not low:
            return EMPTY
        rest = len(low) - 1
        if low[0] == high[0]:
            return InSequence((self.written(low[0]), self._of_length(low[1:], high[1:])))
        first, last = int(low[0]), int(high[0])
        parts: list[Expression] = []
        if low[1:] != "0" * rest:
            parts.append(InSequence((self.written(low[0]), self._of_length(low[1:], "9" * rest))))
            first += 1
        if high[1:] != "9" * rest:
            parts.append(InSequence((self.written(high[0]), self._of_length("0" * rest, high[1:]))))
            last -= 1
        if first <= last:
            parts.append(InSequence((self._digit(first, last), self._digits(rest, rest))))
        return Either(tuple(parts))

    def _decimals(self, least: int, most: int) -> Expression:
        """Return the expression of the decimal numbers in a range, whose ends are not negative."""
        unit = 10**DECIMALS
        (first, low), (last, high) = divmod(least, unit), divmod(most, unit)
        if first == last:
            return InSequence((self.written(str(first)), self._fraction(low, high)))
        parts = [InSequence((self.written(str(last)), self._fraction(0, high)))]
        if low:
            parts.append(InSequence((self.written(str(first)), self._fraction(low, unit - 1))))
            first += 1
        if first < last:
            parts.append(InSequence((self._integers(first, last - 1), self._fraction(0, unit - 1))))
        return Either(tuple(parts))

    def _fraction(self, low: int, high: int) -> Expression:
        """Return the expression of a point and the digits after it, or nothing for 0."""
        after = InSequence((self._point, self._trimmed(max(low, 1), high, DECIMALS))) if high else NOTHING
        return optional(after) if low == 0 else after

    def _trimmed(self, low: int, high: int, num_digits: int) -> Expression:
        """Return the expression of the numbers in a range with `num_digits` digits, without the zeros at the end."""
        if low > high:
            return NOTHING
        if num_digits == 0:
            return EMPTY
        unit = 10 ** (num_digits - 1)
        if high == 10 * unit - 1 and low <= 1:
            digits = InSequence((self._digits(0, num_digits - 1), self._digit(1)))
            return digits if low else optional(digits)
        if low == 0:
            return optional(self._trimmed(1, high, num_digits))
        parts: list[Expression] = []
        (first, after_first), (last, after_last) = divmod(low, unit), divmod(high, unit)
        if first == last:
            return InSequence((self.written(str(first)), self._trimmed(after_first, after_last, num_digits - 1)))
        if after_first:
            parts.append(InSequence((self.written(str(first)), self._trimmed(after_first, unit - 1, num_digits - 1))))
            first += 1
        if after_last != unit - 1:
            parts.append(InSequence((self.written(str(last)), self._trimmed(0, after_last, num_digits - 1))))
            last -= 1
        if first <= last:
            parts.append(InSequence((self._digit(first, last), self._trimmed(0, unit - 1, num_digits - 1))))
        return Either(tuple(parts))


def dumped(value: Json) -> str:
    """Return a value as JSON without spaces. Equal values give equal texts, if the members have the same order."""
    match value:
        case Decimal():
            whole = value.normalize(EXACT)
            # A number that readers round to a float stays one: as an integer it would not be rounded.
            return format(whole, "f") if -15 <= whole.adjusted() < 15 else str(value)
        case list():
            return "[" + ",".join(map(dumped, value)) + "]"
        case dict():
            return "{" + ",".join(f"{dumped(name)}:{dumped(member)}" for name, member in value.items()) + "}"
        case _:
            return json.dumps(value, ensure_ascii=False)
