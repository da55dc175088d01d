"""Reading a corpus: the same text for any size of blocks, and clear refusals of what is no UTF-8 text."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tempfile
import unicodedata
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidCharset, InvalidCorpus, UnknownCharacters
from service.model.charset import Charset
from service.training import corpus as corpus_module
from service.training import reading
from service.training.corpus import WholeText, read_text
from service.training.hyperparameters import Hyperparameters

# Parts that are more than one byte, character or line end, and that compose or don't.
PARTS = [
    "a",
    "b",
    "\n",
    "\r",
    "\r\n",
    "é",
    "e\u0301",
    "\u0301",
    "\u0327\u0301",
    "ﬁ",
    "한",
    "\u1112\u1161\u11ab",
    "…",
    "𝒳",
]
PARTS += ["\ufeff", "\u200b", "字", "“"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def read(data: bytes, known: str = "", **settings: object) -> WholeText:
    """Read a file with these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_bytes(data)
        return read_text([Path(folder) / "text"], Hyperparameters.model_validate(settings), known=known)


def text_of(whole: WholeText) -> str:
    return whole.charset.decode(whole.text.ids)


def without_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


@given(TEXTS, st.integers(1, 9), st.booleans())
def test_read_text__is_the_same_for_blocks_of_any_size(text: str, block: int, keep: bool) -> None:
    data = text.encode()
    expected = without_mark(text)
    if not keep:
        expected = expected.replace("\r\n", "\n").replace("\r", "\n")
    charset = Charset.from_corpus(expected) if expected else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK_BYTES", block)
        if charset is None:
            with pytest.raises(InvalidCorpus, match="is empty"):
                read(data)
            return
        whole = read(data, keep_newlines=keep)
    assert whole.charset.characters == charset.characters
    assert whole.text.ids.tolist() == charset.encode(expected).tolist()
    assert whole.sha256 == hashlib.sha256(data).hexdigest()
    assert bool(whole.notes) == ("\r" in text and not keep)


@given(TEXTS, st.integers(1, 9), st.sampled_from(["ab", "ae\u0301\n", "a\re", 'a\n"h.', "efi"]), st.booleans())
def test_read_text__folds_and_drops_as_the_charset_does(text: str, block: int, characters: str, keep: bool) -> None:
    charset = Charset(characters)
    expected = without_mark(text) if keep else without_mark(text).replace("\r\n", "\n").replace("\r", "\n")
    for unknown in ("error", "fold", "drop"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_BLOCK_BYTES", block)
            try:
                ids = charset.encode(expected, unknown).tolist()
            except UnknownCharacters:
                with pytest.raises(UnknownCharacters):
                    read(text.encode(), charset=characters, unknown_chars=unknown, keep_newlines=keep)
                continue
            if not ids:
                with pytest.raises(InvalidCorpus):
                    read(text.encode(), charset=characters, unknown_chars=unknown, keep_newlines=keep)
                continue
            whole = read(text.encode(), charset=characters, unknown_chars=unknown, keep_newlines=keep)
        assert whole.text.ids.tolist() == ids


@given(TEXTS, st.integers(1, 9), st.booleans())
def test_read_text__of_lines_has_a_text_for_each_line(text: str, block: int, keep: bool) -> None:
    expected = without_mark(text)
    if not keep:
        expected = expected.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line + "\n" for line in unicodedata.normalize("NFC", expected).split("\n") if line not in ("", "\r")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK_BYTES", block)
        patch.setattr(corpus_module, "_BLOCK", block)
        if not lines:
            with pytest.raises(InvalidCorpus):
                read(text.encode(), lines=True, keep_newlines=keep)
            return
        whole = read(text.encode(), lines=True, keep_newlines=keep)
    assert [whole.charset.decode(whole.text.ids[begin:end]) for begin, end in whole.text.spans()] == lines


def test_read_text__takes_the_smallest_dtype_and_any_number_of_kinds() -> None:
    for num_kinds, dtype in [(2, "uint8"), (256, "uint8"), (257, "uint16"), (40_000, "uint16")]:
        text = "".join(map(chr, [*range(0x4E00, 0x4E00 + min(num_kinds, 20_000))]))
        text += "".join(map(chr, range(0x20000, 0x20000 + num_kinds - len(text))))
        whole = read((text * 2).encode())
        assert (len(whole.charset), whole.text.ids.dtype.name) == (num_kinds, dtype)
        assert text_of(whole) == text * 2
    many = "".join(map(chr, [*range(0x3400, 0xD7FF), *range(0x20000, 0x2A000)]))
    with pytest.raises(InvalidCorpus, match=r"different characters, a model has at most 65,536: .*--min-count"):
        read(many.encode())
    assert len(read(many.encode() + many[:100].encode(), min_count=2).charset) == 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Hello\n".encode("utf-16"), r"probably UTF-16LE.*iconv -f UTF-16LE -t UTF-8 \S*text"),
        ("\ufeffHello\n".encode("utf-16-be"), "probably UTF-16BE"),
        ("Hello\n".encode("utf-32"), "probably UTF-32LE"),
        ("\ufeffHello".encode("utf-32-be"), "probably UTF-32BE"),
        ("Hello, world. \n".encode("utf-16-le"), "probably UTF-16LE"),
        ("Hello, world. \n".encode("utf-16-be"), "probably UTF-16BE"),
        ("Hello, world. \n".encode("utf-32-le"), "probably UTF-32LE"),
        ("Hello, world. \n".encode("utf-32-be"), "probably UTF-32BE"),
        ("Grüße".encode("latin-1"), r"not UTF-8: byte 0xfc at offset 2 .*iconv -f WINDOWS-1252 -t UTF-8 \S*text"),
        (b"text" * 300_000 + b"\0" + b"more", "no text: it has a NUL byte at offset 1200000"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "byte 0x89 at offset 0|NUL byte at offset 8"),
        (gzip.compress(b"text", mtime=0), "gzip data: unpack it first"),
        (b"PK\x03\x04docx", "zip file, as EPUB and DOCX"),
        (b"%PDF-1.7\n", "a PDF: extract its text first"),
    ],
)
def test_read_text__refuses_what_is_no_utf8_text(data: bytes, message: str) -> None:
    with pytest.raises(InvalidCorpus, match=message) as caught:
        read(data)
    assert caught.value.param == "corpus"
    assert len(caught.value.message.splitlines()) == 1


def test_read_text__leaves_binary_files_of_a_folder_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 8)
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / "b.png").write_bytes(b"letters that no other file has: qvxz \0 and more")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"two")
    whole = read_text([tmp_path], Hyperparameters())
    assert text_of(whole) == "one\ntwo"
    assert whole.text.starts.tolist() == [0, 4]
    assert whole.charset.characters == "\nenotw"
    assert whole.notes == (
        "binary, left out: b.png",
        "empty, left out: c.txt",
        "line ends of CR LF or CR became LF (--keep-newlines leaves them as they are): a.txt",
    )
    digests = "".join(hashlib.sha256(data).hexdigest() + "\n" for data in (b"one\r\n", b"two"))
    assert whole.sha256 == hashlib.sha256(digests.encode()).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_read_text__a_text_in_another_encoding_stops_a_folder_until_it_is_hidden(tmp_path: Path, encoding: str) -> None:
    """It has text that the user may want, so it is not left out as a binary file is."""
    odd = tmp_path / "odd.txt"
    odd.write_bytes("Grüße".encode(encoding))
    (tmp_path / "usual.txt").write_text("text")
    for words in ([tmp_path], [tmp_path / "*.txt"]):
        with pytest.raises(InvalidCorpus, match=r"odd\.txt is .* move it away or rename it to \.odd\.txt"):
            read_text(words, Hyperparameters())
    with pytest.raises(InvalidCorpus, match=r"> new\.txt") as caught:
        read_text([odd], Hyperparameters())
    assert "rename" not in caught.value.message
    odd.rename(tmp_path / ".odd.txt")
    assert text_of(read_text([tmp_path], Hyperparameters())) == "text"
    assert text_of(read_text([tmp_path / "*.txt"], Hyperparameters())) == "text"


def test_read_text__reads_standard_input_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"input")))
    reported: list[int] = []
    whole = read_text([tmp_path / "a.txt", "-"], Hyperparameters(), reported.append)
    assert (text_of(whole), whole.text.starts.tolist(), whole.name) == ("fileinput", [0, 4], "2 files")
    assert sum(reported) == 9
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidCorpus, match="standard input is closed"):
        read_text(["-"], Hyperparameters())


def test_read_text__takes_known_characters_first() -> None:
    whole = read(b"hello", known="xol")
    assert whole.charset.characters == "xoleh"
    assert read(b"hello", known="xol", charset="hello"[:3] + "o").charset.characters == "xolhe"
    with pytest.raises(InvalidCharset):
        read(b"hello", charset="hello")


def test_read_text__folds_or_drops_rare_characters() -> None:
    data = ("e" * 10 + "é" * 3 + "字" * 2 + "漢").encode()
    folded = read(data, min_count=5)
    assert (folded.charset.characters, text_of(folded)) == ("e", "e" * 13)
    assert folded.notes == (
        "characters folded to known ones, 3 in all: 'é' (U+00E9) as 'e'",
        "characters left out, 3 in all: '字' (U+5B57), '漢' (U+6F22)",
    )
    dropped = read(data, min_count=5, unknown_chars="drop")
    assert text_of(dropped) == "e" * 10
    assert text_of(read(data, min_count=2)) == "e" * 10 + "é" * 3 + "字" * 2
    assert text_of(read(data, min_count=5, known="漢")) == "e" * 13 + "漢"
    with pytest.raises(InvalidCorpus, match="no character occurs 11 times: lower --min-count"):
        read(data, min_count=11)
    with pytest.raises(InvalidCorpus, match="use one of them"):
        read(data, min_count=5, charset="e")


def test_read_text__says_which_characters_the_charset_lacks() -> None:
    with pytest.raises(
        UnknownCharacters, match=r"lacks 'b' \(U\+0062\) \(3 times\), U\+000A \(1 times\): .*fold.*drop"
    ):
        read(b"abbb\na", charset="a")
    with pytest.raises(UnknownCharacters, match="has no character similar to 'b'"):
        read(b"abbb\na", charset="a", unknown_chars="fold")
    with pytest.raises(InvalidCorpus, match="--lines needs it in the charset"):
        read(b"abbb\na", charset="ab", unknown_chars="drop", lines=True)
    with pytest.raises(InvalidCorpus, match="no characters"):
        read(b"bbb", charset="a", unknown_chars="drop")


def test_read_text__reads_many_small_files_as_documents(tmp_path: Path) -> None:
    for first, second in product("abc", "xyz"):
        (tmp_path / (first + second)).write_text(first + second)
    whole = read_text([tmp_path], Hyperparameters())
    assert text_of(whole) == "axayazbxbybzcxcycz"
    assert whole.text.starts.tolist() == [*range(0, 18, 2)]
    in_lines = read_text([tmp_path], Hyperparameters(lines=True))
    assert text_of(in_lines).split() == [first + second for first, second in product("abc", "xyz")]
