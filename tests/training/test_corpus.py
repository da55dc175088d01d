"""Reading a corpus, and dividing it into streams."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from service.errors import InvalidCorpus
from service.training.corpus import read_corpus
from service.training.streams import Streams


def test_read_corpus__normalises_the_text_and_digests_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    data = "\ufeffcafe\u0301\n".encode()
    path.write_bytes(data)
    corpus = read_corpus(path)
    assert corpus.text == "café\n"
    assert corpus.name == "a.txt"
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()


def test_split__holds_out_the_last_part(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    training, held_out = read_corpus(path).split(0.1)
    assert (len(training), held_out) == (90, "0123456789")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"good\nbad\xff", r"not UTF-8: byte 0xff at offset 8"),
        (b"\xef\xbb\xbfab\xc3", r"byte 0xc3 at offset 5"),
        (b"\x80", r"byte 0x80 at offset 0"),
    ],
)
def test_read_corpus__refuses_files_that_are_not_utf8_text(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(InvalidCorpus, match=message):
        read_corpus(path)


def test_read_corpus__refuses_files_that_it_can_not_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidCorpus, match="No such file"):
        read_corpus(tmp_path / "absent")
    with pytest.raises(InvalidCorpus, match="Is a directory"):
        read_corpus(tmp_path)


def epoch(streams: Streams, number: int) -> torch.Tensor:
    """Return all windows of an epoch, (windows, T + 1, B)."""
    return torch.stack([streams.window(number, index) for index in range(streams.windows_per_epoch)])


def test_streams__are_unbroken_and_read_in_order() -> None:
    streams = Streams(torch.arange(1000), batch=4, steps=7, seed=3)
    for number in range(5):
        windows = epoch(streams, number)
        assert windows.shape == (streams.windows_per_epoch, 8, 4)
        for stream in range(4):
            read = torch.cat([windows[:, :-1, stream].reshape(-1), windows[-1, -1:, stream]])
            assert torch.equal(read, torch.arange(int(read[0]), int(read[0]) + len(read)))
        assert torch.equal(windows[1:, 0], windows[:-1, -1])


def test_streams__start_every_epoch_at_an_offset_that_depends_on_the_seed() -> None:
    first = Streams(torch.arange(1000), batch=4, steps=50, seed=3)
    again = Streams(torch.arange(1000), batch=4, steps=50, seed=3)
    other = Streams(torch.arange(1000), batch=4, steps=50, seed=4)
    starts = {int(epoch(first, number)[0, 0, 0]) for number in range(20)}
    assert len(starts) > 5
    assert torch.equal(epoch(first, 7), epoch(again, 7))
    assert not all(torch.equal(epoch(first, number), epoch(other, number)) for number in range(3))


def test_streams__read_almost_the_whole_text() -> None:
    streams = Streams(torch.arange(10_000), batch=4, steps=10, seed=3)
    assert len(torch.unique(epoch(streams, 0))) > 10_000 - 4 * 10 - 20


def test_streams__refuse_a_text_that_is_too_short() -> None:
    with pytest.raises(InvalidCorpus, match="at least 450 are needed"):
        Streams(torch.arange(449), batch=8, steps=50, seed=0)
    assert epoch(Streams(torch.arange(450), batch=8, steps=50, seed=0), 0).max() <= 449
