"""Texts as corpora, without files."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from service.training.corpus import Corpus, read_corpus
from service.training.hyperparameters import Hyperparameters


def corpus_of(text: str, settings: Hyperparameters | None = None, name: str = "text", sha256: str = "0" * 64) -> Corpus:
    """Return a text as a corpus of this name and sum."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text.encode())
        return replace(read_corpus([path], settings or Hyperparameters()), sha256=sha256)
