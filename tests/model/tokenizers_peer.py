"""Encodes and decodes texts with Hugging Face's `tokenizers`, for tests that run it in an environment of its own.

Reads one JSON document a line: the path of a `tokenizer.json`, or a text for the tokenizer that was read last. Answers
a text with its ids and the text that they decode to, or with null if it can't be encoded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-not-found]  # not in our own environment


def answer(tokenizer: Any, text: str) -> Any:
    """Return the ids and the decoded text, or None."""
    try:
        ids = tokenizer.encode(text).ids
    except Exception:  # noqa: BLE001 - the library raises nothing else for an unknown character
        return None
    return {"ids": ids, "text": tokenizer.decode(ids)}


if __name__ == "__main__":
    tokenizer = None
    for line in sys.stdin:
        request = json.loads(line)
        if "path" in request:
            tokenizer = Tokenizer.from_file(request["path"])
        else:
            sys.stdout.write(json.dumps(answer(tokenizer, request["text"])) + "\n")
            sys.stdout.flush()
