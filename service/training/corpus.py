"""A text to train on, or to measure with: read, checked, split."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from service.errors import InvalidCorpus


@dataclass(frozen=True)
class Corpus:
    """A text after NFC, with the name and the SHA-256 of the file it came from."""

    name: str
    text: str
    sha256: str

    def split(self, validation_fraction: float) -> tuple[str, str]:
        """(training text, validation text): the last part of the text is held out."""
        border = int(len(self.text) * (1 - validation_fraction))
        return self.text[:border], self.text[border:]


def read_corpus(path: Path) -> Corpus:
    """The corpus in a UTF-8 file. Raises InvalidCorpus if it can't be read, isn't UTF-8 or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidCorpus(f"can't read {path}: {error.strerror}", param="corpus") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise InvalidCorpus(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} ({error.reason}); "
            "convert the file to UTF-8 first",
            param="corpus",
        ) from error
    if not text:
        raise InvalidCorpus(f"{path} is empty", param="corpus")
    return Corpus(path.name, unicodedata.normalize("NFC", text), hashlib.sha256(data).hexdigest())
