"""The n likeliest texts: those that a complete enumeration finds, in the same order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import NEVER, Automaton
from service.errors import ClientGone, TooManyScores
from service.generation.automata import automaton_of
from service.generation.candidates import Origin
from service.generation.n_best import Ends, Found, NBest, Wanted, _Node, affordable_steps, ends_at, n_best
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel
from service.store.model_store import ModelStore
from tests.harness.models import loaded_model, publish_names, publish_tiny

LETTERS = "abc"


@pytest.fixture(scope="module")
def model(tiny_store: ModelStore) -> Iterator[LoadedModel]:
    with loaded_model(tiny_store) as model:
        step(model, model.charset.encode("z" * 40))  # the engine's thread starts with its first long text
        yield model


@pytest.fixture(scope="module")
def origin(model: LoadedModel) -> Origin:
    end, _ = step(model, model.charset.encode("To be"))
    return Origin(end.hidden, 5)


def automaton(model: LoadedModel, transitions: list[list[int]], accepting: set[int]) -> Automaton:
    """An automaton over LETTERS, without the transitions from which no acceptance is reached."""
    table = np.array(transitions, np.int32)
    fewest = np.array([0 if state in accepting else NEVER for state in range(len(table))], np.int64)
    for _ in table:
        after = np.where(table < 0, NEVER, fewest[table])
        fewest = np.minimum(fewest, np.minimum(after.min(axis=1) + 1, NEVER))
    table = np.where((table >= 0) & (fewest[table] < NEVER), table, -1).astype(np.int32)
    classes = [LETTERS.find(char) % (len(LETTERS) + 1) for char in model.charset.characters]
    nothing = np.zeros(len(table), np.int32)
    blocked = np.full((len(table), 1), -1, np.int32)
    return Automaton(
        np.array(classes, np.int32), np.hstack([table, blocked]), fewest.astype(np.int32), nothing, nothing
    )


def enumerated(model: LoadedModel, origin: Origin, wanted: Wanted) -> list[Found]:
    """All whole texts over LETTERS, the likeliest first."""
    found, form = [], wanted.form
    if wanted.ends == "forced" and form.ends(0, wanted.max_chars):
        return [Found((), 0.0)]
    letters = [model.charset.characters.index(char) for char in LETTERS]
    for size in range(1, wanted.max_chars + 1):
        for ids in itertools.product(letters, repeat=size):
            state = form.walk(0, ids)
            if state < 0 or form.fewest[state] > 0:
                continue
            end, scores = step(
                model, np.array(ids), origin.hidden, origin.position, num_logprobs=0, num_next=len(model.charset)
            )
            assert scores is not None
            assert end.next is not None
            logprob = 0.0
            for value in scores.chosen.tolist():
                logprob += value
            if form.fewest_after[state] < NEVER and wanted.ends == "seen":
                seen = form.transitions[state, form.classes[end.next.ids]] < 0
                logprob += math.log(np.exp(end.next.logprobs[seen].astype(np.float64)).sum())
            elif wanted.ends == "forced" and size < wanted.max_chars and not form.ends(state, wanted.max_chars - size):
                continue
            found.append(Found(ids, logprob))
    return sorted(found, key=lambda one: (-one.logprob, one.ids))


def check(got: NBest, expected: list[Found], n: int) -> None:
    assert got.is_exact
    assert [one.ids for one in got.texts] == [one.ids for one in expected[:n]]
    assert [one.logprob for one in got.texts] == pytest.approx([one.logprob for one in expected[:n]], abs=1e-6)


@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize("ends", ["seen", "forced"])
def test_n_best__are_those_of_an_enumeration(model: LoadedModel, origin: Origin, n: int, ends: Ends) -> None:
    words = automaton(model, [[0, 0, 0]], {0})
    wanted = Wanted(n, 4, words, ends)
    check(n_best(model, origin, wanted), enumerated(model, origin, wanted), n)


@given(data=st.data(), size=st.integers(1, 4), n=st.integers(1, 30), ends=st.sampled_from(["seen", "forced"]))
@settings(max_examples=30)
def test_n_best__of_any_automaton_are_those_of_an_enumeration(
    model: LoadedModel, origin: Origin, data: st.DataObject, size: int, n: int, ends: Ends
) -> None:
    states = st.integers(-1, size - 1)
    table = data.draw(st.lists(st.lists(states, min_size=3, max_size=3), min_size=size, max_size=size))
    accepting = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    form = automaton(model, table, accepting)
    assume(form.fewest[0] <= 3)
    wanted = Wanted(n, 3, form, ends)
    check(n_best(model, origin, wanted), enumerated(model, origin, wanted), n)


def test_n_best__without_an_end_are_the_likeliest_of_one_length(model: LoadedModel, origin: Origin) -> None:
    size = len(model.charset)
    got = n_best(model, origin, Wanted(10, 2, ends_at([False] * size)))
    end, _ = step(model, np.empty(0, np.int64), origin.hidden, 5, num_next=size)
    assert end.next is not None
    pairs = []
    for char, logprob in zip(end.next.ids.tolist(), end.next.logprobs.tolist(), strict=True):
        after, _ = step(model, np.array([char]), origin.hidden, 5, num_next=size)
        assert after.next is not None
        pairs += [
            Found((char, other), logprob + more)
            for other, more in zip(after.next.ids.tolist(), after.next.logprobs.tolist(), strict=True)
        ]
    check(got, sorted(pairs, key=lambda one: (-one.logprob, one.ids)), 10)


def test_n_best__that_would_take_too_long_are_the_likeliest_found(model: LoadedModel, origin: Origin) -> None:
    wanted = Wanted(5, 30, ends_at([False] * len(model.charset)), max_steps=64)
    got = n_best(model, origin, wanted)
    assert not got.is_exact
    assert len(got.texts) == 5
    assert {len(one.ids) for one in got.texts} == {30}
    assert [one.logprob for one in got.texts] == sorted((one.logprob for one in got.texts), reverse=True)
    for one in got.texts:
        _, scores = step(model, np.array(one.ids), origin.hidden, 5, num_logprobs=0)
        assert scores is not None
        assert one.logprob == pytest.approx(float(scores.chosen.sum()), abs=1e-4)
    assert n_best(model, origin, wanted) == got


def test_n_best__of_equal_likelihood_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_names(store)  # after its letter, each of `\n`, a, n, o and é is as likely as the others
    with loaded_model(store, "names") as model:
        end, _ = step(model, model.charset.encode("Ann"))
        lower = [model.charset.characters.index(char) for char in "anoé"]
        origin, size = Origin(end.hidden, 3), len(model.charset)
        found = n_best(model, origin, Wanted(20, 2, ends_at(char not in lower for char in range(size))))
        expected = [(char,) for char in lower] + [*itertools.product(lower, repeat=2)]
        assert found.is_exact
        assert [one.ids for one in found.texts] == expected
        fewer = n_best(model, origin, Wanted(7, 2, ends_at(char not in lower for char in range(size))))
        assert [one.ids for one in fewer.texts] == expected[:7]


@pytest.mark.parametrize(("limit", "is_exact"), [(40, True), (2, False)])
def test_n_best__say_whether_characters_that_were_left_out_matter(
    model: LoadedModel, origin: Origin, monkeypatch: pytest.MonkeyPatch, limit: int, is_exact: bool
) -> None:
    wanted = Wanted(4, 1, ends_at([False] * len(model.charset)))
    expected = n_best(model, origin, wanted)
    monkeypatch.setattr("service.generation.n_best._MAX_FOLLOWING", limit)
    found = n_best(model, origin, wanted)
    assert found.is_exact is is_exact
    if is_exact:
        assert found.texts == expected.texts


def test_n_best__of_a_large_charset_are_exact_within_its_memory(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store, "large", charset="".join(sorted({*" ab", *map(chr, range(0x4E00, 0x4E00 + 3000))})))
    with loaded_model(store, "large") as model:
        origin = Origin(step(model, np.array([5, 7]))[0].hidden, 2)
        assert affordable_steps(model, 32, 2_100_000) >= 256
        found = n_best(model, origin, Wanted(3, 1, ends_at([False] * len(model.charset))))
        end, _ = step(model, np.empty(0, np.int64), origin.hidden, 2, num_next=3)
        assert end.next is not None
        assert [one.ids[0] for one in found.texts] == end.next.ids.tolist()
        assert found.is_exact


def test_n_best__reserve_their_memory_before_they_use_it(model: LoadedModel, origin: Origin) -> None:
    reserved: list[int] = []

    def reserve(num_scores: int) -> None:
        reserved.append(num_scores)
        if len(reserved) == 3:
            raise TooManyScores("full")

    wanted = Wanted(5, 30, ends_at([False] * len(model.charset)))
    with pytest.raises(TooManyScores):
        n_best(model, origin, wanted, reserve)
    assert reserved == [reserved[0], 2 * reserved[0], 3 * reserved[0]]
    assert model.engine.num_open == 0


def test_n_best__of_a_long_search_need_memory_only_for_the_beginnings_that_it_continues(
    model: LoadedModel, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlikely whole texts appear at every place, and each would keep the state before it."""
    alive: WeakSet[_Node] = WeakSet()
    counts: list[int] = []
    reserved: list[int] = []

    def counted(*fields: Any) -> _Node:
        node = _Node(*fields)
        alive.add(node)
        counts.append(len(alive))
        return node

    monkeypatch.setattr("service.generation.n_best._Node", counted)
    form = automaton_of(model.charset, None, None, ("A",))
    assert form is not None
    wanted = Wanted(20, 40, form, "forced", max_steps=80)
    assert not n_best(model, origin, wanted, reserved.append).is_exact
    assert len(counts) > 500
    assert max(counts) <= 80 + 2 * 20
    assert max(counts[-100:]) <= 2 * 20 + 8  # of two rounds
    assert reserved[-1] == reserved[0] < max(reserved)


def test_n_best__are_given_up_when_the_client_has_left(model: LoadedModel, origin: Origin) -> None:
    wanted = Wanted(5, 30, ends_at([False] * len(model.charset)))
    with pytest.raises(ClientGone):
        n_best(model, origin, wanted, client_has_left=lambda: True)
