"""The JSON of request bodies: its size in memory is bounded before it is parsed, and nothing in it is ignored."""

from __future__ import annotations

import json
import re
from typing import Any

from flask.json.provider import DefaultJSONProvider

# No request needs as many: 1,024 entries of logit_bias, 128 prompts, 4 stop strings and each field once are some 1,200.
MAX_VALUES = 4096
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the end is optional, so that no search is repeated


class TooManyValues(Exception):
    """A body has more values than any request needs. Not a ValueError, which Flask would replace."""


class BodyJson(DefaultJSONProvider):
    """Flask's JSON, but stricter about what arrives."""

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Parse a body. Raises ValueError, TooManyValues or RecursionError.

        A megabyte of `[],[],...` takes 20 MiB as objects. A megabyte of unknown fields takes 60 MiB to be refused one
        by one, and a third of a second in which every other thread waits. So the values are counted first.
        """
        # json.loads would also read UTF-16, in which quotation marks can't be found without decoding it.
        text = s if isinstance(s, str) else s.decode("utf-8-sig")
        if _count(text) > MAX_VALUES and _count(_STRING.sub("", text)) > MAX_VALUES:
            raise TooManyValues(f"the body has more than {MAX_VALUES:,} values, and no request needs as many")
        return json.loads(text, object_pairs_hook=_unique, **kwargs)


def _count(text: str) -> int:
    """Return the number of values and opening brackets, and of such characters inside of strings."""
    return text.count(",") + text.count("[") + text.count("{")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has two fields of one name")
    return fields
