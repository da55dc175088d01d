"""Characters <-> ids, and what happens to characters that a model doesn't know.

Text is normalised to Unicode NFC first, so an accented letter is the same text whether it is written as one code point
or as two. A character is one code point of the normalised text; its id is its index in the charset.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCharset, UnknownCharacters

UnknownChars = Literal["error", "fold", "drop"]  # what to do with unknown characters, see Charset.encode

MAX_CHARSET = 65_536
_SHORT = 8  # characters up to which a text is encoded without numpy
_MAX_FOLDED = 4096  # different characters: finding a spelling takes some 10 us for each
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
        return cls("".join(sorted(set(unicodedata.normalize("NFC", text)))))

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
        points = _code_points(self.characters)
        table = np.full(int(points.max()) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode(self, text: str, unknown: UnknownChars = "error") -> Ids:
        """Return the (n,) int64 ids of `text` after NFC.

        Args:
            text: any text.
            unknown: what to do with unknown characters. `error` refuses the text; `fold` replaces each by the nearest
                known spelling (é by e, curly quotes by straight ones, any dash by a hyphen) and refuses the text if
                one has none; `drop` leaves them out.

        Raises:
            UnknownCharacters: the text is refused; names the first unknown characters and their positions after NFC.
        """
        if len(text) <= _SHORT and text.isascii() and all(char in self._id_of for char in text):
            # For a single keystroke this is ten times faster than the general case below.
            return np.array([self._id_of[char] for char in text], np.int64)
        text = unicodedata.normalize("NFC", text)
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids
        text = self._decompose(text)
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids
        if unknown == "drop":
            return ids[ids >= 0]
        if unknown == "fold":
            nearest = self._nearest_of(text)
            ids = self._look_up(self._fold(text, nearest))
            if not (ids < 0).any():
                return ids
            # The error gives positions in the text before folding, because that is what the caller knows.
            unknown_at = [place for place, char in enumerate(text) if char not in self and nearest.get(char) is None]
            raise self._unknown_error(text, unknown_at, folded=True)
        raise self._unknown_error(text, np.flatnonzero(ids < 0).tolist(), folded=False)

    def exact(self, text: str) -> Ids:
        """Return the (n,) int64 ids of exactly these n characters, without normalisation. The inverse of `decode`.

        Raises UnknownCharacters.
        """
        ids = self._look_up(text)
        if (ids < 0).any():
            raise self._unknown_error(text, np.flatnonzero(ids < 0).tolist(), folded=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text with these ids. Raises IndexError for an id outside 0..V-1."""
        indices = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if indices and min(indices) < 0:
            raise IndexError(f"no character has the id {min(indices)}")
        return "".join(map(self.characters.__getitem__, indices))

    def _decompose(self, text: str) -> str:
        """Replace unknown characters by their letter and combining marks, if the charset has these.

        A model with such a charset generates letter and mark as two characters, and must be able to read them.
        """
        parts_of = {char: unicodedata.normalize("NFD", char) for char in set(text) if char not in self}
        return text.translate({ord(c): parts for c, parts in parts_of.items() if all(part in self for part in parts)})

    def _look_up(self, text: str) -> Ids:
        points = _code_points(text)
        return self._table[np.minimum(points, len(self._table) - 1)]

    def _nearest_of(self, text: str) -> dict[str, str | None]:
        """Return `_nearest` of the first unknown characters, of which a text that can be folded has far fewer."""
        unknown = islice((char for char in dict.fromkeys(text) if char not in self), _MAX_FOLDED)
        return {char: self._nearest(char) for char in unknown}

    def _fold(self, text: str, nearest: dict[str, str | None]) -> str:
        if "\r" not in self:
            text = text.replace("\r\n", "\n")
        return text.translate({ord(char): near for char, near in nearest.items() if near is not None})

    def _nearest(self, char: str) -> str | None:
        """Return what `fold` writes for an unknown character, or None if no spelling of it is known."""
        for spelling in _spellings(char):
            if all(part in self for part in spelling):
                return spelling
        return None

    def _unknown_error(self, text: str, positions: Iterable[int], *, folded: bool) -> UnknownCharacters:
        positions = list(positions)
        named = ", ".join(f"{describe(text[position])} at {position}" for position in positions[:_MAX_NAMED])
        more = f" and {len(positions) - _MAX_NAMED} more" if len(positions) > _MAX_NAMED else ""
        what = "knows no similar character to" if folded else "doesn't know"
        hint = 'unknown_chars "drop" leaves such characters out'
        if not folded:
            hint = f'unknown_chars "fold" replaces such characters by the nearest known ones; {hint}'
        return UnknownCharacters(f"the model {what} {named}{more}; {hint}")


def describe(char: str) -> str:
    """Return a character in a form that is safe in any log, header or terminal, such as 'é' (U+00E9)."""
    shown = f"'{char}' " if char.isprintable() else ""
    return f"{shown}(U+{ord(char):04X})" if shown else f"U+{ord(char):04X}"


def _code_points(text: str) -> NDArray[np.uint32]:
    # JSON escapes can contain half surrogate pairs. They pass here, and are then unknown characters.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


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
