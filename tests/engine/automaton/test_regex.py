from __future__ import annotations

import re

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.errors import InvalidValue
from tests.harness.forms import sample

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


@settings(max_examples=600, deadline=None)
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
    for text in ["", *CHARSET, *texts]:
        assert walked(automaton, CHARSET, text) == (re.fullmatch(pattern, text) is not None), (pattern, text)
    random = np.random.default_rng(seed)
    for num_left in (0, 1, 3, 12):
        text = sample(automaton, CHARSET, random, int(automaton.fewest[0]) + num_left)
        assert re.fullmatch(pattern, text) is not None, (pattern, text)
