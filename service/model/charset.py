"""Characters <-> ids, and what happens to characters that a model doesn't know.

Text is normalised to Unicode NFC before anything else, so that a letter and its accent written as one code point or as
two are the same text. A character is one code point of the normalised text; its id is its place in the charset.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids
from service.errors import InvalidCharset, UnknownCharacters

UnknownChars = Literal["error", "fold", "drop"]

MAX_CHARSET = 65_536
_FEW = 8
_MAX_NAMED = 10  # unknown characters named in one error: enough to act on, whatever the text's length

# Nearest plain spelling of characters that Unicode's compatibility decomposition leaves alone. Several spellings: the
# first that the charset can write is taken.
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
    """The characters a model knows; the id of a character is its index in `characters`."""

    def __init__(self, characters: str) -> None:
        if not characters:
            raise InvalidCharset("a charset needs at least one character")
        if len(characters) > MAX_CHARSET:
            raise InvalidCharset(f"a charset holds at most {MAX_CHARSET} characters, not {len(characters)}")
        seen: set[str] = set()
        for place, char in enumerate(characters):
            if char in seen:
                raise InvalidCharset(f"character {describe(char)} stands twice in the charset, again at {place}")
            if 0xD800 <= ord(char) <= 0xDFFF:
                raise InvalidCharset(f"{describe(char)} at {place} is half a surrogate pair, not a character")
            if unicodedata.normalize("NFC", char) != char:
                raise InvalidCharset(f"character {describe(char)} at {place} never occurs in NFC text")
            seen.add(char)
        self.characters = characters

    @classmethod
    def from_corpus(cls, text: str) -> Charset:
        """The charset of every character that occurs in `text` after NFC, in order of code points."""
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
        """(highest code point + 2,) int64: code point -> id, -1 where there is none; the last entry is always -1."""
        points = _code_points(self.characters)
        table = np.full(int(points.max()) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode(self, text: str, unknown: UnknownChars = "error") -> Ids:
        """(n,) int64 ids of `text` after NFC.

        unknown: `error` raises UnknownCharacters, which names each unknown character with its position in the NFC
        text; `fold` writes the nearest characters that are there (é as e, curly quotes straight, any dash as a hyphen)
        and raises for what has none; `drop` leaves unknown characters out.
        """
        if len(text) <= _FEW and text.isascii() and all(char in self._id_of for char in text):
            return np.array(
                [self._id_of[char] for char in text], np.int64
            )  # a keystroke: the rest takes ten times as long
        text = unicodedata.normalize("NFC", text)
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids
        text = self._take_apart(text)
        ids = self._look_up(text)
        if not (ids < 0).any():
            return ids
        if unknown == "drop":
            return ids[ids >= 0]
        if unknown == "fold":
            folded = self._fold(text)
            ids = self._look_up(folded)
            if not (ids < 0).any():
                return ids
            # Positions are those of the text that came in, not of the folded one.
            known = [char in self or self._nearest(char) is not None for char in text]
            raise self._unknown(text, (place for place, ok in enumerate(known) if not ok), folded=True)
        raise self._unknown(text, np.flatnonzero(ids < 0).tolist(), folded=False)

    def exact(self, text: str) -> Ids:
        """(n,) int64 ids of just these n characters, without normalisation: of what `decode` gave. Raises
        UnknownCharacters.
        """
        ids = self._look_up(text)
        if (ids < 0).any():
            raise self._unknown(text, np.flatnonzero(ids < 0).tolist(), folded=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose ids these are. Raises IndexError for an id outside 0..V-1."""
        indices = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if indices and min(indices) < 0:
            raise IndexError(f"no character has the id {min(indices)}")
        return "".join(map(self.characters.__getitem__, indices))

    def _take_apart(self, text: str) -> str:
        """The text with unknown characters as letter and marks where these are known: a model whose charset has them
        writes such sequences, and has to be able to read what it wrote.
        """
        apart = {char: unicodedata.normalize("NFD", char) for char in set(text) if char not in self}
        return text.translate({ord(c): parts for c, parts in apart.items() if all(part in self for part in parts)})

    def _look_up(self, text: str) -> Ids:
        points = _code_points(text)
        return self._table[np.minimum(points, len(self._table) - 1)]

    def _fold(self, text: str) -> str:
        if "\r" not in self:
            text = text.replace("\r\n", "\n")
        nearest = {char: self._nearest(char) for char in set(text) if char not in self}
        return text.translate({ord(char): near for char, near in nearest.items() if near is not None})

    def _nearest(self, char: str) -> str | None:
        """What `fold` writes for a character that isn't there, or None if nothing is near."""
        for spelling in _spellings(char):
            if all(part in self for part in spelling):
                return spelling
        return None

    def _unknown(self, text: str, places: Iterable[int], *, folded: bool) -> UnknownCharacters:
        places = list(places)
        named = ", ".join(f"{describe(text[place])} at {place}" for place in places[:_MAX_NAMED])
        more = f" and {len(places) - _MAX_NAMED} more" if len(places) > _MAX_NAMED else ""
        what = "has no character near" if folded else "doesn't know"
        hint = 'use "drop" to leave them out' if folded else 'use "fold" for the nearest known ones or "drop"'
        return UnknownCharacters(f"the model {what} {named}{more}; {hint}")


def describe(char: str) -> str:
    """A character in a form that is safe in any log, header or terminal: 'é' (U+00E9)."""
    shown = f"'{char}' " if char.isprintable() else ""
    return f"{shown}(U+{ord(char):04X})" if shown else f"U+{ord(char):04X}"


def _code_points(text: str) -> NDArray[np.uint32]:
    # Half surrogate pairs can arrive through JSON escapes; they are unknown characters, not a crash.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _spellings(char: str) -> Iterable[str]:
    """Other ways to write a character, nearest first."""
    yield from _SPELLINGS.get(char, ())
    category = unicodedata.category(char)
    if category == "Pd":
        yield from _DASH
    if category == "Zs":
        yield " "
    # NFD keeps the script (Cyrillic yo -> ye), NFKD also undoes ligatures, full-width forms and superscripts.
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
