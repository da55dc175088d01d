"""A model's charset as a tokenizer of Hugging Face's libraries: the files `tokenizer.json` and `tokenizer_config.json`.

They encode and decode every text as `Charset` does, to the same ids: a token is a character of the text in Unicode's
normal form C that the model knows. Clients that count or cut texts by tokens, such as lm-evaluation-harness, read them.
"""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

from service.model.charset import Charset
from service.model.normal_form import joins

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_BOUNDARY = "\n"
_NO_TOKEN = "unknown character"  # noqa: S105 - not one character, so no text has it: the library then raises an error


def tokenizer(charset: Charset) -> dict[str, Any]:
    """Return the content of `tokenizer.json`, which the library `tokenizers` loads.

    It leaves out unknown characters, as `Charset.encode` does with `drop`: programs that cut texts of their own, like
    aiperf and guidellm, can't do anything about an error.
    """
    steps: list[dict[str, Any]] = [{"type": "NFC"}]
    steps += [
        {"type": "Replace", "pattern": {"String": char}, "content": parts}
        for char, parts in _decompositions(charset).items()
    ]
    steps.append({"type": "Replace", "pattern": {"Regex": f"[^{_ranges(charset)}]"}, "content": ""})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(charset),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {char: number for number, char in enumerate(charset.characters)},
            "unk_token": _NO_TOKEN,
        },
    }


def tokenizer_config(charset: Charset, max_chars: int | None = None) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`, which `transformers` reads beside `tokenizer.json`.

    A charset has no character for the beginning or the end of a text. Clients that need tokens for them get the
    newline, or none if the charset lacks it. lm-evaluation-harness takes the id 0 of a beginning, which is that of
    most newlines, for none, and then looks for the end: so both have to be there.

    Args:
        charset: Of the model.
        max_chars: The largest number of characters that a request can read and write; None for no limit.
    """
    boundary = _BOUNDARY if _BOUNDARY in charset else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": boundary,
        "eos_token": boundary,
        "pad_token": boundary,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_chars if max_chars is not None else sys.maxsize,
        "vocab_size": len(charset),
    }


def _added_tokens(charset: Charset) -> list[dict[str, Any]]:
    # Named here as no special token, because `transformers` would make it one, and then leave newlines out of texts
    # that it decodes without special tokens.
    if _BOUNDARY not in charset:
        return []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return [{"id": charset.characters.index(_BOUNDARY), "content": _BOUNDARY} | flags]


def _ranges(charset: Charset) -> str:
    """Return the charset in the way that a bracket expression lists characters, neighbours as one range."""
    points = set(map(ord, charset.characters))
    firsts = sorted(point for point in points if point - 1 not in points)
    lasts = sorted(point for point in points if point + 1 not in points)
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in zip(firsts, lasts, strict=True))


def _decompositions(charset: Charset) -> dict[str, str]:
    """Return the characters of NFC texts that `Charset` reads as a letter and its marks, each with these characters."""
    if not any(map(joins, charset.characters)):
        return {}
    found = {}
    for point in range(0xC0, 0x20000):  # no character outside has a decomposition of several characters
        char = chr(point)
        if char in charset or 0xD800 <= point <= 0xDFFF:
            continue
        parts = unicodedata.normalize("NFD", char)
        if parts != char and all(part in charset for part in parts) and unicodedata.is_normalized("NFC", char):
            found[char] = parts
    return found
