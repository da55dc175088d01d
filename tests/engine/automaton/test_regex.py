from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import FormCache, compile_form
from service.engine.automaton.form import Form
from service.errors import InvalidValue
from tests.harness.forms import assert_minimal, sample

# Letters of two cases, digits and spaces of several kinds, and letters whose cases are special.
CHARSET = "ab AB01\n_-.,é\u0661Ωω\u2126ſsSKk\u212aıiIİßẞ^$\\[](){}*+?|"


def walked(automaton: Automaton, charset: str, text: str) -> bool:
    """Whether an automaton accepts a text."""
    state = automaton.walk(0, [charset.index(char) for char in text])
    return state >= 0 and automaton.fewest[state] == 0


def atoms() -> st.SearchStrategy[str]:
    char = st.sampled_from(
        [*"abAB01_-,éΩωsSkKiI", "\u0661", "ſ", "\u212a", r"\.", r"\n", r"\*", r"\\", "ı", "ß", "ẞ", "İ"]
    )
    inside = st.one_of(
        char.filter(lambda one: one != "-"),
        st.sampled_from([r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "a-z", "0-9", "A-Z", r"\-", "i-k", "À-ſ"]),
    )
    sets = st.builds(
        lambda parts, negated: f"[{negated}{''.join(parts)}]",
        st.lists(inside, min_size=1, max_size=4),
        st.sampled_from(["", "^"]),
    )
    special = st.sampled_from(
        [".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "^", "$", r"\A", r"\Z", r"\b", r"\B", "(?:)"]
    )
    return st.one_of(char, char, sets, special)


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{2,3}?", "{0}", "{,1}"])
    opened = st.sampled_from(["(", "(?:", "(?i:", "(?s:", "(?m:", "(?-i:", "(?a:", "(?a-i:", "(?u:", "(?ims:", "(?-s:"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.builds(lambda body, open_, repeat: f"{open_}{body}){repeat}", inner, opened, repeats | st.just("")),
    )


PATTERNS = st.builds(
    str.__add__,
    st.sampled_from(["", "", "", "(?i)", "(?s)", "(?m)", "(?a)", "(?is)", "(?im)"]),
    st.recursive(atoms(), combined, max_leaves=12),
)


@settings(max_examples=300)
@given(PATTERNS, st.lists(st.text(st.sampled_from(CHARSET), max_size=6), max_size=12), st.integers(0, 2**32))
@example(r"a$\n", ["a\n", "a", "a\n\n"], 0)
@example(r"(?m)^a$\n^b$", ["a\nb", "ab"], 0)
@example(r"\B", ["", "a"], 0)
@example(r"(a$|\n|b)*", ["a\n", "a\nb", "a\n\n", "ba"], 0)
def test_regex__accepts_what_fullmatch_matches(pattern: str, texts: list[str], seed: int) -> None:
    try:
        automaton = compile_form(Form("regex", pattern), CHARSET)
    except InvalidValue as error:
        if not error.message.startswith("no text"):
            raise
        assert not any(re.fullmatch(pattern, text) for text in ["", *CHARSET, *texts])
        return
    assert_minimal(automaton)
    for text in ["", *CHARSET, *texts]:
        assert walked(automaton, CHARSET, text) == (re.fullmatch(pattern, text) is not None), (pattern, text)
    random = np.random.default_rng(seed)
    for num_left in (0, 1, 3, 12):
        text = sample(automaton, CHARSET, random, int(automaton.fewest[0]) + num_left)
        assert re.fullmatch(pattern, text) is not None, (pattern, text)


def test_regex__whose_sets_re_warns_of_is_compiled_without_a_warning() -> None:
    """Warnings are errors in these tests, and would be lines in the server's log that any client could write."""
    automaton = compile_form(Form("regex", "[[a]|[b||A]"), CHARSET)
    assert {char for char in CHARSET if walked(automaton, CHARSET, char)} == set("[ab|A")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"[(?=]\(?=(?#(?=)(?=a)", "position 16: look-around"),
        (r"\\(?=a)", "position 2: look-around"),
        (r"(a)[\1]\101\1", "position 11: a back-reference"),
        (r"a\++b{2}c{2}+", "position 9: a possessive repeat"),
        (r"[a*+]x?+", "position 6: a possessive repeat"),
        (r"(?x)\# [#] a # (?=a)" + "\n(?=b)", "position 21: look-around"),
        (r"(?>a)", "position 0: an atomic group"),
        (r"a)", "position 1: unbalanced parenthesis"),
        (r"*a", "position 0: nothing to repeat"),
        (r"a{3,2}", "position 2: min repeat greater than max repeat"),
        ("(?=a){" + "1" * 9_000, "position 0: look-around"),
        ("a{" + "1" * 5_000 + "}", "position 1: the repetition number is too large"),
        (r"a\Uffffffff", r"position 1: bad escape \Uffffffff"),
        (r"[b-\Uffffffff]{2}", r"position 3: bad escape \Uffffffff"),
        (r"(?L)a", "position 3: bad inline flags"),
        (r"a(?i)", "position 1: global flags not at the start"),
        (r"(?P<1>a)", "position 4: bad character in group name"),
        ("(" * 50 + "(" + ")" * 51, "position 50: groups are nested more than 50 deep"),
        ("[" * 10_000, "position 0: unterminated character set"),
        (r"b{1,3}(a|b)*a(a|b){30}", "position 18: it takes too much work to compile; repeat fewer than {30} times"),
    ],
    ids=range(20),
)
def test_regex__that_is_refused_names_the_position_and_what_to_write(pattern: str, message: str) -> None:
    with pytest.raises(InvalidValue) as error:
        compile_form(Form("regex", pattern), CHARSET)
    assert error.value.message.startswith(message)


def test_regex__at_the_limit_of_nesting_fits_on_a_deep_stack() -> None:
    """A request is many calls deep already when its form is compiled."""
    pattern = "(?:b|(?i:a|" * 25 + "c" + "){1,1}){1,1}" * 25

    def compiled(depth: int) -> Automaton:
        return compiled(depth - 1) if depth else FormCache().get(Form("regex", pattern), CHARSET)

    assert walked(compiled(300), CHARSET, "A")
