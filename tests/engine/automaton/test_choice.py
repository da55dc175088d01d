from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.errors import InvalidValue, UnknownCharacters
from tests.harness.forms import assert_minimal

CHARSET = "abc \né日"


def compiled(choices: list[str], allowed: tuple[int, ...] | None = None) -> Automaton:
    return compile_form(Form("choice", json.dumps(choices)), CHARSET, allowed)


def texts(automaton: Automaton) -> set[str]:
    """All texts of an automaton without circles."""
    found, waiting = set(), [(0, "")]
    for state, text in waiting:
        if automaton.fewest[state] == 0:
            found.add(text)
        for id_, char in enumerate(CHARSET):
            following = automaton.next_state(state, id_)
            if following >= 0:
                waiting.append((following, text + char))
    return found


@settings(max_examples=200)
@given(st.lists(st.text(st.sampled_from(CHARSET), max_size=6), min_size=1, max_size=20))
def test_choice__accepts_exactly_the_strings(choices: list[str]) -> None:
    automaton = compiled(choices)
    assert texts(automaton) == set(choices)
    assert_minimal(automaton)


@settings(max_examples=50)
@given(st.lists(st.text(st.sampled_from(CHARSET), max_size=6), min_size=1, max_size=20))
def test_choice__is_the_automaton_of_the_same_alternatives(choices: list[str]) -> None:
    """A language has one minimal automaton, with states and classes in one order, however it was built."""
    automaton = compiled(choices)
    other = compile_form(Form("regex", "|".join(choices)), CHARSET)
    for name in ("classes", "transitions", "fewest", "fewest_after"):
        np.testing.assert_array_equal(getattr(automaton, name), getattr(other, name))


def test_choice__of_ten_thousand_strings_shares_beginnings_and_ends() -> None:
    numbers = [f"{number:04}" for number in range(10_000)]
    automaton = compile_form(Form("choice", json.dumps(numbers)), "0123456789-")
    assert (automaton.num_states, automaton.transitions.shape[1]) == (5, 2)
    cities = [f"{a}{b}{c}burg-{d}" for a in "abcdefghij" for b in "aeiou" for c in "klmnrst" for d in range(10)]
    automaton = compile_form(Form("choice", json.dumps(cities)), "abcdefghijklmnopqrstuvwxyz0123456789-")
    assert automaton.num_states < 12


def test_choice__leaves_out_strings_with_other_characters() -> None:
    assert texts(compiled(["a", "añ", "b€c", "cab"])) == {"a", "cab"}
    assert texts(compiled(["a", "ab", "b"], allowed=(0, 2, -5, 99))) == {"a"}
    assert texts(compiled(["ñ", ""])) == {""}


def test_choice__of_which_none_can_be_written_is_refused_with_the_first_missing_characters() -> None:
    with pytest.raises(UnknownCharacters, match=r"'ñ' \(U\+00F1\), 'x' \(U\+0078\)$"):
        compiled(["añ", "xx"])
    with pytest.raises(InvalidValue, match=r"^allowed_token_ids: .* they lack 'b' \(U\+0062\)$"):
        compiled(["ab"], allowed=(0,))
    with pytest.raises(UnknownCharacters, match="and 16 others"):
        compiled(["DEFGHIJKLMNOPQRSTUVWXYZ!@#"])
    with pytest.raises(UnknownCharacters, match=r"U\+D800"):
        compiled(["\ud800"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "not a JSON list"),
        ("[" * 100_000, "not a JSON list"),
        ('"a"', "not a list of strings"),
        ('["a", 3]', "not a list of strings"),
        ("[]", "there are 0 choices; 1 to 10,000"),
        (json.dumps(["a"] * 10_001), "there are 10,001 choices"),
        (json.dumps(["b", "a" * 1_001]), "choice 1 has 1,001 characters; at most 1,000"),
        (json.dumps(["a" * 1_000] * 201), "201,000 characters together; at most 200,000"),
    ],
    ids=range(8),
)
def test_choice__that_is_malformed_or_too_large_is_refused(value: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        compile_form(Form("choice", value), CHARSET)
