"""Texts to train on or to measure: reading, encoding and dividing them, and the loss that was measured on one.

Nothing here imports torch: `gru-serve eval --precision int8` measures a text without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCorpus, plural
from service.model.charset import Charset, UnknownChars
from service.model.encoded_text import EncodedText
from service.training.hyperparameters import Hyperparameters
from service.training.reading import Reader
from service.training.sources import Sources, find_sources

__all__ = ["Corpus", "EncodedText", "TextLoss", "WholeText", "hold_out", "last_part", "read_corpus", "read_text"]

# A held-out end of a document is read from the zero state, without what precedes it, so its first characters are
# predicted worse than they would be in the document. In a thousand characters that matters little.
_MIN_TAIL = 1000
_GOLDEN = (math.sqrt(5) - 1) / 2
_BLOCK = 1 << 20  # characters that are moved at a time


@dataclass(frozen=True)
class WholeText:
    """Everything that was read, before a part is held out."""

    name: str  # of the file, or how many files there are
    sha256: str  # see Corpus
    charset: Charset
    text: EncodedText  # a text for each document, or for each line
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """What a model is trained on, and what is held out."""

    name: str  # for the card and messages: the file's name, or how many files there are
    # In hexadecimal. Of one file: of its bytes. Of several: of their sums, in order, a line each, as the command
    # `sha256sum a b | cut -c1-64 | sha256sum` gives it.
    sha256: str
    charset: Charset
    training: EncodedText
    validation: EncodedText
    notes: tuple[str, ...]  # a line each for the user: what was converted, folded, left out and held out

    @property
    def num_chars(self) -> int:
        """The number of characters of both parts."""
        return self.num_training_chars + self.num_validation_chars

    @property
    def num_training_chars(self) -> int:
        """The number of characters that the model is trained on."""
        return len(self.training.ids)

    @property
    def num_validation_chars(self) -> int:
        """The number of characters that are held out."""
        return len(self.validation.ids)

    def frequency_loss(self) -> float:
        """Return the loss on the held-out part, in nats a character, of the characters' frequencies in the other part.

        It is the loss of a model that knows nothing of their order.
        """
        counts, held = (self._counts(part) for part in (self.training, self.validation))
        chances = (counts + 1) / (counts + 1).sum()
        return -float((held * np.log(chances)).sum() / held.sum())

    def _counts(self, text: EncodedText) -> NDArray[np.int64]:
        """Return how often each character occurs, (V,), counted in blocks to bound the memory."""
        counts = np.zeros(len(self.charset), np.int64)
        for begin in range(0, len(text.ids), _BLOCK):
            counts += np.bincount(text.ids[begin : begin + _BLOCK], minlength=len(counts))
        return counts


def read_corpus(
    sources: Sequence[str | Path] | Sources,
    settings: Hyperparameters,
    progress: Callable[[int], object] = lambda _: None,
    known: str = "",
) -> Corpus:
    """Read the files that the sources name, see `find_sources`, and hold out a part.

    Args:
        sources: files, folders, patterns, `-` for standard input.
        settings: what is done with the text.
        progress: a function that is called with the number of bytes read since its last call.
        known: characters that come first in the charset, in this order.

    Raises:
        InvalidCorpus: a file can't be read, is no UTF-8 text, or nothing or too little is left.
        InvalidCharset: the charset of the settings is none.
        UnknownCharacters: the text has characters outside the charset, and the settings say that this is an error.
    """
    return hold_out(read_text(sources, settings, progress, known), settings)


def hold_out(whole: WholeText, settings: Hyperparameters) -> Corpus:
    """Divide a text; its ids are overwritten. Raises InvalidCorpus if it is too short."""
    if settings.lines:
        training, validation, what = _hold_out_lines(whole.text, settings)
    else:
        training, validation, what = _hold_out_ends(whole.text, settings)
    if settings.lines and len(whole.text.starts) < 2:
        raise InvalidCorpus(
            f"{whole.name} has one line, and --lines needs two or more, one of them to hold out: add lines, or leave "
            "--lines out",
            param="corpus",
        )
    if len(validation.ids) < 2:
        raise InvalidCorpus(
            f"{whole.name} is too short to hold out a part for validation: use a longer text or a larger fraction",
            param="corpus",
        )
    if len(training.ids) < 2:
        raise InvalidCorpus(
            f"{whole.name} has {len(training.ids)} characters besides the held-out ones, and training needs at least "
            "two: use a longer text or a smaller fraction",
            param="corpus",
        )
    return Corpus(whole.name, whole.sha256, whole.charset, training, validation, (*whole.notes, what))


def read_text(
    sources: Sequence[str | Path] | Sources,
    settings: Hyperparameters,
    progress: Callable[[int], object] = lambda _: None,
    known: str = "",
    charset: Charset | None = None,
) -> WholeText:
    """Read the files that the sources name without holding out a part. See `read_corpus`.

    A `charset` replaces the one that `settings` and `known` determine.
    """
    if settings.charset and settings.min_count:
        raise InvalidCorpus(
            "--charset gives the characters that --min-count would choose: use one of them", param="min_count"
        )
    sources = sources if isinstance(sources, Sources) else find_sources(sources)
    reader = Reader(keep_newlines=settings.keep_newlines, lines=settings.lines)
    for source in sources.files:
        reader.read(source, progress)
    if not reader.sources:
        raise InvalidCorpus(
            f"{sources.name}: nothing to read ({'; '.join((*sources.notes, *reader.notes()))})"
            if len(sources.files) > 1 or sources.files[0].is_found
            else f"{sources.name} is empty",
            param="corpus",
        )
    name = sources.name_of(reader.sources)
    if charset is None:
        charset = reader.charset(known, settings.charset, settings.min_count)
    if settings.lines and "\n" not in charset:
        raise InvalidCorpus("lines end with \\n, so --lines needs it in the charset", param="charset")
    # Rare characters are left out on purpose: where none is similar, refusing the text would help nobody.
    unknown: UnknownChars = settings.unknown_chars
    if settings.min_count and unknown == "error":
        unknown = "fold"
    or_drop = settings.min_count > 0 or unknown == "fold_drop"
    ids, lengths = reader.encode(charset, "fold" if unknown == "fold_drop" else unknown, or_drop=or_drop)
    text = _lines_of(ids, charset) if settings.lines else EncodedText.of_lengths(ids, lengths)
    if not len(text.ids):
        what = "lines that are not empty" if settings.lines else "characters that the charset knows"
        raise InvalidCorpus(f"{name} has no {what}", param="corpus")
    return WholeText(name, reader.sha256, charset, text, (*sources.notes, *reader.notes()))


def _lines_of(ids: NDArray[Any], charset: Charset) -> EncodedText:
    """Return the lines in `ids`, which end with LF, as texts. Empty ones are left out; `ids` is overwritten."""
    starts = np.flatnonzero(ids == charset.exact("\n")[0])  # the ends less one, at first
    starts[1:] = starts[:-1] + 1
    starts[:1] = 0
    lines = EncodedText(ids, starts)
    lengths = lines.lengths
    is_full = lengths > 1
    if "\r" in charset:
        is_full &= (lengths > 2) | (ids[starts] != charset.exact("\r")[0])
    del lengths
    return lines if is_full.all() else _select(lines, is_full)


def _hold_out_lines(text: EncodedText, settings: Hyperparameters) -> tuple[EncodedText, EncodedText, str]:
    """Divide lines into those to train on and held-out ones, which are spread evenly over the text.

    So they represent the whole text even if it is sorted.
    """
    lengths, fraction = text.lengths, settings.validation_fraction
    budget = min(int(len(text.ids) * fraction), settings.validation_chars)
    # A line that is longer can't be held out. It must not make all others be held out.
    budget = min(budget, int(lengths[lengths <= budget].sum() * fraction))
    is_held = _spread(lengths, budget)
    what = f"held out: {is_held.sum():,} of {len(is_held):,} lines, spread evenly over the text"
    return *_divide(text, is_held), what


def _hold_out_ends(text: EncodedText, settings: Hyperparameters) -> tuple[EncodedText, EncodedText, str]:
    """Divide documents into their beginnings to train on and their held-out ends.

    All ends have the same share of their document, unless most would be too short to measure with. Then fewer documents
    give longer ends, and a short document is held out as a whole. These documents are spread evenly over all.
    """
    lengths = text.lengths
    tails = lengths - (lengths * (1 - settings.validation_fraction)).astype(np.int64)
    total, cap = int(tails.sum()), settings.validation_chars
    if total > cap:
        tails = lengths * cap // len(text.ids) if len(lengths) > 1 else np.minimum(tails, cap)
        total = cap
    if len(lengths) > 1 and 2 * tails[tails >= _MIN_TAIL].sum() < total:
        longest = np.minimum(lengths, min(_MIN_TAIL, total))
        tails = np.where(_spread(longest, total), longest, 0)
    if len(lengths) == 1:
        what = f"held out: the last {plural(int(tails[0]), 'character', ',')}"
    else:
        num_held = int((tails > 0).sum())
        num_chars = plural(int(tails.sum()), "character", ",")
        what = f"held out: {num_chars} at the end of {num_held:,} of {len(lengths):,} documents"
    # The two parts of each document; one may be empty.
    starts = np.stack([text.starts, text.starts + lengths - tails], axis=1).reshape(-1)
    training, validation = _divide(EncodedText(text.ids, starts), np.arange(len(starts)) % 2 == 1)
    return training, EncodedText(validation.ids, validation.starts, scores_starts=False), what


def _spread(sizes: Ids, budget: int) -> NDArray[np.bool_]:
    """Choose items whose sizes sum to nearly `budget` and not more, spread evenly over all; at least one.

    The fractions of the multiples of the golden ratio are spread evenly, however many of them one takes, and have no
    period, so items that repeat in a pattern are chosen in proportion.
    """
    is_chosen = np.zeros(len(sizes), np.bool_)
    fits = sizes <= budget
    if not fits.any():
        is_chosen[np.argmin(sizes)] = True
        return is_chosen
    # To sort all items of a long text would take long, so most are excluded before. Twice the share is enough, unless
    # sizes differ wildly, if it is some hundred items.
    share = max(2 * budget / int(sizes[fits].sum()), 1000 / len(sizes))
    items, places = [], []
    for begin in range(0, len(sizes), _BLOCK):
        block = np.flatnonzero(fits[begin : begin + _BLOCK]) + begin
        fractions = (block + 1) * _GOLDEN % 1
        items.append(block[fractions < share])
        places.append(fractions[fractions < share])
    order = np.concatenate(items)[np.argsort(np.concatenate(places))]
    is_chosen[order[np.cumsum(sizes[order]) <= budget]] = True
    return is_chosen


def _divide(text: EncodedText, is_held: NDArray[np.bool_]) -> tuple[EncodedText, EncodedText]:
    """Return the texts that are not held out, and the others. The first are written over the ids of all."""
    lengths = text.lengths[is_held]
    spans = zip(text.starts[is_held].tolist(), lengths.tolist(), strict=True)
    held = np.concatenate([text.ids[start : start + length] for start, length in spans])
    return _select(text, ~is_held), EncodedText.of_lengths(held, lengths)


def _select(text: EncodedText, is_kept: NDArray[np.bool_]) -> EncodedText:
    """Return some of the texts. Their ids are moved to the beginning of the array, so that nothing is copied."""
    ids, lengths = text.ids, text.lengths
    size = 0
    for begin in range(0, len(ids), _BLOCK):
        end = min(begin + _BLOCK, len(ids))
        # The texts that have characters in this block.
        first = int(np.searchsorted(text.starts, begin, "right")) - 1
        last = int(np.searchsorted(text.starts, end, "left"))
        starts = text.starts[first:last]
        inside = np.minimum(starts + lengths[first:last], end) - np.maximum(starts, begin)
        kept = ids[begin:end][np.repeat(is_kept[first:last], inside)]
        ids[size : size + len(kept)] = kept
        size += len(kept)
    lengths = lengths[is_kept]
    return EncodedText.of_lengths(ids[:size], lengths)


def last_part(text: EncodedText, fraction: float, *, lines: bool) -> EncodedText:
    """Return the last fraction of a text; of lines, those that begin in it, and the last one at least."""
    border = int(len(text.ids) * (1 - fraction))
    if lines:
        border = int(text.starts[min(int(np.searchsorted(text.starts, border)), len(text.starts) - 1)])
    return text.last(len(text.ids) - border)


def beginnings_of(text: EncodedText, num_places: int, num_chars: int) -> EncodedText:
    """Return what follows places that are spread evenly over texts, each as a text of its own.

    Of each, the first character is only read, and the `num_chars` after it are scored. None reaches into the next text.
    If there are fewer places than `num_places`, all are taken. Raises InvalidCorpus if there is none.
    """
    places = np.maximum(text.lengths - num_chars, 0)  # in each text
    ends = np.cumsum(places)
    total = int(ends[-1])
    if total == 0:
        raise InvalidCorpus(
            f"the longest text has {plural(int(text.lengths.max()), 'character', ',')}: --beginning-chars must "
            "be lower than that",
            param="corpus",
        )
    num_places = min(num_places, total)
    chosen = (2 * np.arange(num_places) + 1) * total // (2 * num_places)
    within = np.searchsorted(ends, chosen, "right")  # the text of each place
    begins = text.starts[within] + chosen - (ends[within] - places[within])
    ids = text.ids[begins[:, None] + np.arange(num_chars + 1)]
    return EncodedText.of_lengths(ids.reshape(-1), np.full(num_places, num_chars + 1), scores_starts=False)


def require_two_chars(text: EncodedText) -> None:
    """Raise InvalidCorpus if a measurement would score no character of the text."""
    if text.num_scored < 1:
        raise InvalidCorpus(
            f"the text has {len(text.ids)} known characters: at least two are needed, because the first is never "
            "predicted",
            param="corpus",
        )


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicted a text. Characters that nothing predicts, such as the first, are not scored."""

    nats_per_char: float  # mean over the scored characters
    num_chars: int  # characters of the text
    num_scored: int  # the characters that were predicted

    @property
    def bits_per_char(self) -> float:
        """The mean loss in bits."""
        return self.nats_per_char / math.log(2)
