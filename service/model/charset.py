"""Characters <-> ids, and what happens to characters that a model doesn't know.

Text is normalised to Unicode NFC first, so an accented letter is the same text whether it is written as one code point
or as two. A character is one code point of the normalised text; its id is its index in the charset.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCharset, UnknownCharacters, UnknownCharsRemedy, plural
from service.model.normal_form import code_points, joins, normalised_pieces

# What to do with unknown characters, see Charset.encode.
UnknownChars = Literal["error", "fold", "drop", "fold_drop"]

MAX_CHARSET = 65_536
_SHORT = 8  # characters up to which a text is encoded without numpy
_REMEMBERED = 8192  # unknown characters whose spelling is remembered
_MAX_NAMED = 10  # unknown characters that an error names at most

# Plain spellings of characters that Unicode's compatibility decomposition doesn't change, nearest first. Folding takes
# the first spelling whose characters are all in the charset.
_SINGLE_QUOTE, _DOUBLE_QUOTE = ("'", "’", "`"), ('"', "''", "'")
_DASH = ("-", "–", "—")
_SPELLINGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("‘’‚‛′‹›`´ʹʻʼʽ＇'", _SINGLE_QUOTE),
    **dict.fromkeys('“”„‟″«»＂"', _DOUBLE_QUOTE),
    **dict.fromkeys("−⁃⁻₋", _DASH),
    "…": ("...",), "•": ("*", "-"), "·": (".",), "×": ("x",), "÷": ("/",), "⁄": ("/",), "¦": ("|",),
    "ß": ("ss",), "ẞ": ("SS", "ss"), "æ": ("ae",), "Æ": ("AE", "Ae"), "œ": ("oe",), "Œ": ("OE", "Oe"),
    "ø": ("o",), "Ø": ("O",), "đ": ("d",), "Đ": ("D",), "ð": ("d",), "Ð": ("D",), "þ": ("th",), "Þ": ("TH", "Th"),
    "ł": ("l",), "Ł": ("L",), "ħ": ("h",), "Ħ": ("H",), "ı": ("i",), "ŧ": ("t",), "Ŧ": ("T",), "ŋ": ("n",),
    **dict.fromkeys("\r\v\f\x85\u2028\u2029", ("\n", " ")),
    "\t": (" ",), "\n": (" ",),
    "\u200b": ("",), "\u200c": ("",), "\u200d": ("",), "\ufeff": ("",), "\u00ad": ("",), "\u2060": ("",),
}  # fmt: skip


class Charset:
    """The characters that a model knows; the id of a character is its index in `characters`."""

    def __init__(self, characters: str) -> None:
        """Raises InvalidCharset if a character occurs twice or can't occur in NFC text."""
        if not characters:
            raise InvalidCharset("a charset needs at least one character")
        if len(characters) > MAX_CHARSET:
            raise InvalidCharset(f"a charset holds at most {MAX_CHARSET} characters, not {len(characters)}")
        seen: set[str] = set()
        for index, char in enumerate(characters):
            if char in seen:
                raise InvalidCharset(f"character {describe(char)} occurs twice in the charset, again at {index}")
            if 0xD800 <= ord(char) <= 0xDFFF:
                raise InvalidCharset(f"{describe(char)} at {index} is half a surrogate pair, not a character")
            if unicodedata.normalize("NFC", char) != char:
                raise InvalidCharset(f"character {describe(char)} at {index} never occurs in NFC text")
            seen.add(char)
        self.characters = characters

    @classmethod
    def from_corpus(cls, text: str) -> Charset:
        """Return the charset of all characters of `text` after NFC, in the order of their code points."""
        return cls("".join(sorted(set().union(*normalised_pieces(text)))))

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, char: str) -> bool:
        return char in self._id_of

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {char: index for index, char in enumerate(self.characters)}

    @cached_property
    def _table(self) -> Ids:
        """(highest code point + 2,) int64: code point -> id, or -1 for an unknown one. The last entry is always -1."""
        points = code_points(self.characters)
        table = np.full(int(points.max()) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        """(V,) little-endian code points of the characters."""
        return code_points(self.characters)

    def encode(self, text: str, unknown: UnknownChars = "error") -> Ids:
        """Return the (n,) int64 ids of `text` after NFC.

        Args:
            text: any text.
            unknown: what to do with unknown characters. `error` refuses the text; `fold` replaces each by the nearest
                known spelling (é by e, curly quotes by straight ones, any dash by a hyphen) and refuses the text if
                one has none; `drop` leaves them out; `fold_drop` folds, and leaves out those that have no spelling.

        Raises:
            UnknownCharacters: the text is refused; names the first unknown characters and their positions after NFC.
        """
        if len(text) <= _SHORT and text.isascii() and all(char in self._id_of for char in text):
            # For a single keystroke this is ten times faster than the general case below.
            return np.array([self._id_of[char] for char in text], np.int64)
        parts: list[Ids] = []
        position = 0
        for piece in normalised_pieces(text):
            part, num_chars = self._encode_piece(piece, unknown, position, len(text))
            parts.append(part)
            position += num_chars
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode_piece(self, text: str, unknown: UnknownChars, start: int, end: int) -> tuple[Ids, int]:
        """Return the ids of a piece in normal form, and its length before folding.

        start, end: position of the piece in the text, and the end of the text, for an error. The first piece that has
        to be refused ends the work.
        """
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids, len(text)
        text = self._decompose(text)
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids, len(text)
        if unknown == "drop":
            return ids[ids >= 0], len(text)
        if unknown in ("fold", "fold_drop"):
            folded = self._look_up(self._fold(text))
            if unknown == "fold_drop" or not (folded < 0).any():
                return folded[folded >= 0], len(text)
        # The error gives positions in the text before folding, because that is what the caller knows.
        places = np.flatnonzero(ids < 0).tolist()
        lacking = {text[place] for place in places}
        hopeless = {char for char in lacking if self._nearest(char) is None}
        remedies: tuple[UnknownCharsRemedy, ...] = (
            ("fold", "drop") if not hopeless else ("drop",) if hopeless == lacking else ("fold_drop", "drop")
        )
        what = "doesn't know"
        if unknown == "fold":
            what, places = "knows no similar character to", [place for place in places if text[place] in hopeless]
        raise _unknown_error(text, places, remedies, start, is_last=start + len(text) >= end, what=what)

    def written(self, text: str, unknown: UnknownChars = "error") -> str:
        """Return `text` in the characters in which the model reads and writes it. See `encode`."""
        return self.decode(self.encode(text, unknown))

    def spelling(self, char: str, unknown: UnknownChars) -> str | None:
        """Return what `encode` writes for a character: a string of known characters, or None if it has none."""
        if char in self:
            return char
        parts = self._parts(char)
        return parts if parts is not None or unknown not in ("fold", "fold_drop") else self._nearest(char)

    def exact(self, text: str) -> Ids:
        """Return the (n,) int64 ids of exactly these n characters, without normalisation. The inverse of `decode`.

        Raises UnknownCharacters.
        """
        ids = self._look_up(text)
        if (ids < 0).any():
            raise _unknown_error(text, np.flatnonzero(ids < 0).tolist())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text with these ids. Raises IndexError for an id outside 0..V-1."""
        indices = ids if isinstance(ids, np.ndarray) else list(ids)
        if len(indices) > _SHORT:
            array = np.asarray(indices, np.int64)
            if array.min() < 0:
                raise IndexError(f"no character has the id {array.min()}")
            return self._points[array].tobytes().decode("utf-32-le")
        indices = [*map(int, indices)]
        if indices and min(indices) < 0:
            raise IndexError(f"no character has the id {min(indices)}")
        return "".join(map(self.characters.__getitem__, indices))

    def _decompose(self, text: str) -> str:
        """Replace unknown characters by their letter and combining marks, if the charset has these.

        A model with such a charset generates letter and mark as two characters, and must be able to read them.
        """
        parts_of = {char: self._parts(char) for char in set(text) if char not in self}
        return text.translate({ord(char): parts for char, parts in parts_of.items() if parts is not None})

    def _look_up(self, text: str) -> Ids:
        points = code_points(text)
        return self._table[np.minimum(points, len(self._table) - 1)]

    def _fold(self, text: str) -> str:
        if "\r" not in self:
            text = text.replace("\r\n", "\n")
        nearest = {char: self._nearest(char) for char in set(text) if char not in self}
        return text.translate({ord(char): near for char, near in nearest.items() if near is not None})

    # Both remember what they found for the characters that were unknown last.

    @cached_property
    def _parts(self) -> Callable[[str], str | None]:
        """A function that returns the letter and marks of an unknown character, or None if some are unknown too."""

        def parts(char: str) -> str | None:
            decomposed = unicodedata.normalize("NFD", char)
            return decomposed if all(part in self for part in decomposed) else None

        return lru_cache(_REMEMBERED)(parts)

    @cached_property
    def _nearest(self) -> Callable[[str], str | None]:
        """A function that returns what `fold` writes for an unknown character, or None if no spelling is known."""

        def nearest(char: str) -> str | None:
            return next((near for near in _spellings(char) if all(part in self for part in near)), None)

        return lru_cache(_REMEMBERED)(nearest)


def _unknown_error(
    text: str,
    positions: Sequence[int],
    remedies: Sequence[UnknownCharsRemedy] = (),
    start: int = 0,
    *,
    is_last: bool = True,
    what: str = "doesn't know",
) -> UnknownCharacters:
    """Describe the unknown characters at these positions of a piece that begins at `start` of the text, once each.

    is_last: no text follows the piece, in which there may be more. what: what the model lacks, before the characters.
    """
    places: dict[str, list[int]] = {}
    for position in positions:
        places.setdefault(text[position], []).append(start + position)
    at_least = "" if is_last else "at least "
    named = ", ".join(
        f"{describe(char)} at {first}"
        + (f" and {at_least}{len(others)} more places" if len(others) > 1 else f" and {others[0]}" if others else "")
        for char, (first, *others) in islice(places.items(), _MAX_NAMED)
    )
    num_others = len(places) - _MAX_NAMED
    named += (
        f", and {at_least}{plural(num_others, 'other')}"
        if num_others > 0
        else ""
        if is_last
        else ", and possibly others"
    )
    if positions and start + positions[0] == 0 and joins(text[0]):
        named += " (a text begins with it, so it has no letter to join: send a letter and its marks in one text)"
    return UnknownCharacters(f"the model {what} {named}", remedies)


def describe(char: str) -> str:
    """Return a character in a form that is safe in any log, header or terminal, such as 'é' (U+00E9)."""
    shown = f"'{char}' " if char.isprintable() else ""
    return f"{shown}(U+{ord(char):04X})" if shown else f"U+{ord(char):04X}"


def _spellings(char: str) -> Iterable[str]:
    """Yield other ways to write a character, nearest first."""
    yield from _SPELLINGS.get(char, ())
    category = unicodedata.category(char)
    if category == "Pd":
        yield from _DASH
    if category == "Zs":
        yield " "
    # NFD stays in the script (Cyrillic yo -> ye); NFKD also resolves ligatures, full-width forms and superscripts.
    for form in ("NFD", "NFKD"):
        plain = "".join(part for part in unicodedata.normalize(form, char) if not unicodedata.combining(part))
        if plain != char:
            yield plain
            for part in dict.fromkeys(plain):
                if part in _SPELLINGS or part == "⁄":
                    yield "".join(_SPELLINGS.get(p, (p,))[0] for p in plain)
                    break
    yield char.swapcase()
    stripped = "".join(p for p in unicodedata.normalize("NFKD", char) if not unicodedata.combining(p))
    if stripped != char:
        yield stripped.swapcase()
