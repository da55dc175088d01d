"""Texts to train on or to measure: reading, checking and splitting them, and the loss that was measured on one.

Nothing here imports torch: `gru-serve eval --precision int8` measures a text without it.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCorpus


@dataclass(frozen=True)
class EncodedText:
    """Texts one after the other, as ids. A model reads each of them from the zero state."""

    ids: NDArray[np.integer]  # (n,), the smallest unsigned dtype that holds the charset
    starts: Ids  # (number of texts,) int64, the positions at which a text begins, ascending; the first is 0
    # Whether the first character of a text is predicted, from the zero state. It is not where a text is the end of a
    # longer one. The first character of all is never scored.
    scores_starts: bool = True


@dataclass(frozen=True)
class Corpus:
    """A text that was read from a file."""

    name: str  # of the file, without its folder
    text: str  # normalised to NFC
    sha256: str  # of the file's bytes, in hexadecimal

    def split(self, validation_fraction: float) -> tuple[str, str]:
        """Return (training text, validation text). The validation text is the last part of the text."""
        border = int(len(self.text) * (1 - validation_fraction))
        return self.text[:border], self.text[border:]


def read_corpus(path: Path) -> Corpus:
    """Read a UTF-8 file. Raises InvalidCorpus if it can't be read, isn't UTF-8 or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidCorpus(f"can't read {path}: {error.strerror}", param="corpus") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts positions from the end of the byte order mark, not from the start of the file.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise InvalidCorpus(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} ({error.reason}); "
            "convert the file to UTF-8 first",
            param="corpus",
        ) from error
    if not text:
        raise InvalidCorpus(f"{path} is empty", param="corpus")
    return Corpus(path.name, unicodedata.normalize("NFC", text), hashlib.sha256(data).hexdigest())


def require_two_chars(ids: Ids) -> None:
    """Raise InvalidCorpus for a text of fewer than two characters: it has no character to predict."""
    if len(ids) < 2:
        raise InvalidCorpus(
            f"the text has {len(ids)} known characters: at least two are needed, because the first is never predicted",
            param="corpus",
        )


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicted a text. The first character is read but not scored: nothing predicts it."""

    nats_per_char: float  # mean over the scored characters
    num_chars: int  # characters of the text, including the first

    @property
    def num_scored(self) -> int:
        """The number of characters that were predicted."""
        return self.num_chars - 1

    @property
    def bits_per_char(self) -> float:
        """The mean loss in bits."""
        return self.nats_per_char / math.log(2)
