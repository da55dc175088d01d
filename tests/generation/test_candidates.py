"""Candidates: each gets the log-probabilities that reading it alone gives, whatever it shares with the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.arrays import Float32
from service.engine.request import Request
from service.errors import ClientGone, InvalidValue, Overloaded, TooManyScores
from service.generation.candidates import MAX_CANDIDATES, Origin, log_shares, score_candidates, total
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.models import loaded_model, publish_tiny
from tests.harness.wait import wait_until

TEXTS = st.lists(
    st.builds(
        lambda start, end: start + end,
        st.sampled_from(["", "the ", "there", "a"]),
        st.text("abe", min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def model(tiny_store: ModelStore) -> Iterator[LoadedModel]:
    with loaded_model(tiny_store) as model:
        step(model, model.charset.encode("z" * 40))  # the engine's thread starts with its first long text
        yield model


def origin_of(model: LoadedModel, text: str) -> Origin:
    end, _ = step(model, model.charset.encode(text))
    return Origin(end.hidden, len(text))


def alone(model: LoadedModel, origin: Origin, text: str) -> Float32:
    """The log-probabilities of a feed."""
    _, scores = step(model, model.charset.encode(text), origin.hidden, origin.position, num_logprobs=0)
    assert scores is not None
    return scores.chosen


def scored(model: LoadedModel, origin: Origin, *texts: str) -> list[Float32]:
    return score_candidates(model, origin, [model.charset.encode(text) for text in texts])


@given(texts=TEXTS)
@settings(max_examples=60)
def test_candidates__have_the_bits_of_a_feed(model: LoadedModel, texts: list[str]) -> None:
    origin = origin_of(model, "To be")
    for text, logprobs in zip(texts, scored(model, origin, *texts), strict=True):
        assert logprobs.dtype == np.float32
        assert logprobs.tobytes() == alone(model, origin, text).tobytes(), text


@pytest.mark.parametrize(
    "texts",
    [
        ["a"],
        ["a", "b", "c"],
        ["a", "ab", "abc", "abcd"],  # each begins the next
        ["abcd" * 30 + char for char in "abc"],
        ["a" * size for size in range(1, 200)],
        ["ab", "ab", "ab"],
        [a + b + c for a in "abcdefghij" for b in "abcdefghij" for c in "abc"],  # more than the engine takes at a time
    ],
    ids=len,
)
def test_candidates__of_any_shape_have_the_bits_of_a_feed(model: LoadedModel, texts: list[str]) -> None:
    origin = origin_of(model, "")
    for text, logprobs in zip(texts, scored(model, origin, *texts), strict=True):
        assert logprobs.tobytes() == alone(model, origin, text).tobytes(), text


def test_candidates__step_what_they_share_once_and_their_last_characters_never(model: LoadedModel) -> None:
    origin = origin_of(model, "To ")
    before = model.engine.counters.num_read
    scored(model, origin, *("question" + char for char in "abcdefgh"), "quest", "quell", "question")
    assert model.engine.counters.num_read - before == len("question") + len("l")


def test_candidates__normalised_over_the_list_are_probabilities_that_sum_to_1() -> None:
    values = [-3.5, -700.0, -12.25, -3.5, -5000.0]
    shares = log_shares(values)
    assert math.fsum(map(math.exp, shares)) == pytest.approx(1, abs=1e-7)
    assert shares[0] == shares[3] == pytest.approx(-math.log(2 + math.exp(-8.75)), abs=1e-7)
    assert shares - shares[0] == pytest.approx(np.array(values) + 3.5)
    assert log_shares([-9.0]).tolist() == [0]


def test_candidates__after_what_is_no_state_are_refused(model: LoadedModel) -> None:
    """A session's record may be damaged. States at branches are the engine's own, and aren't checked again."""
    hidden = model.engine.initial_hidden()
    hidden[0, 3] = np.nan
    with pytest.raises(InvalidValue, match="state"):
        scored(model, Origin(hidden, 0), "ab", "ac")
    with pytest.raises(InvalidValue, match="state"):
        scored(model, Origin(hidden, 0), "a", "b")


def test_candidates__reserve_their_memory_first(model: LoadedModel) -> None:
    def refuse(num_scores: int) -> None:
        assert num_scores > 6
        raise TooManyScores("full")

    before = model.engine.counters.num_read
    with pytest.raises(TooManyScores):
        score_candidates(model, Origin(model.engine.initial_hidden(), 0), [model.charset.encode("abcabc")], refuse)
    assert model.engine.counters.num_read == before


def test_candidates__of_the_longest_list_fit_into_a_clients_budget(model: LoadedModel) -> None:
    class Enough(Exception):
        pass

    def reserve(num_scores: int) -> None:
        reserved.append(num_scores)
        raise Enough

    reserved: list[int] = []
    texts = [np.array(text) for text in itertools.islice(itertools.product(range(3), repeat=10), 0, 50_000, 5)]
    assert len(texts) == MAX_CANDIDATES
    large = SimpleNamespace(charset=model.charset, state_shape=(1, 1024))  # as large as the shipped one
    with pytest.raises(Enough):
        score_candidates(large, Origin(model.engine.initial_hidden(), 0), texts, reserve)  # type: ignore[arg-type]
    assert sum(map(len, texts)) < reserved[0] < Settings.model_fields["max_scores"].default // 2


def test_candidates__of_a_model_with_many_characters_fit_into_a_clients_budget(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(
        store, "large", charset="".join(map(chr, range(0x3000, 0x3000 + 20_000))), embedding_dim=1, num_units=1
    )
    reserved: list[int] = []
    with loaded_model(store, "large") as large:
        origin = origin_of(large, "\u4e00\u4e01")
        texts = [chr(0x5000 + index) + end for index in range(30) for end in "\u4e00\u4e01"]
        ids = [large.charset.encode(text) for text in texts]
        found = score_candidates(large, origin, ids, reserved.append)
        for text, logprobs in zip(texts, found, strict=True):
            assert logprobs.tobytes() == alone(large, origin, text).tobytes(), text
    assert reserved[0] < Settings.model_fields["max_scores"].default // 2


def test_candidates__are_given_up_when_the_client_has_left(model: LoadedModel) -> None:
    checks = iter([False, True])
    texts = [model.charset.encode(text) for text in ("abcd", "abef", "bcde")]
    with pytest.raises(ClientGone):
        score_candidates(model, origin_of(model, "a"), texts, client_has_left=lambda: next(checks))
    wait_until(lambda: model.engine.num_open == 0)


def test_candidates__use_what_room_the_engine_has(tiny_store: ModelStore) -> None:
    texts = [a + b + "c" for a in "abcdefgh" for b in "abcdefgh"]
    with loaded_model(tiny_store, max_running=2, max_waiting=0) as narrow:
        step(narrow, narrow.charset.encode("z" * 40))
        origin = origin_of(narrow, "To be")
        for text, logprobs in zip(texts, scored(narrow, origin, *texts), strict=True):
            assert logprobs.tobytes() == alone(narrow, origin, text).tobytes(), text


def test_candidates__are_refused_when_the_engine_is_full(tiny_store: ModelStore) -> None:
    with loaded_model(tiny_store, max_running=1, max_waiting=0) as full:
        origin = origin_of(full, "To be")
        handles = [full.engine.submit([Request(full.charset.encode("a" * 30), 1_000_000, 0)])[0] for _ in range(1)]
        with pytest.raises(Overloaded):
            scored(full, origin, "abc", "abd", "b")
        for handle in handles:
            handle.cancel()
            handle.wait()


def test_total__is_rounded_once() -> None:
    assert total(np.array([-1, -1e-30, 1], np.float32)) == -float(np.float32(1e-30))
