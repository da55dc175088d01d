"""Languages as trees: what regular expressions and JSON schemas are translated to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias


class Assertion(IntEnum):
    """A condition on the characters before and after a place, as in Python's `re`."""

    TEXT_START = 1
    LINE_START = 2
    TEXT_END = 3
    LINE_END = 4
    LAST_LINE_END = 5  # the end, or before a newline that ends the text
    EDGE = 6  # of a word
    NO_EDGE = 7
    ASCII_EDGE = 8
    NO_ASCII_EDGE = 9


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set, by the set's number in the alphabet."""

    number: int


@dataclass(frozen=True, slots=True)
class Condition:
    """No character, but what holds at this place."""

    assertion: Assertion


@dataclass(frozen=True, slots=True)
class Sequence:
    """All parts, one after the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of the parts. Of none: no text at all."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A body `least` to `most` times; None: any number of times."""

    body: Expression
    least: int
    most: int | None
    separator: Expression | None = None  # between two of them


@dataclass(frozen=True, slots=True)
class Listed:
    """Items in their order with a separator between those that are there. An item with True may be left out."""

    items: tuple[tuple[Expression, bool], ...]
    separator: Expression


@dataclass(frozen=True, slots=True)
class Machine:
    """The texts that lead from state 0 of a graph to one of its accepting states."""

    edges: tuple[tuple[int, int, int], ...]  # from, number of a set, to
    accepting: frozenset[int]


Expression: TypeAlias = Chars | Condition | Sequence | Either | Repeat | Listed | Machine

EMPTY = Sequence(())
NOTHING = Either(())


def optional(body: Expression) -> Expression:
    """Return an expression for a body or nothing."""
    return Repeat(body, 0, 1)
