"""Regular expressions, with the meaning that Python's `re.fullmatch` gives them.

The parser is that of `re` itself, so what a pattern means is not defined here a second time. Sets of characters are
evaluated by `re` too, on the model's charset. What is translated here is the structure.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.budget import TooLarge
from service.engine.automaton.determinise import determinise
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.expression import (
    EMPTY,
    NOTHING,
    Assertion,
    Chars,
    Condition,
    Either,
    Expression,
    Repeat,
    Sequence,
)
from service.errors import InvalidValue

MAX_PATTERN = 10_000  # characters
MAX_NESTING = 50  # groups in groups

_INSTEAD = {
    "look-around": "say instead which characters may be there, as in [^x]",
    "a back-reference": "write the alternatives out instead, as in aa|bb",
    "a conditional group": "write both cases as alternatives instead",
    "an atomic group": "write (?:...) instead",
    "a possessive repeat": "leave out the + after the repeat",
}
_UNSUPPORTED = {
    "ASSERT": "look-around",
    "ASSERT_NOT": "look-around",
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_TOKEN = re.compile(
    r"""
      (?P<comment>  \(\?\#[^)]*\)? )
    | (?P<look>     \(\?(?:<?[=!]) )
    | (?P<reference>\(\?P= | \\(?![0-3][0-7][0-7])[1-9] )
    | (?P<condition>\(\?\( )
    | (?P<atomic>   \(\?> )
    | (?P<open>     \( )
    | (?P<close>    \) )
    | (?P<escape>   \\. | \\\Z )
    | (?P<set>      \[\^?\]?(?:[^\]\\]|\\.)*+\]? )
    | (?P<possessive> (?:[*+?]|\{\d*+(?:,\d*+)?\})\+ )
    | (?P<repeat>   \{(?:(?P<exact>\d++)|(?P<least>\d*+),(?P<most>\d*+))\} )
    """,
    re.VERBOSE | re.DOTALL,
)
# A comment of a verbose pattern, or what has a # that begins none.
_COMMENT = re.compile(r"(?P<kept>\\.|\[\^?\]?(?:[^\]\\]|\\.)*+\]?)|\#[^\n]*", re.DOTALL)
# A character by its number, or any other escape.
_CODE_POINT = re.compile(r"\\(?:U([0-9a-fA-F]{8})|.)", re.DOTALL)
_parse_lock = threading.Lock()


def regex_dfa(pattern: str, alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of the texts that a pattern matches as a whole. Raises InvalidValue."""
    try:
        return determinise(regex_expression(pattern, alphabet), alphabet)
    except TooLarge as error:
        raise _too_large(pattern, error) from error


def search_dfa(pattern: str, alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of the texts in which a pattern matches somewhere, as JSON schemas mean it.

    `$` matches only at the end, not before a newline there. Raises InvalidValue.
    """
    try:
        anything = Repeat(Chars(alphabet.everything()), 0, None)
        found = regex_expression(pattern, alphabet, dollar=Assertion.TEXT_END)
        return determinise(Sequence((anything, found, anything)), alphabet)
    except TooLarge as error:
        raise _too_large(pattern, error) from error


def regex_expression(pattern: str, alphabet: Alphabet, dollar: Assertion = Assertion.LAST_LINE_END) -> Expression:
    """Return the expression of a pattern. Raises InvalidValue, and TooLarge.

    dollar: what `$` means without the flag m.
    """
    if len(pattern) > MAX_PATTERN:
        raise InvalidValue(f"the pattern has {len(pattern):,} characters; at most {MAX_PATTERN:,} are supported")
    alphabet.budget.spend(20 * len(pattern))
    tree, flags = _parse(pattern)
    if flags & re.VERBOSE:
        pattern = _COMMENT.sub(lambda found: found["kept"] or " " * len(found[0]), pattern)
    return _Translation(pattern, alphabet, dollar).sequence(tree, flags)


def _parse(pattern: str) -> tuple[Any, int]:
    """Return the parser's tree of a pattern, and the flags that hold in all of it. Raises InvalidValue."""
    depth = 0
    for token in _TOKEN.finditer(pattern):
        if token.lastgroup in ("open", "look", "atomic", "condition"):
            depth += 1
            if depth > MAX_NESTING:
                raise InvalidValue(
                    f"position {token.start()}: groups are nested more than {MAX_NESTING} deep; write it with fewer"
                )
        elif token.lastgroup == "close":
            depth -= 1
    try:
        # `re` warns of sets that may change their meaning one day, which helps nobody here. What is said of warnings
        # holds for the process, hence the lock.
        with _parse_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(pattern)
    except re.error as error:
        place = "" if error.pos is None else f"position {error.pos}: "
        raise InvalidValue(f"{place}{error.msg}") from error
    except (OverflowError, ValueError) as error:  # from chr(), or from int(), which converts at most 4,300 digits
        for escape in _CODE_POINT.finditer(pattern):
            if escape[1] is not None and int(escape[1], 16) > sys.maxunicode:
                raise InvalidValue(f"position {escape.start()}: bad escape {escape[0]}") from error
        raise InvalidValue(f"position {_largest_repeat(pattern)[0]}: the repetition number is too large") from error
    except RecursionError as error:
        raise InvalidValue("position 0: the pattern is nested too deeply") from error
    return tree, tree.state.flags


class _Translation:
    """Translates the tree of one pattern."""

    def __init__(self, pattern: str, alphabet: Alphabet, dollar: Assertion) -> None:
        self._pattern = pattern
        self._alphabet = alphabet
        self._dollar = dollar

    def sequence(self, items: Any, flags: int) -> Expression:
        """Return the expression of items that follow each other."""
        parts = tuple(self._item(item, flags) for item in items)
        return parts[0] if len(parts) == 1 else Sequence(parts)

    def _item(self, item: tuple[Any, Any], flags: int) -> Expression:
        code, value = item
        self._alphabet.budget.spend(5)
        match str(code):
            case "LITERAL" if not flags & re.IGNORECASE:
                return Chars(self._alphabet.chars(chr(value)))
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return Chars(self._set(str(code), value, flags))
            case "BRANCH":
                return Either(tuple(self.sequence(part, flags) for part in value[1]))
            case "SUBPATTERN":
                _, added, removed, part = value
                if added & parser.TYPE_FLAGS:
                    flags &= ~parser.TYPE_FLAGS
                return self.sequence(part, (flags | added) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, part = value
                body = self.sequence(part, flags)
                unlimited = most == codes.MAXREPEAT
                return EMPTY if body == EMPTY else Repeat(body, int(least), None if unlimited else int(most))
            case "AT":
                return Condition(self._assertion(str(value), flags))
            case "FAILURE":
                return NOTHING
            case name:
                raise self._unsupported(_UNSUPPORTED.get(name, f"{name.lower()}, which this server doesn't know"))

    def _set(self, code: str, value: Any, flags: int) -> int:
        """Return the number of a set of characters in the alphabet."""
        if code == "ANY":
            return (
                self._alphabet.everything() if flags & re.DOTALL else self._alphabet.ranges([(10, 10)], is_negated=True)
            )
        items = value if code == "IN" else [(code, value)]
        if flags & re.IGNORECASE:
            return self._ignoring_case(items, flags)
        if all(str(kind) == "LITERAL" for kind, _ in items):
            return self._alphabet.chars("".join(chr(point) for _, point in items))
        ranges: list[tuple[int, int]] = []
        categories: list[int] = []
        is_negated = False
        for kind, content in items:
            match str(kind):
                case "LITERAL":
                    ranges.append((content, content))
                case "NOT_LITERAL":
                    ranges.append((content, content))
                    is_negated = True
                case "RANGE":
                    ranges.append(content)
                case "NEGATE":
                    is_negated = True
                case "CATEGORY" if str(content) in _CATEGORIES:
                    categories.append(self._alphabet.matching(_CATEGORIES[str(content)], flags & re.ASCII))
                case _:
                    raise self._unsupported(f"{content} in a set, which this server doesn't know")
        return self._alphabet.ranges(ranges, categories, is_negated=is_negated)

    def _ignoring_case(self, items: Any, flags: int) -> int:
        """Return the number of a set whose characters may be of either case, evaluated by `re`."""
        parts = []
        for kind, content in items:
            match str(kind):
                case "LITERAL":
                    parts.append(_escaped(content))
                case "NOT_LITERAL":
                    parts += ["^", _escaped(content)]
                case "RANGE":
                    # `re` looks at each character of a range for its cases.
                    self._alphabet.budget.spend(2_000 + (content[1] - content[0]))
                    parts.append(f"{_escaped(content[0])}-{_escaped(content[1])}")
                case "NEGATE":
                    parts.append("^")
                case "CATEGORY" if str(content) in _CATEGORIES:
                    parts.append(_CATEGORIES[str(content)])
                case _:
                    raise self._unsupported(f"{content} in a set, which this server doesn't know")
        if len(items) > 1 and any(str(kind) in ("LITERAL", "RANGE") for kind, _ in items):
            self._alphabet.budget.spend(10_000)  # for the table that `re` makes of such a set
        number = self._alphabet.matching(f"[{''.join(parts)}]", flags & (re.IGNORECASE | re.ASCII))
        if not len(self._alphabet.members(number)):
            for kind, content in items:
                if str(kind) == "LITERAL":
                    self._alphabet.chars(chr(content))  # which remembers it as missing
        return number

    def _assertion(self, name: str, flags: int) -> Assertion:
        is_ascii = flags & re.ASCII
        match name:
            case "AT_BEGINNING":
                return Assertion.LINE_START if flags & re.MULTILINE else Assertion.TEXT_START
            case "AT_BEGINNING_STRING":
                return Assertion.TEXT_START
            case "AT_END":
                return Assertion.LINE_END if flags & re.MULTILINE else self._dollar
            case "AT_END_STRING":
                return Assertion.TEXT_END
            case "AT_BOUNDARY":
                return Assertion.ASCII_EDGE if is_ascii else Assertion.EDGE
            case "AT_NON_BOUNDARY":
                return Assertion.NO_ASCII_EDGE if is_ascii else Assertion.NO_EDGE
            case _:
                raise self._unsupported(f"{name.lower()}, which this server doesn't know")

    def _unsupported(self, what: str) -> InvalidValue:
        """Return the error for what has no automaton, with its first place in the pattern."""
        kinds = {
            "look-around": "look",
            "a back-reference": "reference",
            "a conditional group": "condition",
            "an atomic group": "atomic",
            "a possessive repeat": "possessive",
        }
        tokens = (token for token in _TOKEN.finditer(self._pattern) if token.lastgroup == kinds.get(what))
        place = next((token.start() for token in tokens), 0)
        instead = f"; {_INSTEAD[what]}" if what in _INSTEAD else ""
        return InvalidValue(f"position {place}: {what} is not supported{instead}")


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"


def _largest_repeat(pattern: str) -> tuple[int, str]:
    """Return the position and the text of the repeat with the largest number; 0 and nothing if there is none."""
    largest, found = -1, (0, "")
    for token in _TOKEN.finditer(pattern):
        if token.lastgroup == "repeat":
            digits = max(token["exact"] or "", token["most"] or "", token["least"] or "", key=lambda text: len(text))
            number = int(digits[:20] or 0)
            if number > largest:
                largest, found = number, (token.start(), token[0])
    return found


def _too_large(pattern: str, error: TooLarge) -> InvalidValue:
    """Return the error for a pattern that exceeds the budget, with the repeat that is probably its cause."""
    position, repeat = _largest_repeat(pattern)
    advice = f"repeat fewer than {repeat} times" if repeat else "write a shorter pattern, or a list of choices"
    return InvalidValue(f"position {position}: {error}; {advice}")
