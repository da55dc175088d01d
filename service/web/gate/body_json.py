"""The JSON of request bodies: its size in memory is bounded before it is parsed, and nothing in it is ignored."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flask.json.provider import DefaultJSONProvider

# No request needs as many: 1,024 messages with seven fields each, one of them a list, as answers have them, are some
# 9,200. 2,048 texts of embeddings, or 1,024 entries of logit_bias and 1,024 ids of allowed characters, are fewer. Ids
# of a text don't count. A form of 10,000 choices has some two hundred to spare.
MAX_VALUES = 10_240
# Lists and objects in each other. The schema of a form may have 64, three levels below the body.
MAX_DEPTH = 128
# A list of whole numbers counts as one value: parsed it takes at most ten times its length, as other bodies may,
# and a schema that refuses its elements ends at the first one (`fail_fast`).
_IDS = re.compile(r"\[[\s\d,]++\]")
_MAX_WHOLE = 2.0**53  # up to here a float is exactly the number that was sent
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the end is optional, so that no search is repeated
_OUTSIDE_OF_STRINGS = re.compile(rf"{_STRING.pattern}|([\[{{])|([\]}}])", re.DOTALL)


class RefusedJson(Exception):
    """JSON that no request may have, or a number that no JSON has. Not a ValueError, which Flask would replace."""

    def __init__(self, message: str, path: str | None = None) -> None:
        """path: of the value that is refused; None if it is the whole."""
        super().__init__(message)
        self.path = path


class _FieldTwice(ValueError):
    """An object has two fields of one name."""


class BodyJson(DefaultJSONProvider):
    """Flask's JSON, but stricter about what arrives."""

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Parse a body. Raises what `parse` raises."""
        # json.loads would also read UTF-16, in which quotation marks can't be found without decoding it.
        return parse(s if isinstance(s, str) else s.decode("utf-8-sig"), **kwargs)


def parse(text: str, **kwargs: Any) -> Any:
    """Parse JSON that a client has sent. Raises ValueError or RefusedJson.

    A megabyte of `[],[],...` takes 20 MiB as objects. A megabyte of unknown fields takes 60 MiB to be refused one by
    one, and a third of a second in which every other thread waits. So the values are counted first.

    A number without a fraction is an integer, however it is written, as JSON Schema defines it: 5.0 is 5.
    """
    if _count(text, 0, len(text)) > MAX_VALUES and _has_too_many(text):
        raise RefusedJson(f"the body has more than {MAX_VALUES:,} values, and no request needs as many")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(text):
        raise RefusedJson(f"the body is nested too deeply: at most {MAX_DEPTH} lists and objects may be in each other")
    infinite: list[float] = []  # NaN, Infinity and numbers that are too large for 64 bits

    def number(written: str) -> float | int:
        parsed = float(written)
        if not math.isfinite(parsed):
            infinite.append(parsed)
        return int(parsed) if parsed.is_integer() and abs(parsed) <= _MAX_WHOLE else parsed

    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_float=number, parse_constant=number, **kwargs)
    except (json.JSONDecodeError, _FieldTwice):
        raise
    except ValueError:  # of `int`, whose message is for programmers
        raise ValueError("a number has more digits than any field takes") from None
    if infinite and isinstance(parsed, dict):
        path = written_path(_path_of_infinite(parsed) or ())
        raise RefusedJson(
            f"{path}: must be a finite number: JSON has no NaN and no Infinity, and no number of 64 bits is above "
            "1.8e308",
            path,
        )
    return parsed


def written_path(path: Sequence[str | int]) -> str:
    """Return a path as a client reads it: `stream_options.include_usage`, `prompt[3]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in path).removeprefix(".")


def _is_too_deep(text: str) -> bool:
    """Return whether lists and objects are nested too deeply. What is no JSON may get either answer."""
    depth = 0
    for found in _OUTSIDE_OF_STRINGS.finditer(text):
        depth += 1 if found[1] else -1 if found[2] else 0
        if depth > MAX_DEPTH:
            return True
        if depth < 0:
            break
    return False


def _path_of_infinite(value: Any) -> tuple[str | int, ...] | None:
    """Return the names and indices that lead to the first number that is not finite; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ()
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        if not isinstance(part, int | str) and (path := _path_of_infinite(part)) is not None:
            return (name, *path)
    return None


def _has_too_many(text: str) -> bool:
    """Count what is outside of strings and lists of ids, and stop as soon as it is too much."""
    text = _IDS.sub("", text)
    num_values, end = 0, 0
    for num_strings, string in enumerate(_STRING.finditer(text)):  # names and values, or it is not JSON
        num_values += _count(text, end, string.start())
        end = string.end()
        if num_values > MAX_VALUES or num_strings > 2 * MAX_VALUES:
            return True
    return num_values + _count(text, end, len(text)) > MAX_VALUES


def _count(text: str, start: int, stop: int) -> int:
    """Return the number of commas and opening brackets in a part of a text."""
    return text.count(",", start, stop) + text.count("[", start, stop) + text.count("{", start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _FieldTwice(f"an object has two fields of one name: {twice[:80]}")
    return fields
