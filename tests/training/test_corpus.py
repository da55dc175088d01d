"""Reading a corpus, and dividing it into streams."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidCorpus
from service.model.encoded_text import EncodedText
from service.training import corpus as corpus_module
from service.training.corpus import Corpus, WholeText, last_part, read_corpus, read_text
from service.training.hyperparameters import Hyperparameters
from service.training.streams import Streams


def test_read_corpus__normalises_the_text_and_digests_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    data = "\ufeffcafe\u0301\n".encode() * 20
    path.write_bytes(data)
    corpus = read_corpus([path], Hyperparameters())
    whole = corpus.charset.decode(np.concatenate([corpus.training.ids, corpus.validation.ids]))
    assert whole == "café\n" + "\ufeffcafé\n" * 19
    assert corpus.name == "a.txt"
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("num_chars", "num_held"), [(100, 10), (1_115_394, 111_540), (21, 3), (3_000_000, 200_000)])
def test_read_corpus__holds_out_the_end_of_one_document(tmp_path: Path, num_chars: int, num_held: int) -> None:
    """For the second number this is the text with which the shipped model was measured."""
    path = tmp_path / "a.txt"
    text = ("0123456789" * (num_chars // 10 + 1))[:num_chars]
    path.write_text(text)
    corpus = read_corpus([path], Hyperparameters())
    assert corpus.num_chars == num_chars
    assert corpus.charset.decode(corpus.training.ids) == text[:-num_held]
    assert corpus.charset.decode(corpus.validation.ids) == text[-num_held:]
    assert corpus.training.ids.dtype == np.uint8
    assert (corpus.training.starts.tolist(), corpus.validation.starts.tolist()) == ([0], [0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"abcdefgh", "hold out"),
        (b"good\nbad\xff", r"not UTF-8: byte 0xff at offset 8"),
        (b"\xef\xbb\xbfab\xc3", r"byte 0xc3 at offset 5"),
        (b"\x80", r"byte 0x80 at offset 0"),
    ],
)
def test_read_corpus__refuses_files_that_are_not_utf8_text(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(InvalidCorpus, match=message):
        read_corpus([path], Hyperparameters())


def test_read_corpus__refuses_files_that_it_can_not_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidCorpus, match="No such file"):
        read_corpus([tmp_path / "absent"], Hyperparameters())
    with pytest.raises(InvalidCorpus, match="no files"):
        read_corpus([tmp_path], Hyperparameters())


def texts_of(corpus: Corpus | WholeText, text: EncodedText) -> list[str]:
    return [corpus.charset.decode(text.ids[begin:end]) for begin, end in text.spans()]


def documents(folder: Path, lengths: list[int]) -> list[str]:
    """Write a file for each length, of a character of its own; return the texts."""
    texts = [chr(0x4E00 + number) * (length - 1) + "." for number, length in enumerate(lengths)]
    for number, text in enumerate(texts):
        (folder / f"{number:06}").write_text(text)
    return texts


def test_read_corpus__holds_out_the_ends_of_long_documents(tmp_path: Path) -> None:
    texts = documents(tmp_path, [20_000, 5_000, 41_001])
    corpus = read_corpus([tmp_path], Hyperparameters())
    tails = [2_000, 500, 4_101]
    assert texts_of(corpus, corpus.validation) == [text[-n:] for text, n in zip(texts, tails, strict=True)]
    assert texts_of(corpus, corpus.training) == [text[:-n] for text, n in zip(texts, tails, strict=True)]
    assert (corpus.training.scores_starts, corpus.validation.scores_starts) == (True, False)
    assert corpus.notes[-1] == "held out: 6,601 characters at the end of 3 of 3 documents"
    capped = read_corpus([tmp_path], Hyperparameters(validation_chars=6_000))
    assert [len(text) for text in texts_of(capped, capped.validation)] == [1_818, 454, 3_727]


def test_read_corpus__holds_out_longer_ends_of_fewer_documents_where_all_ends_would_be_short(tmp_path: Path) -> None:
    """An end of 20 characters, read from the zero state, says little about the model."""
    for number, (lengths, num_held) in enumerate([([3_000] * 40, 12), ([400] * 500, 50), ([900, 30] * 100, 20)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        texts = documents(folder, lengths)
        corpus = read_corpus([folder], Hyperparameters())
        held = texts_of(corpus, corpus.validation)
        assert all(len(text) == 1_000 or text in texts for text in held)
        assert 0.09 * sum(lengths) <= corpus.num_validation_chars <= 0.1 * sum(lengths)
        assert abs(len(held) - num_held) < 3
        assert corpus.num_chars == sum(lengths)
        pieces = sorted(texts_of(corpus, corpus.training) + held)
        # Every document is whole, or divided in two.
        whole = [text for text in texts if text in pieces]
        assert len(pieces) == len(whole) + 2 * (len(texts) - len(whole))


def test_read_corpus__of_two_short_documents_holds_out_one_end(tmp_path: Path) -> None:
    texts = documents(tmp_path, [300, 300])
    corpus = read_corpus([tmp_path], Hyperparameters())
    assert texts_of(corpus, corpus.validation) in ([texts[0][-60:]], [texts[1][-60:]])


def test_read_corpus__trains_on_short_documents_and_lines_beside_a_long_one(tmp_path: Path) -> None:
    """All short ones together are shorter than what is held out."""
    documents(tmp_path, [100_000] + [10] * 100)
    corpus = read_corpus([tmp_path], Hyperparameters())
    assert [len(text) for text in texts_of(corpus, corpus.validation)] == [10_000] + [1] * 100
    capped = read_corpus([tmp_path], Hyperparameters(validation_chars=5_000))
    assert [len(text) for text in texts_of(capped, capped.validation)] == [4_950]
    assert len(texts_of(capped, capped.training)) == 101
    lines = read_corpus([tmp_path], Hyperparameters(lines=True))
    assert [len(text) for text in texts_of(lines, lines.validation)] == [11] * 10


def test_read_corpus__holds_out_lines_from_everywhere(tmp_path: Path) -> None:
    lines = [f"{number:05}\n" for number in range(20_000)]
    (tmp_path / "sorted").write_text("\n".join(lines))  # with empty lines
    corpus = read_corpus([tmp_path / "sorted"], Hyperparameters(lines=True))
    training, held = texts_of(corpus, corpus.training), texts_of(corpus, corpus.validation)
    assert sorted(training + held) == lines
    assert held == sorted(held)
    assert len(held) == 2_000
    for step in (10, 100, 7):  # every part and every remainder is represented as often as it occurs
        counts = np.bincount([int(line) // (20_000 // step) for line in held], minlength=step)[:step]
        assert (abs(counts - 2_000 / step) <= 2).all()
        counts = np.bincount([int(line) % step for line in held])
        assert (abs(counts - 2_000 / step) <= 10).all()
    assert corpus.validation.scores_starts
    assert corpus.notes[-1] == "held out: 2,000 of 20,000 lines, spread evenly over the text"
    capped = read_corpus([tmp_path / "sorted"], Hyperparameters(lines=True, validation_chars=100))
    assert len(texts_of(capped, capped.validation)) == 16


@pytest.mark.parametrize("text", ["a line\n", "a line", "\n\n", "\r\n"])
def test_read_corpus__needs_two_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.raises(InvalidCorpus, match=r"has one line, and --lines needs two or more|no lines that are not empty"):
        read_corpus([tmp_path / "a.txt"], Hyperparameters(lines=True))


@given(
    st.lists(st.text("ab\r\n", max_size=12), min_size=1, max_size=12),
    st.integers(1, 7),
    st.booleans(),
    st.integers(2, 20),
    st.sampled_from([0.05, 0.5, 0.95]),
)
def test_read_corpus__loses_no_character(texts: list[str], block: int, lines: bool, cap: int, fraction: float) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for number, text in enumerate(texts):
            (Path(name) / f"{number:02}").write_bytes(text.encode())
        patch.setattr(corpus_module, "_BLOCK", block)
        patch.setattr(corpus_module, "_MIN_TAIL", 3)
        values = Hyperparameters(lines=lines, validation_chars=cap, validation_fraction=fraction, keep_newlines=True)
        try:
            whole = read_text([name], values)
            expected = "".join(texts_of(whole, whole.text))
            corpus = read_corpus([name], values)
        except InvalidCorpus:
            return
        pieces = texts_of(corpus, corpus.training) + texts_of(corpus, corpus.validation)
        assert all(pieces)
        assert sorted("".join(pieces)) == sorted(expected)
        if lines:
            assert sorted(pieces) == sorted(texts_of(whole, whole.text))
            smallest = min(map(len, pieces))
            assert corpus.num_validation_chars <= max(cap, smallest)
        else:
            assert corpus.num_validation_chars <= max(cap, 1)
        for part in (corpus.training, corpus.validation):
            assert part.starts[0] == 0
            assert (part.lengths > 0).all()


def test_last_part__of_documents_and_of_lines() -> None:
    text = EncodedText(np.arange(20), np.array([0, 5, 15]))
    assert last_part(text, 1, lines=False).starts.tolist() == [0, 5, 15]
    half = last_part(text, 0.5, lines=False)
    assert (half.ids.tolist(), half.starts.tolist()) == ([*range(10, 20)], [0, 5])
    half = last_part(text, 0.5, lines=True)  # no line is cut in two
    assert (half.ids.tolist(), half.starts.tolist()) == ([*range(15, 20)], [0])
    assert last_part(text, 0.01, lines=True).ids.tolist() == [*range(15, 20)]


def streams_of(num_chars: int, starts: tuple[int, ...] = (0,), **settings: int) -> Streams:
    """Return streams over a text whose characters are their positions."""
    return Streams(EncodedText(np.arange(num_chars), np.array(starts)), **settings)


def epoch(streams: Streams, number: int) -> torch.Tensor:
    """Return the characters of all windows of an epoch, (windows, T + 1, B)."""
    return torch.stack([streams.window(number, index).ids for index in range(streams.windows_per_epoch)])


@pytest.mark.parametrize("num_chars", [2, 30, 1000])
def test_streams__are_unbroken_and_read_in_order(num_chars: int) -> None:
    streams = streams_of(num_chars, batch=4, steps=7, seed=3)
    for number in range(5):
        windows = epoch(streams, number)
        assert windows.shape == (streams.windows_per_epoch, 8, 4)
        for stream in range(4):
            read = torch.cat([windows[:, :-1, stream].reshape(-1), windows[-1, -1:, stream]])
            assert torch.equal(read, (read[0] + torch.arange(len(read))) % num_chars)
        assert torch.equal(windows[1:, 0], windows[:-1, -1])
        assert len(torch.unique(windows)) == num_chars


def test_streams__start_every_epoch_at_an_offset_that_depends_on_the_seed() -> None:
    first = streams_of(1000, batch=4, steps=50, seed=3)
    again = streams_of(1000, batch=4, steps=50, seed=3)
    other = streams_of(1000, batch=4, steps=50, seed=4)
    starts = {int(epoch(first, number)[0, 0, 0]) for number in range(20)}
    assert len(starts) > 5
    assert torch.equal(epoch(first, 7), epoch(again, 7))
    assert not all(torch.equal(epoch(first, number), epoch(other, number)) for number in range(3))


def test_streams__reset_the_state_before_the_first_character_of_a_text() -> None:
    starts = (0, 1, 17, 500)
    streams = streams_of(600, starts, batch=4, steps=7, seed=3)
    for index in range(streams.windows_per_epoch):
        window = streams.window(0, index)
        assert torch.equal(window.resets, torch.isin(window.ids[1:], torch.tensor(starts)))
        assert window.is_counted.all()


def test_streams__reset_the_state_at_random_places_and_do_not_count_these() -> None:
    streams = streams_of(600, batch=4, steps=50, seed=3, restart_interval=20)
    windows = [streams.window(number, index) for number in range(50) for index in range(streams.windows_per_epoch)]
    for window in windows:
        is_start = window.ids[1:] == 0
        assert torch.equal(~window.is_counted, window.resets & ~is_start)
    share = torch.stack([~window.is_counted for window in windows]).double().mean()
    assert 0.04 < share < 0.06
    again = streams_of(600, batch=4, steps=50, seed=3, restart_interval=20).window(7, 1)
    assert torch.equal(again.resets, streams.window(7, 1).resets)


def test_streams__refuse_a_text_of_one_character() -> None:
    with pytest.raises(InvalidCorpus, match="at least two characters"):
        streams_of(1, batch=8, steps=50, seed=0)
