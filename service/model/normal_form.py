"""Unicode's normal form C of texts from outside, in pieces that take little time each.

`unicodedata.normalize` holds the interpreter's lock until it has done the whole text, and takes time that grows with
the square of the length of a run of combining marks: seven seconds for 100,000 characters made for that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

PIECE_CHARS = 4096  # about a millisecond of work
_LAST_POINT = 0x1FFFF  # no character after it is a mark, or composes with another
_LONG_RUN = 32  # marks up to which sorting them by insertion is fast


def normalised_pieces(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield the normal form C of a text in consecutive pieces of about `piece_chars` characters.

    A piece ends where the normal form of a text is the normal form of its two parts, and never between CR and LF. It is
    longer where a text has no such place. An empty text has one empty piece.
    """
    begin = 0
    while len(text) - begin > piece_chars:
        end = begin + piece_chars
        while end < len(text) and not _may_split(text, end):
            end += 1
        yield normalised(text[begin:end])
        begin = end
    if begin < len(text) or not text:
        yield normalised(text[begin:])


def normalised_blocks(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the normal form C of a text that arrives in blocks. What is yielded also ends where a text may be split."""
    waiting: list[str] = []  # the end of what was read, in which the text may not be split
    for block in blocks:
        if not block:
            continue
        before = waiting[-1][-1] if waiting else ""
        place = len(block) - 1
        while place > 0 and not _may_split(block, place):
            place -= 1
        if place == 0 and before and not _may_split(before + block[0], 1):
            waiting.append(block)
            continue
        if waiting or place:
            yield normalised("".join([*waiting, block[:place]]))
        waiting = [block[place:]]
    if waiting:
        yield normalised("".join(waiting))


def normalised(text: str) -> str:
    """Return the normal form C of a text, in a time that is proportional to its length."""
    if text.isascii():
        return text
    if _has_long_run(text):
        text = _long_runs().sub(_sorted_run, text)
    return unicodedata.normalize("NFC", text)


def _may_split(text: str, place: int) -> bool:
    """Whether the character at this place neither composes with those before it nor moves before them."""
    char = text[place]
    if char == "\n":
        return text[place - 1] != "\r"
    return not joins(char) and unicodedata.is_normalized("NFC", char)


def joins(char: str) -> bool:
    """Whether a character may compose with one before it, or move before it, as an accent does after its letter."""
    return char >= "\u0300" and (unicodedata.combining(char) != 0 or char in _classes()[1])


def _has_long_run(text: str) -> bool:
    """Whether a run of marks is long enough that sorting it may take long. Far faster than the expression."""
    points = np.minimum(code_points(text), _LAST_POINT + 1)
    marks = np.flatnonzero(_mark_table()[points])  # few: in most texts there are none
    others = _LONG_RUN - 1  # marks after the first of a long run
    return bool((marks[others:] - marks[:-others] == others).any())


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the (n,) code points of a text, which may contain half surrogate pairs: JSON escapes can."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _sorted_run(run: re.Match[str]) -> str:
    """Decompose the marks of a run and put them in canonical order. That changes nothing in the normal form."""
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in run[0])
    return "".join(sorted(marks, key=unicodedata.combining))


@cache
def _long_runs() -> re.Pattern[str]:
    return re.compile(f"[{re.escape(''.join(sorted(_classes()[0])))}]{{{_LONG_RUN},}}")


@cache
def _mark_table() -> NDArray[np.bool_]:
    """Return whether each code point up to _LAST_POINT decomposes to combining marks only, and False."""
    table = np.zeros(_LAST_POINT + 2, np.bool_)
    table[[ord(mark) for mark in _classes()[0]]] = True
    return table


@cache
def _classes() -> tuple[frozenset[str], frozenset[str]]:
    """Return the characters that decompose to combining marks only, and those that compose with one before them."""
    marks, seconds = set(), set(map(chr, [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]))
    for point in range(0x300, _LAST_POINT + 1):
        char = chr(point)
        decomposition = unicodedata.decomposition(char)
        if unicodedata.combining(char):
            marks.add(char)
        if decomposition and not decomposition.startswith("<"):
            parts = [chr(int(part, 16)) for part in decomposition.split()]
            if all(map(unicodedata.combining, parts)):
                marks.add(char)
            seconds.update(parts[1:])
    return frozenset(marks), frozenset(seconds)
