"""A text to train on: read, checked, split, and cut into streams that are read side by side."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from service.errors import InvalidCorpus
from service.training.seeding import generator


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


class Streams:
    """A text as B streams of characters read side by side, each one unbroken, in windows of T steps.

    Every epoch begins elsewhere in the text (fewer than T characters later), so that windows and streams break at
    different places; where, follows from the seed and the epoch alone.
    """

    def __init__(self, ids: Tensor, batch: int, steps: int, seed: int) -> None:
        self.ids, self.batch, self.steps, self.seed = ids, batch, steps, seed
        self.windows_per_epoch = (len(ids) - steps) // (batch * steps)
        if self.windows_per_epoch < 1:
            needed = batch * steps + steps
            raise InvalidCorpus(
                f"the training text has {len(ids)} characters, too few for {batch} streams of {steps}: "
                f"at least {needed} are needed; lower the batch size or the sequence length",
                param="corpus",
            )

    def window(self, epoch: int, place: int) -> Tensor:
        """(T + 1, B) int64: the characters of window `place` of an epoch and, one row down, those that follow them."""
        length = self.windows_per_epoch * self.steps  # characters that a stream is stepped over; one more is a target
        begins = self._start(epoch) + torch.arange(self.batch) * length  # (B,)
        offsets = place * self.steps + torch.arange(self.steps + 1)  # (T + 1,)
        return self.ids[offsets[:, None] + begins]

    def _start(self, epoch: int) -> int:
        return int(torch.randint(self.steps, (1,), generator=generator(self.seed, "epoch", epoch)))
