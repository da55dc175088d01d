"""Candidates: each gets the log-probabilities that reading it alone gives, whatever it shares with the others."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.arrays import Float32
from service.errors import ClientGone, Overloaded, TooManyScores
from service.generation.candidates import Origin, log_shares, score_candidates, total
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel
from service.store.model_store import ModelStore
from tests.harness.models import loaded_model

TEXTS = st.lists(
    st.one_of(
        st.text("ab", min_size=1, max_size=8),
        st.builds(lambda start, end: start + end, st.sampled_from(["the ", "there", "a"]), st.text("a cehnt", min_size=1, max_size=6)),
    ),
    min_size=1,
    max_size=40,
)  # fmt: skip


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
@settings(max_examples=60, deadline=None)
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
