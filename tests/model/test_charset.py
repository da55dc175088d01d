"""Characters <-> ids, and the three treatments of unknown characters."""

from __future__ import annotations

import sys
import time
import unicodedata
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidCharset, UnknownCharacters
from service.model import charset as charset_module
from service.model import normal_form
from service.model.charset import Charset, UnknownChars
from service.model.normal_form import normalised_blocks, normalised_pieces

normal_form._classes()  # made at the first use, which no deadline of a test should include
ASCII = Charset("".join(map(chr, range(32, 127))) + "\n")


def test_charset__from_corpus_has_its_characters_in_order_of_code_points() -> None:
    assert Charset.from_corpus("banana\n").characters == "\nabn"


def test_encode__composed_and_decomposed_spellings_are_one_character() -> None:
    charset = Charset.from_corpus("cafe\u0301")
    assert charset.characters == "acfé"
    assert charset.encode("e\u0301").tolist() == charset.encode("é").tolist() == [3]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_decode__inverts_encode_for_any_text_with_its_own_charset(text: str) -> None:
    charset = Charset.from_corpus(text)
    assert charset.decode(charset.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.text(alphabet=st.characters(), max_size=50), st.sampled_from(["error", "fold", "drop", "fold_drop"]))
def test_encode__any_text_gives_valid_ids_or_unknown_characters(text: str, unknown: str) -> None:
    try:
        ids = ASCII.encode(text, unknown)  # type: ignore[arg-type]
    except UnknownCharacters:
        assert unknown != "drop"
    else:
        assert all(0 <= index < len(ASCII) for index in ids.tolist())


def test_encode__the_error_names_each_unknown_character_with_its_position() -> None:
    with pytest.raises(UnknownCharacters, match=r"'é' \(U\+00E9\) at 1, '→' \(U\+2192\) at 3") as caught:
        ASCII.encode("aéb→c")
    assert caught.value.code == "unknown_characters"


def test_encode__the_error_names_at_most_ten_characters() -> None:
    with pytest.raises(UnknownCharacters, match=", and 990 others; ") as caught:
        ASCII.encode("".join(map(chr, range(0x4E00, 0x4E00 + 1000))))
    assert len(caught.value.message) < 500


def test_encode__the_error_names_each_character_once() -> None:
    with pytest.raises(UnknownCharacters) as caught:
        ASCII.encode("é→é→éa")
    fault = "the model doesn't know 'é' (U+00E9) at 0 and 2 more places, '→' (U+2192) at 1 and 3"
    assert caught.value.fault == fault
    with pytest.raises(UnknownCharacters) as caught:
        ASCII.encode("漢漢", "fold")
    assert caught.value.fault == "the model knows no similar character to '漢' (U+6F22) at 0 and 1"


@pytest.mark.parametrize(
    ("text", "unknown", "remedies"),
    [
        ("é", "error", ["fold", "drop"]),
        ("é漢", "error", ["fold_drop", "drop"]),
        ("漢😀", "error", ["drop"]),
        ("\ud800", "error", ["drop"]),
        ("é漢", "fold", ["fold_drop", "drop"]),
        ("漢", "fold", ["drop"]),
    ],
)
def test_encode__the_error_names_what_would_accept_the_text(
    text: str, unknown: UnknownChars, remedies: list[UnknownChars]
) -> None:
    with pytest.raises(UnknownCharacters) as caught:
        ASCII.encode(text, unknown)
    effects = {
        "fold": "replaces such characters by the nearest known ones",
        "fold_drop": "replaces those that have a similar known one, and leaves the others out",
        "drop": "leaves them out",
    }
    advice = [f"{one} {effects[one]}" for one in remedies]
    assert caught.value.command_message == "; ".join(
        [caught.value.fault, *(f"--unknown-chars {one}" for one in advice)]
    )
    named = [f'"unknown_chars": "{one}" {effects[one]}' for one in remedies]
    assert caught.value.message == "; ".join([caught.value.fault, *named])
    for remedy in remedies:
        ASCII.encode(text, remedy)


def test_encode__the_error_says_that_a_mark_at_the_beginning_joins_no_letter() -> None:
    composed = Charset.from_corpus("café")
    for mark in ("\u0301", "\u0301e"):
        with pytest.raises(UnknownCharacters, match="send a letter and its marks in one text"):
            composed.encode(mark)
    with pytest.raises(UnknownCharacters) as caught:
        composed.encode("a\u0301")  # a whole letter that the model doesn't know
    assert "marks" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("café", "cafe"),
        ("“Who’s there?”", '"Who\'s there?"'),
        ("a–b—c−d‐e", "a-b-c-d-e"),
        ("wait…", "wait..."),
        ("ﬁne", "fine"),
        ("Straße", "Strasse"),
        ("Ａ１", "A1"),
        ("x²", "x2"),
        ("a\u00a0b\u2003c", "a b c"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("zero\u200bwidth", "zerowidth"),
        ("Œuvre, œuf, Ærø", "OEuvre, oeuf, AEro"),
        ("½", "1/2"),
        ("Łódź", "Lodz"),
        ("tab\tbed", "tab bed"),
    ],
)
def test_fold__writes_the_nearest_known_spelling(text: str, folded: str) -> None:
    assert ASCII.decode(ASCII.encode(text, "fold")) == folded


# Characters that compose, decompose, move, fold, or lie at the border of a rule.
DIFFICULT = "ae\u0301\u0323\u0302\u0344\u0f73\u0f71 \r\n\t'’“éüß…ﬁ½\u1112\u1161\u11ab\u09c7\u09be한À中\ud800\udc00"
DIFFICULT += "\U0001f600\U0001d15e"
CHARSETS = [" '\",-.abcdefghijklmnopqrstuvwxyz\n", "abeé \r", "ae\u0301\u0323 ", "abcß中\U0001f600 "]


def encoded_at_once(charset: Charset, text: str, unknown: str) -> list[int] | None:
    """The ids of a text by the rules of `encode`, applied to all of it one after the other; None if it is refused."""
    text = unicodedata.normalize("NFC", text)
    parts = {char: unicodedata.normalize("NFD", char) for char in set(text) if char not in charset}
    if parts:
        known = {ord(char): part for char, part in parts.items() if all(one in charset for one in part)}
        text = text.translate(known)
    missing = {char for char in set(text) if char not in charset}
    if missing and unknown.startswith("fold"):
        text = text if "\r" in charset else text.replace("\r\n", "\n")
        nearest = {char: charset._nearest(char) for char in missing}
        text = "".join(char if (near := nearest.get(char)) is None else near for char in text)
    if unknown.endswith("drop"):
        text = "".join(char for char in text if char in charset)
    if any(char not in charset for char in text):
        return None
    return [charset.characters.index(char) for char in text]


@settings(max_examples=300)
@given(
    text=st.text(st.sampled_from(DIFFICULT), max_size=60) | st.text(max_size=30),
    repeats=st.integers(1, 40),
    unknown=st.sampled_from(["error", "fold", "drop", "fold_drop"]),
    charset=st.sampled_from([Charset(characters) for characters in CHARSETS]),
    piece_chars=st.integers(1, 50),
)
def test_encode__in_pieces_gives_the_ids_of_the_whole_text(
    text: str, repeats: int, unknown: Any, charset: Charset, piece_chars: int
) -> None:
    text *= repeats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charset_module, "normalised_pieces", partial(normalised_pieces, piece_chars=piece_chars))
        try:
            got = charset.encode(text, unknown).tolist()
        except UnknownCharacters:
            got = None
    assert got == encoded_at_once(charset, text, unknown)


@given(st.text(st.sampled_from(DIFFICULT), max_size=200), st.integers(1, 50))
def test_normalised_pieces__are_the_normal_form(text: str, piece_chars: int) -> None:
    assert "".join(normalised_pieces(text, piece_chars)) == unicodedata.normalize("NFC", text)


@given(st.lists(st.text(st.sampled_from(DIFFICULT), max_size=9), max_size=30))
def test_normalised_blocks__are_the_normal_form_of_the_whole(blocks: list[str]) -> None:
    got = list(normalised_blocks(blocks))
    assert "".join(got) == unicodedata.normalize("NFC", "".join(blocks))
    assert all(got)
    assert not any(one.endswith("\r") and other.startswith("\n") for one, other in pairwise(got))


def test_normal_form__marks_are_all_within_its_table() -> None:
    """A new version of Unicode may add some after the last code point that the module looks at."""
    for point in range(normal_form._LAST_POINT + 1, sys.maxunicode + 1):
        char = chr(point)
        assert not unicodedata.combining(char)
        assert len(unicodedata.decomposition(char).split()) < 2 or "<" in unicodedata.decomposition(char)


def test_encode__long_runs_of_marks_take_time_in_proportion() -> None:
    """Sorting 100,000 marks by insertion, as `unicodedata` does, would take seconds and hold the interpreter."""
    charset = Charset("ab")
    for run in ("\u0301\u0323\u0302" * 33_333, "\u0f73" * 100_000, "\u0344\u0323" * 50_000):
        started = time.process_time()
        assert charset.encode("a" + run + "b", "drop").tolist() in ([0, 1], [1])
        assert time.process_time() - started < 2


def test_fold__distinct_unknown_characters_are_refused_at_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []

    def spellings(char: str) -> list[str]:
        looked_up.append(char)
        return []

    monkeypatch.setattr(charset_module, "_spellings", spellings)
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    with pytest.raises(UnknownCharacters, match="at least 4086 others"):
        Charset("ab").encode(text, "fold")
    assert len(looked_up) <= 4096


def test_fold_drop__leaves_out_only_what_has_no_known_spelling() -> None:
    assert ASCII.decode(ASCII.encode("“café” 🎭 – 漢", "fold_drop")) == '"cafe"  - '


def test_fold__keeps_known_characters() -> None:
    charset = Charset.from_corpus("é’e'")
    assert charset.decode(charset.encode("é’", "fold")) == "é’"


def test_fold__keeps_the_script_and_falls_back_to_the_other_case() -> None:
    assert Charset.from_corpus("де").decode(Charset.from_corpus("де").encode("дё", "fold")) == "де"
    upper = Charset.from_corpus("ABCE")
    assert upper.decode(upper.encode("abcé", "fold")) == "ABCE"


def test_fold__the_error_gives_positions_in_the_text_before_folding() -> None:
    with pytest.raises(UnknownCharacters, match=r"'漢' \(U\+6F22\) at 2"):
        ASCII.encode("…é漢", "fold")


def test_encode__a_charset_of_letters_and_marks_reads_what_it_writes() -> None:
    charset = Charset("ea\u0301")
    assert charset.encode("e\u0301a").tolist() == [0, 2, 1]
    assert charset.encode("\u00e9").tolist() == [0, 2]


def test_fold__line_breaks_become_spaces_if_the_charset_has_none() -> None:
    line = Charset("ab ")
    for text in ("a\nb", "a\rb", "a\r\nb", "a\u2028b"):
        assert line.decode(line.encode(text, "fold")) == "a b"


def test_drop__leaves_unknown_characters_out() -> None:
    assert ASCII.decode(ASCII.encode("aéb\ud800c", "drop")) == "abc"


@pytest.mark.parametrize(
    ("characters", "fault"),
    [
        ("", "at least one"),
        ("aba", "twice"),
        ("a\ud800", "surrogate"),
        ("\u0340", "never occurs in NFC"),
        ("x" * 70_000, "at most"),
    ],
)
def test_charset__refuses_unusable_characters(characters: str, fault: str) -> None:
    with pytest.raises(InvalidCharset, match=fault):
        Charset(characters)


def test_exact__encodes_without_normalising() -> None:
    charset = Charset("ea\u0301é")
    assert charset.encode("e\u0301").tolist() == [3]
    assert charset.exact("e\u0301").tolist() == [0, 2]
    with pytest.raises(UnknownCharacters, match=r"'x' \(U\+0078\) at 1"):
        charset.exact("ex")


def test_decode__refuses_ids_outside_the_charset() -> None:
    with pytest.raises(IndexError):
        ASCII.decode([-1])
    with pytest.raises(IndexError):
        ASCII.decode([len(ASCII)])
