"""Regular expressions, with the meaning that Python's `re.fullmatch` gives them.

The parser is that of `re` itself, so what a pattern means is not defined here a second time. Sets of characters are
evaluated by `re` too, on the model's charset. What is translated here is the structure.
"""

from __future__ import annotations

import re
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
_SET_FLAGS = re.IGNORECASE | re.DOTALL | re.ASCII  # those that say which characters a set has

_INSTEAD = {
    "look-around": "say which characters may be there, as in [^x]",
    "a back-reference": "write the alternatives out, as in aa|bb",
    "a conditional group": "write both cases as alternatives",
    "an atomic group": "write (?:...)",
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
    | (?P<set>      \[\^?\]?(?:[^\]\\]|\\.)*\] )
    | (?P<repeat>   \{(?:(?P<exact>\d+)|(?P<least>\d*),(?P<most>\d*))\} )
    """,
    re.VERBOSE | re.DOTALL,
)
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
    alphabet.budget.spend(20 * len(pattern))
    tree, flags = _parse(pattern)
    return _Translation(pattern, alphabet, dollar).sequence(tree, flags)


def _parse(pattern: str) -> tuple[Any, int]:
    """Return the parser's tree of a pattern, and the flags that hold in all of it. Raises InvalidValue."""
    if len(pattern) > MAX_PATTERN:
        raise InvalidValue(f"the pattern has {len(pattern):,} characters; at most {MAX_PATTERN:,} are supported")
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
    except OverflowError as error:
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
        """Return the number of a set of characters in the alphabet, evaluated by `re`."""
        if code == "IN":
            pattern = "[" + "".join(self._in_set(*item) for item in value) + "]"
            alphabet = self._alphabet
            literal = all(str(item[0]) == "LITERAL" for item in value) and not flags & re.IGNORECASE
            if literal:
                return alphabet.chars("".join(chr(point) for _, point in value))
        else:
            pattern = {"LITERAL": "[{}]", "NOT_LITERAL": "[^{}]", "ANY": "."}[code].format(
                "" if value is None else _escaped(value)
            )
        return self._alphabet.matching(pattern, flags & _SET_FLAGS)

    def _in_set(self, code: Any, value: Any) -> str:
        match str(code):
            case "NEGATE":
                return "^"
            case "LITERAL":
                return _escaped(value)
            case "RANGE":
                return f"{_escaped(value[0])}-{_escaped(value[1])}"
            case "CATEGORY" if str(value) in _CATEGORIES:
                return _CATEGORIES[str(value)]
            case name:
                raise self._unsupported(f"{name.lower()} in a set, which this server doesn't know")

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
        tokens = {"look-around": "look", "a back-reference": "reference", "a conditional group": "condition"}
        tokens["an atomic group"] = "atomic"
        if what == "a possessive repeat":
            place = _possessive(self._pattern)
        else:
            found = (token.start() for token in _TOKEN.finditer(self._pattern) if token.lastgroup == tokens.get(what))
            place = next(found, 0)
        instead = f"; {_INSTEAD[what]} instead" if what in _INSTEAD else ""
        return InvalidValue(f"position {place}: {what} is not supported{instead}")


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"


def _possessive(pattern: str) -> int:
    """Return the position of the first repeat with a + after it."""
    end = -1  # of the last token, which may be no escape of a repeat
    for token in _TOKEN.finditer(pattern):
        if token.lastgroup == "repeat" and pattern.startswith("+", token.end()):
            return token.start()
        between = re.search(r"[*+?]\+", pattern[max(end, 0) : token.start()])
        if between:
            return max(end, 0) + between.start()
        end = token.end()
    between = re.search(r"[*+?]\+", pattern[max(end, 0) :])
    return max(end, 0) + between.start() if between else 0


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
