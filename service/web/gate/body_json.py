"""The JSON of request bodies: its size in memory is bounded before it is parsed, and nothing in it is ignored."""

from __future__ import annotations

import json
import re
from typing import Any

from flask.json.provider import DefaultJSONProvider

# No request needs as many: 1,024 messages with seven fields each, one of them a list, as answers have them, are some
# 9,200. 2,048 texts of embeddings, or 1,024 entries of logit_bias and 1,024 ids of allowed characters, are fewer. Ids
# of a text don't count. A form of 10,000 choices has some two hundred to spare.
MAX_VALUES = 10_240
# A list of whole numbers counts as one value: parsed it takes at most ten times its length, as other bodies may,
# and a schema that refuses its elements ends at the first one (`fail_fast`).
_IDS = re.compile(r"\[[\s\d,]++\]")
_MAX_WHOLE = 2.0**53  # up to here a float is exactly the number that was sent
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the end is optional, so that no search is repeated


class TooManyValues(Exception):
    """A body has more values than any request needs. Not a ValueError, which Flask would replace."""


class _FieldTwice(ValueError):
    """An object has two fields of one name."""


class BodyJson(DefaultJSONProvider):
    """Flask's JSON, but stricter about what arrives."""

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Parse a body. Raises what `parse` raises."""
        # json.loads would also read UTF-16, in which quotation marks can't be found without decoding it.
        return parse(s if isinstance(s, str) else s.decode("utf-8-sig"), **kwargs)


def parse(text: str, **kwargs: Any) -> Any:
    """Parse JSON that a client has sent. Raises ValueError, TooManyValues or RecursionError.

    A megabyte of `[],[],...` takes 20 MiB as objects. A megabyte of unknown fields takes 60 MiB to be refused one by
    one, and a third of a second in which every other thread waits. So the values are counted first.

    A number without a fraction is an integer, however it is written, as JSON Schema defines it: 5.0 is 5.
    """
    if _count(text, 0, len(text)) > MAX_VALUES and _has_too_many(text):
        raise TooManyValues(f"the body has more than {MAX_VALUES:,} values, and no request needs as many")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_number, **kwargs)
    except (json.JSONDecodeError, _FieldTwice):
        raise
    except ValueError:  # of `int`, whose message is for programmers
        raise ValueError("a number has more digits than any field takes") from None


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


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if number.is_integer() and abs(number) <= _MAX_WHOLE else number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _FieldTwice("an object has two fields of one name")
    return fields
