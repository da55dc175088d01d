"""Reads a corpus once, block by block, into ids of the smallest dtype: about two bytes a character at the peak.

A charset is known only when everything was read. Until then characters have numbers in the order in which they first
appear, and the blocks of numbers are translated into ids at the end. So a corpus may come from a pipe, and a file that
changes meanwhile can't give two different texts.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCorpus, UnknownCharacters, plural
from service.model.charset import MAX_CHARSET, Charset, UnknownChars, describe
from service.model.normal_form import code_points, normalised_blocks
from service.training.sources import Source, cannot_read, listed

_BLOCK_BYTES = 1 << 20  # a few times more memory is needed while a block is read
_NUM_POINTS = 0x110000
_MAX_NAMED = 5  # characters that a note or an error names at most
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}
_FORMATS = {
    b"\x1f\x8b": "gzip data: unpack it first, for example with gunzip",
    b"PK\x03\x04": "a zip file, as EPUB and DOCX files are: unpack it or save it as plain text first",
    b"%PDF-": "a PDF: extract its text first, for example with pdftotext",
    b"BZh": "bzip2 data: unpack it first, for example with bunzip2",
    b"\xfd7zXZ\x00": "xz data: unpack it first, for example with unxz",
    b"\x28\xb5\x2f\xfd": "zstd data: unpack it first, for example with unzstd",
}


class _Binary(Exception):
    """The data is no text. The message says what it is and what to do."""


class Reader:
    """Reads documents, and then encodes all of them.

    Line ends of CR LF and CR become LF unless `keep_newlines` is given. With `lines` every document ends with LF.
    """

    def __init__(self, *, keep_newlines: bool, lines: bool) -> None:
        self._keep_newlines, self._lines = keep_newlines, lines
        self._table = np.full(_NUM_POINTS, -1, np.int32)  # code point -> number, -1 for one that has not appeared
        self._characters = ""  # by number
        self._counts = np.zeros(0, np.int64)  # by number
        self._documents: list[list[NDArray[np.unsignedinteger[Any]]]] = []  # blocks of numbers of each document
        self._sums: list[str] = []
        self.sources: list[Source] = []  # of the documents
        self._notes: list[str] = []  # about characters
        self._converted: list[str] = []  # names of documents whose line ends were converted
        self._left_out: dict[str, list[str]] = {}  # names of documents that are not read, by the reason

    def read(self, source: Source, progress: Callable[[int], object]) -> None:
        """Read a document. An empty one is left out, and so is a binary file that the user has not named.

        Calls `progress` with the number of bytes read since its last call. Raises InvalidCorpus.
        """
        blocks: list[NDArray[np.unsignedinteger[Any]]] = []
        digest = hashlib.sha256()
        try:
            with _open(source) as file:
                for text in self._texts(source, file, digest, progress):
                    blocks.append(self._numbers(text))  # noqa: PERF401 - the blocks so far are needed after an error
        except _Binary as error:
            for block in blocks:
                self._counts -= np.bincount(block, minlength=len(self._counts))
            if not source.is_found:
                raise InvalidCorpus(f"{source.place} is {error}", param="corpus") from error
            self._left_out.setdefault("binary, left out", []).append(source.name)
            return
        except OSError as error:
            raise cannot_read(source, error) from error
        if not blocks:
            self._left_out.setdefault("empty, left out", []).append(source.name)
            return
        if self._lines and self._characters[blocks[-1][-1]] != "\n":
            blocks.append(self._numbers("\n"))
        self._documents.append(blocks)
        self._sums.append(digest.hexdigest())
        self.sources.append(source)

    def _texts(self, source: Source, file: BinaryIO, digest: Any, progress: Callable[[int], object]) -> Iterator[str]:
        """Yield the text of a file in pieces that are not empty, in normal form C, without its byte order mark."""
        newlines = io.IncrementalNewlineDecoder(None, translate=True)

        def converted() -> Iterator[str]:
            for text in _decoded(source, file, digest, progress):
                yield text if self._keep_newlines else newlines.decode(text)
            yield newlines.decode("", final=True)

        yield from normalised_blocks(converted())
        if newlines.newlines not in (None, "\n"):
            self._converted.append(source.name)

    def _numbers(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        """Return the numbers of the characters of a text, and count them."""
        points = np.frombuffer(text.encode(), np.uint8) if text.isascii() else code_points(text)
        numbers = self._table[points]
        if (numbers < 0).any():
            new = np.unique(points[numbers < 0])
            self._table[new] = np.arange(len(self._characters), len(self._characters) + len(new))
            self._characters += "".join(map(chr, new.tolist()))
            numbers = self._table[points]
        counts = np.bincount(numbers, minlength=len(self._characters))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        return numbers.astype(np.min_scalar_type(len(self._characters) - 1))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the only document's bytes.

        Of several documents: of their sums in hexadecimal, a line each, as `sha256sum a b | cut -c1-64 | sha256sum`.
        """
        if len(self._sums) == 1:
            return self._sums[0]
        return hashlib.sha256("".join(f"{digest}\n" for digest in self._sums).encode()).hexdigest()

    def charset(self, known: str, given: str, min_count: int) -> Charset:
        """Return the charset of what was read.

        Args:
            known: characters that come first, in this order.
            given: the other characters, in this order; empty takes those that occur, in the order of code points.
            min_count: characters that occur fewer times than this are not taken; 0 takes all.

        Raises InvalidCorpus if no character or too many are left, and InvalidCharset.
        """
        counts = zip(self._characters, self._counts.tolist(), strict=True)
        others = given or "".join(sorted(char for char, count in counts if count >= max(1, min_count)))
        first = set(known)
        characters = known + "".join(char for char in others if char not in first)
        if not characters:
            raise InvalidCorpus(
                f"no character occurs {plural(min_count, 'time', ',')}: lower --min-count", param="min_count"
            )
        if len(characters) > MAX_CHARSET:
            raise InvalidCorpus(
                f"the text has {len(characters):,} different characters, a model has at most {MAX_CHARSET:,}: "
                "leave out rare ones with --min-count 10",
                param="corpus",
            )
        return Charset(characters)

    def encode(
        self, charset: Charset, unknown: UnknownChars, *, or_drop: bool = False
    ) -> tuple[NDArray[np.unsignedinteger[Any]], Ids]:
        """Return all documents one after the other as ids, and their lengths, int64. Releases what was read.

        Each character is encoded as `charset.encode` does. With `or_drop` those without a known spelling are left out
        instead of refused. Adds notes about what was folded or left out. Raises UnknownCharacters.
        """
        spellings = [charset.spelling(char, unknown) for char in self._characters]
        unspelt = [number for number, spelling in enumerate(spellings) if spelling is None and self._counts[number]]
        if unspelt and unknown != "drop" and not or_drop:
            raise self._unknown(unspelt, is_folded=unknown == "fold")
        folded = [
            number
            for number, (char, spelling) in enumerate(zip(self._characters, spellings, strict=True))
            if spelling not in (None, char) and self._counts[number]
        ]
        self._note("characters folded to known ones", folded, spellings)
        self._note("characters left out", unspelt, spellings)
        pieces = [charset.exact(spelling or "") for spelling in spellings]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        dtype = np.min_scalar_type(len(charset) - 1)
        ids: NDArray[np.unsignedinteger[Any]] = np.empty(int(lengths @ self._counts), dtype)
        translate = _translation(pieces, lengths, dtype)
        is_pair = self._pairs(charset) if unknown == "fold" else None
        document_lengths = np.zeros(len(self._documents), np.int64)
        end = 0
        for index, blocks in enumerate(self._documents):
            begin = end
            for place, block in enumerate(blocks):
                part = translate(block if is_pair is None else block[~is_pair(block)])
                ids[end : end + len(part)] = part
                end += len(part)
                blocks[place] = block[:0].copy()  # releases its memory
            document_lengths[index] = end - begin
        self._documents = []
        return ids[:end], document_lengths

    def _pairs(self, charset: Charset) -> Callable[[NDArray[Any]], NDArray[np.bool_]] | None:
        """Return a function that finds each CR before an LF: folding leaves it out if the charset has no CR.

        Both are always in one block.
        """
        if "\r" in charset or "\r" not in self._characters or "\n" not in self._characters:
            return None
        cr, lf = self._characters.index("\r"), self._characters.index("\n")

        def is_pair(block: NDArray[Any]) -> NDArray[np.bool_]:
            found: NDArray[np.bool_] = block == cr
            found[:-1] &= block[1:] == lf
            found[-1:] = False
            return found

        return is_pair

    def _note(self, what: str, numbers: list[int], spellings: list[str | None]) -> None:
        """Add a note about the characters with these numbers, the most frequent first."""
        if not numbers:
            return
        numbers = sorted(numbers, key=lambda number: -self._counts[number])
        names = [
            describe(self._characters[number]) + (f" as {spellings[number]!r}" if spellings[number] is not None else "")
            for number in numbers
        ]
        self._notes.append(f"{what}, {int(self._counts[numbers].sum()):,} in all: {listed(names)}")

    def _unknown(self, numbers: list[int], *, is_folded: bool) -> UnknownCharacters:
        numbers = sorted(numbers, key=lambda number: -self._counts[number])
        named = [f"{describe(self._characters[n])} ({self._counts[n]:,} times)" for n in numbers[:_MAX_NAMED]]
        more = f" and {len(numbers) - _MAX_NAMED:,} more" if len(numbers) > _MAX_NAMED else ""
        what = "has no character similar to" if is_folded else "lacks"
        hint = "--unknown-chars drop leaves such characters out"
        if not is_folded:
            hint = f"--unknown-chars fold replaces such characters by the nearest known ones, {hint}"
        return UnknownCharacters(f"the charset {what} {', '.join(named)}{more}: {hint}", param="unknown_chars")

    def notes(self) -> list[str]:
        """Return a line about each thing that was left out or converted."""
        notes = [f"{what}: {listed(names)}" for what, names in self._left_out.items()]
        if self._converted:
            names = listed(self._converted)
            notes.append(f"line ends of CR LF or CR became LF (--keep-newlines leaves them as they are): {names}")
        return notes + self._notes


def _open(source: Source) -> AbstractContextManager[BinaryIO]:
    if source.path is not None:
        return source.path.open("rb")
    if sys.stdin is None:
        raise InvalidCorpus("standard input is closed", param="corpus")
    return nullcontext(sys.stdin.buffer)


def _decoded(source: Source, file: BinaryIO, digest: Any, progress: Callable[[int], object]) -> Iterator[str]:
    """Yield the text of a UTF-8 file without its byte order mark. Raises _Binary and InvalidCorpus."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, is_first, head = 0, True, b""
    while True:
        block = file.read(_BLOCK_BYTES)
        digest.update(block)
        if not offset:
            head = block
            _check_head(source, head)
        if b"\0" in block:
            _refuse_nul(source, head, offset + block.index(b"\0"))
        begin = offset - len(decoder.getstate()[0])  # the offset of the first byte that is not decoded yet
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = begin + error.start
            raise InvalidCorpus(
                f"{source.place} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place} "
                f"({error.reason}). Convert it first, {_conversion(source, 'WINDOWS-1252')}, with the encoding that "
                f"it has in place of WINDOWS-1252{_exclusion(source)}",
                param="corpus",
            ) from error
        offset += len(block)
        if text and is_first:
            text, is_first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return
        progress(len(block))


def _check_head(source: Source, head: bytes) -> None:
    """Refuse a file whose first bytes are those of another encoding or of a binary format."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            raise _encoding_error(source, encoding)
    for magic, description in _FORMATS.items():
        if head.startswith(magic):
            raise _Binary(description)


def _refuse_nul(source: Source, head: bytes, offset: int) -> None:
    """Refuse data with a NUL at `offset`. Raises InvalidCorpus if it is probably a text in UTF-16 or UTF-32."""
    sample = np.frombuffer(head[: len(head) // 4 * 4][:4096], np.uint8).reshape(-1, 4)
    shares = (sample == 0).mean(axis=0) if len(sample) else np.zeros(4)  # of NULs, by the position modulo 4
    is_full = shares > 0.3  # a text in a Latin script has a NUL in nearly every character
    encoding = {
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
    }.get(tuple(is_full.tolist()))
    if encoding is not None:
        raise _encoding_error(source, encoding)
    raise _Binary(
        f"no text: it has a NUL byte at offset {offset}. If it is a text in UTF-16, convert it first, "
        f"{_conversion(source, 'UTF-16')}"
    )


def _encoding_error(source: Source, encoding: str) -> InvalidCorpus:
    return InvalidCorpus(
        f"{source.place} is probably {encoding}, not UTF-8: convert it first, "
        f"{_conversion(source, encoding)}{_exclusion(source)}",
        param="corpus",
    )


def _conversion(source: Source, encoding: str) -> str:
    name = "FILE" if source.path is None else shlex.quote(source.place)
    return f"for example with iconv -f {encoding} -t UTF-8 {name} > new.txt"


def _exclusion(source: Source) -> str:
    """Return how to leave out a file that a folder or a pattern contains. It is not left out silently: it has text."""
    if not source.is_found:
        return ""
    return f"; to leave it out, move it away or rename it to .{source.name}, because hidden files are not read"


def _translation(
    pieces: list[Ids], lengths: Ids, dtype: np.dtype[Any]
) -> Callable[[NDArray[Any]], NDArray[np.unsignedinteger[Any]]]:
    """Return a function that replaces each number by its piece of ids."""
    flat = np.concatenate([np.zeros(0, np.int64), *pieces]).astype(dtype)
    if (lengths == 1).all():
        return lambda block: flat[block]
    offsets = np.cumsum(lengths) - lengths

    def translate(block: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        sizes = lengths[block]
        ends = np.cumsum(sizes)
        places = np.repeat(offsets[block] - (ends - sizes), sizes)
        return flat[places + np.arange(len(places))]

    return translate
