"""Which character each row of a foreign embedding is: from the file, from `--charset`, or from a corpus."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.errors import InvalidCharset, UnsupportedModel, plural
from service.importing.foreign import Tokens
from service.model.charset import MAX_CHARSET, describe

PRINTABLE = "string.printable"
_FREE_BYTES, _BYTES_PER_ROW = 16 << 10, 32  # that a vocabulary in a file may take as JSON
_MAX_CHARSET_BYTES = 4 * 1024 * 1024
_SPECIAL = re.compile(
    r"|[\[<{|(].{1,30}[\])}|>]|\w{2,4}_?(?:token|TOKEN)", re.DOTALL
)  # such as [UNK] and <pad>; or empty
_VOCABULARY = re.compile(r"char|vocab|itos|stoi|token|alphabet|idx|int2|2int|symbol|letter", re.I)
_SPECIAL_WORDS = {"unk", "pad", "oov", "sos", "eos", "bos", "mask", "start", "end", "null", "none", "unknown"}


def tokens_of_option(value: str, num_rows: int) -> Tokens:
    """Return the vocabulary that `--charset` gives.

    It is `string.printable`, or the name of a file, or else the characters themselves. A file holds the characters one
    after the other, or as JSON a list of them, or an object from character to index or from index to character. An
    object numbers the rows of the embedding: rows after the last number are None.

    Raises InvalidCharset.
    """
    if value == PRINTABLE:
        return tuple(string.printable)
    path = Path(value)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        return tuple(value)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CHARSET_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise InvalidCharset(f"can't read {value}: {error.strerror}", param="charset") from error
    except UnicodeDecodeError as error:
        raise InvalidCharset(f"{value} is not UTF-8 at byte {error.start}: convert it", param="charset") from error
    if len(data) > _MAX_CHARSET_BYTES:
        raise InvalidCharset(f"{value} is larger than any charset", param="charset")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return tuple(text)
    found = tokens_of(document)
    if found is None:
        return tuple(text)
    return _numbered(found, num_rows) if isinstance(document, Mapping) else found


def tokens_in_file(document: Any, num_rows: int) -> Tokens | None:
    """Return the vocabulary that a value in a model's file is, with a token for each row; None if it is none.

    Indices are those of the rows: where there are more rows, the last ones are no characters. A list or text without
    indices must have as many characters as there are rows, because nothing says where the others are.
    """
    tokens = tokens_of(document)
    if tokens is None:
        return None
    if isinstance(document, Mapping):
        tokens = _numbered(tokens, num_rows)
    return tokens if len(tokens) == num_rows and is_plausible(tokens, num_rows) else None


def _numbered(tokens: Tokens, num_rows: int) -> Tokens:
    """Return tokens by index with None for up to two rows after the last one."""
    missing = num_rows - len(tokens)
    return tokens + (None,) * missing if missing in (1, 2) else tokens


def tokens_of_corpus(text: str) -> Tokens:
    """Return the distinct characters of a text in the order of their code points, as most programs number them."""
    return tuple(sorted(set(text)))


def tokens_of(document: Any) -> Tokens | None:
    """Return the vocabulary that a value is: a string or list of characters, or a mapping to or from indices.

    Returns None if it is none.
    """
    if isinstance(document, str):
        return tuple(document) if len(document) > 1 and len(set(document)) == len(document) else None
    if isinstance(document, list | tuple):
        if len(document) > 1 and all(isinstance(one, str) for one in document):
            return tuple(document)
        return None
    if not isinstance(document, Mapping) or len(document) < 2:
        return None
    pairs: list[tuple[int, str]] = []
    for key, value in document.items():
        if isinstance(key, str) and type(value) is int:
            pairs.append((value, key))
        elif type(key) is int and isinstance(value, str):
            pairs.append((key, value))
        elif isinstance(key, str) and key.isdecimal() and isinstance(value, str):
            pairs.append((int(key), value))
        else:
            return None
    size = max(index for index, _ in pairs) + 1
    if min(index for index, _ in pairs) < 0 or len({index for index, _ in pairs}) != len(pairs):
        return None
    if size > 2 * len(pairs) + 16:  # numbers, but no indices
        return None
    tokens: list[str | None] = [None] * size
    for index, token in pairs:
        tokens[index] = token
    return tuple(tokens)


def is_special(token: str | None) -> bool:
    """Return whether a token stands for no character: an unknown one, padding, a beginning or an end."""
    return token is None or _SPECIAL.fullmatch(token) is not None or token.lower() in _SPECIAL_WORDS


def is_plausible(tokens: Tokens, num_rows: int) -> bool:
    """Return whether tokens can be the vocabulary: all characters but some, in the right number."""
    missing = num_rows - len(tokens)
    if missing and not (missing in (1, 2) and not any(map(is_special, tokens))):
        return False
    named = [token for token in tokens if not is_special(token)]
    return len(set(named)) == len(named) > 0


def is_vocabulary_name(name: str) -> bool:
    """Return whether something of this name is probably a vocabulary."""
    return _VOCABULARY.search(name) is not None


def tokens_of_metadata(metadata: Mapping[str, Any], num_rows: int) -> Tokens | None:
    """Return the vocabulary in the texts that a file has about itself: as JSON, or as its characters."""
    for name in sorted(metadata, key=lambda name: not is_vocabulary_name(name)):
        text = metadata[name]
        if not isinstance(text, str) or len(text) > _FREE_BYTES + _BYTES_PER_ROW * num_rows:
            continue
        for document in (_json(text), text):
            if (tokens := tokens_in_file(document, num_rows)) is not None:
                return tokens
    return None


def _json(text: str) -> Any:
    """Return the value of a JSON document; None for another text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def fit(tokens: Tokens, num_rows: int, origin: str) -> tuple[Tokens, tuple[str, ...]]:
    """Return a token for each row of the embedding, and notes for the user. None: the row is left out.

    A vocabulary with one character less than there are rows is that of a StringLookup layer, whose first row is [UNK];
    with two less, a row for padding precedes it. To leave out rows has the same effect as to mask their logits.

    Args:
        tokens: the vocabulary.
        num_rows: of the embedding.
        origin: where the vocabulary is from, for messages.

    Raises:
        UnsupportedModel: tokens have several characters, or the number of rows doesn't fit.
        InvalidCharset: a character occurs twice.
    """
    tokens, notes = _with_first_rows(tokens, num_rows, origin)
    if any(token is not None and len(token) != 1 and not is_special(token) for token in tokens):
        example = next(token for token in tokens if token is not None and len(token) != 1 and not is_special(token))
        raise UnsupportedModel(
            f"{origin} has tokens of several characters, such as {example[:40]!r}: this service generates character by "
            "character. Train a model whose vocabulary is single characters"
        )
    kept: list[str | None] = []
    unwritable = []
    for token in tokens:
        if token is None or len(token) != 1:
            kept.append(None)
        elif 0xD800 <= ord(token) <= 0xDFFF or unicodedata.normalize("NFC", token) != token:
            kept.append(None)
            unwritable.append(token)
        else:
            kept.append(token)
    if unwritable:
        notes.append(
            f"left out, because no text in normal form (NFC) has them: {', '.join(map(describe, unwritable[:5]))}"
            + (f" and {len(unwritable) - 5} more" if len(unwritable) > 5 else "")
        )
    num_special = sum(token is None for token in kept) - len(unwritable)
    if num_special:
        notes.append(f"left out: {plural(num_special, 'row')} that stand{'s' * (num_special == 1)} for no character")
    _check(kept, origin)
    return tuple(kept), tuple(notes)


def _with_first_rows(tokens: Tokens, num_rows: int, origin: str) -> tuple[Tokens, list[str]]:
    """Return a token for each row, with those that a StringLookup layer puts first, and notes.

    Raises UnsupportedModel.
    """
    if len(tokens) == num_rows + 1 and tokens[-1] == "\n":
        tokens = tokens[:-1]  # an editor ends files with a newline
    missing = num_rows - len(tokens)
    if missing in (1, 2) and not any(map(is_special, tokens)):
        tokens = (None,) * missing + tokens
        what = "row 0 is [UNK]" if missing == 1 else "row 0 is padding and row 1 is [UNK]"
        return tokens, [
            f"{origin} has {len(tokens) - missing} characters and the model {num_rows} rows: taken as {what}, as the "
            "StringLookup layer numbers them"
        ]
    if missing:
        raise UnsupportedModel(
            f"{origin} has {len(tokens)} characters and the model {num_rows} rows: give the "
            "vocabulary that it was trained with, in its order, with --charset FILE or --charset-from CORPUS"
        )
    return tokens, []


def advice(num_rows: int) -> str:
    """Return what to do about a file without a vocabulary, as the end of a sentence."""
    if num_rows == len(string.printable):
        return (
            f"its {num_rows} rows are perhaps those of char-rnn.pytorch: give --charset {PRINTABLE}, or another "
            "--charset"
        )
    return (
        "give the text that it was trained on with --charset-from CORPUS, whose sorted distinct characters are taken, "
        "or the characters in their order with --charset FILE"
    )


def _check(tokens: Sequence[str | None], origin: str) -> None:
    seen: set[str] = set()
    for token in tokens:
        if token is not None and token in seen:
            raise InvalidCharset(f"{origin} has {describe(token)} twice", param="charset")
        if token is not None:
            seen.add(token)
    if not seen:
        raise InvalidCharset(f"{origin} has no character", param="charset")
    if len(seen) > MAX_CHARSET:
        raise InvalidCharset(
            f"{origin} has {len(seen)} characters, at most {MAX_CHARSET} are accepted", param="charset"
        )
