"""Stop strings as automata, compared with a search in whole texts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.stops import MAX_STOP_CHARS, MAX_STOPS, _Construction, with_stops
from service.errors import InvalidValue
from tests.harness.automata import accepts, complete_stop, random_automaton, undecided

VOCAB = 4
CHARS = st.integers(0, VOCAB - 1)
STOPS = st.lists(st.lists(CHARS, min_size=1, max_size=4), min_size=1, max_size=4)


def compiled(form: Automaton | None, stops: list[list[int]], vocab_size: int = VOCAB) -> Automaton:
    automaton = with_stops(form, [np.array(stop, np.int64) for stop in stops], vocab_size)
    assert automaton is not None
    return automaton


@given(STOPS, st.lists(CHARS, max_size=30))
def test_stops__alone_allow_everything_and_know_what_is_complete(stops: list[list[int]], text: list[int]) -> None:
    automaton, state = compiled(None, stops), 0
    assert not automaton.restricts
    for num_chars, char in enumerate(text, 1):
        state = automaton.next_state(state, char)
        assert automaton.stop_chars[state] == complete_stop(None, stops, text[:num_chars])
        assert automaton.withheld[state] == undecided(None, stops, text[:num_chars])
        assert automaton.allowed(state, 1).all()


@settings(max_examples=60)
@given(st.integers(0, 1000), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3))
def test_stops__after_a_form_follow_only_where_it_is_complete(seed: int, stops: list[list[int]]) -> None:
    """The automaton accepts the texts of the form, and these followed by one stop string, and nothing else."""
    form = random_automaton(seed, 3)
    automaton = compiled(form, stops, 3)
    again = Dfa(automaton.classes, automaton.transitions, automaton.fewest == 0).automaton()
    assert (automaton.fewest == again.fewest).all()
    whole: set[tuple[int, ...]] = set()  # with up to 6 characters
    ended: set[tuple[int, ...]] = set()
    for length in range(7):
        for text in product(range(3), repeat=length):
            if any(complete_stop(form, stops, text[:end]) for end in range(length)):
                continue  # it has ended before
            if complete_stop(form, stops, text):
                ended.add(text)
            elif accepts(form, text):
                whole.add(text)
    for length in range(6):
        for text in product(range(3), repeat=length):
            state = automaton.walk(0, text)
            assert (state >= 0 and automaton.fewest[state] == 0) == (text in whole or text in ended)
            if state < 0:
                continue
            assert automaton.stop_chars[state] == complete_stop(form, stops, text)
            assert automaton.withheld[state] == undecided(form, stops, text)
            assert automaton.ends(state, 10**12) or text not in ended
            for num_left in (1, 2):
                if length + num_left < 7:
                    possible = {
                        more[length]
                        for more in whole | ended
                        if more[:length] == text and length < len(more) <= length + num_left
                    }
                    assert set(np.flatnonzero(automaton.allowed(state, num_left)).tolist()) == possible


def test_stops__of_the_largest_request_are_small() -> None:
    rng = np.random.default_rng(0)
    stops = [[char] for char in range(MAX_STOPS - 4)] + [
        rng.integers(0, 200, MAX_STOP_CHARS).tolist() for _ in range(4)
    ]
    automaton = compiled(None, stops, 65_536)
    assert automaton.num_states <= 1 + sum(map(len, stops))
    assert automaton.num_bytes < 2**21


def test_stops__that_need_too_large_an_automaton_are_refused() -> None:
    size, none = 3000, np.zeros(3000, np.int32)
    ring = (np.arange(size, dtype=np.int32)[:, None] + 1) % size  # every text, in 3,000 states
    form = Automaton(np.zeros(500, np.int32), ring, none, none, none)
    assert with_stops(form, [np.arange(5)], 500) is not None
    with pytest.raises(InvalidValue, match="with this form"):
        with_stops(form, [np.arange(200)], 500)
    for bad in ([np.zeros(1, np.int64)] * 133, [np.zeros(8193, np.int64)], [np.empty(0, np.int64)], [np.array([500])]):
        with pytest.raises(InvalidValue):
            with_stops(None, bad, 500)


def test_stops__are_compiled_once() -> None:
    one, other = np.array([1, 2]), np.array([3])
    form = random_automaton(5, VOCAB)
    assert with_stops(None, [one, other], VOCAB) is with_stops(None, [other, one, other], VOCAB)
    assert with_stops(form, [one], VOCAB) is with_stops(form, [one], VOCAB)
    assert with_stops(form, [one], VOCAB) is not with_stops(random_automaton(6, VOCAB), [one], VOCAB)
    assert with_stops(form, [], VOCAB) is form
    assert with_stops(None, [], VOCAB) is None


def test_stops__that_are_refused_are_tried_once_and_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A construction takes a third of a second of the interpreter, which all other requests need too."""
    size, none = 3000, np.zeros(3000, np.int32)
    ring = Automaton(np.zeros(500, np.int32), (np.arange(size, dtype=np.int32)[:, None] + 1) % size, none, none, none)
    running, most, made = 0, 0, 0
    construct = _Construction.automaton

    def counted(self: _Construction) -> Automaton:
        nonlocal running, most, made
        running, made = running + 1, made + 1
        most = max(most, running)
        try:
            return construct(self)
        finally:
            running -= 1

    monkeypatch.setattr(_Construction, "automaton", counted)
    barrier = threading.Barrier(6)

    def refused(number: int) -> InvalidValue:
        barrier.wait(60)
        with pytest.raises(InvalidValue, match="with this form") as error:
            with_stops(ring, [np.arange(200 + number % 2)], 500)
        return error.value

    with ThreadPoolExecutor(6) as pool:
        errors = list(pool.map(refused, range(6)))
    assert (most, made) == (1, 2)
    assert len(set(map(id, errors))) == 6
    assert {error.param for error in errors} == {"stop"}


def test_ends__where_nothing_may_follow() -> None:
    """However many characters are left, more than an int32 holds among them."""
    automaton = Automaton(
        np.array([0, 1], np.int32),
        np.array([[1, -1], [-1, 2], [-1, -1]], np.int32),
        np.array([0, 1, 0], np.int32),
        *(np.zeros(3, np.int32),) * 2,
    )
    assert automaton.fewest_after.tolist() == [2, 1, NEVER]
    assert [automaton.ends(0, left) for left in (0, 1, 2, 2**40)] == [False, True, False, False]
    assert all(automaton.ends(2, left) for left in (0, 1, 2**40))
