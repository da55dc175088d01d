"""Reading a corpus, and dividing it into streams."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import InvalidCorpus
from service.model.encoded_text import EncodedText
from service.training.corpus import read_corpus
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
