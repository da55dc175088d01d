"""Portable states: a sealed state opens and is identical to the bit; a changed one is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.errors import InvalidState, StateExpired, StateModelMismatch
from service.sessions.portable import StateHeader, StateSealer
from tests.harness.clock import Clock
from tests.harness.portable_states import ALPHABET, changed

OLD, NEW, FOREIGN = "the key of last year", "the key of this year", "the key of somebody else"
HEADER = StateHeader(model="tiny@1", identity="ab" * 32, position=12, seed=-7, expires_at=None)
HIDDEN = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)


@given(
    hidden=arrays.arrays(np.float32, (2, 8), elements=st.floats(-1, 1, width=32)),
    position=st.integers(0, 2**53),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_open__returns_the_sealed_state_to_the_bit(hidden: np.ndarray, position: int, seed: int) -> None:
    header = HEADER.model_copy(update={"position": position, "seed": seed})
    opened = StateSealer([NEW]).open(StateSealer([NEW]).seal(header, hidden))
    assert opened.header == header
    assert opened.hidden(header.identity, (2, 8), "tiny@1").tobytes() == hidden.tobytes()


def test_sealer__signs_with_its_first_key_and_accepts_all() -> None:
    rotated = StateSealer([NEW, OLD])
    for sealer in (StateSealer([OLD]), rotated):
        rotated.open(sealer.seal(HEADER, HIDDEN))
    StateSealer([NEW]).open(rotated.seal(HEADER, HIDDEN))
    with pytest.raises(InvalidState):
        StateSealer([OLD]).open(rotated.seal(HEADER, HIDDEN))


def test_open__refuses_a_state_once_it_has_expired(clock: Clock) -> None:
    sealer = StateSealer([NEW], clock)
    sealed = sealer.seal(HEADER.model_copy(update={"expires_at": clock.now + 60}), HIDDEN)
    clock.now += 59.999
    sealer.open(sealed)
    clock.now += 0.001
    with pytest.raises(StateExpired):
        sealer.open(sealed)


def test_seal__makes_less_than_6000_characters_of_1024_units() -> None:
    sealed = StateSealer([NEW]).seal(HEADER, np.zeros((1, 1024), np.float32))
    assert 5_500 < len(sealed) < 6_000


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1.0000001, -2.0])
def test_hidden__refuses_values_that_no_gru_has(number: float) -> None:
    hidden = HIDDEN.copy()
    hidden[0, 3] = number
    opened = StateSealer([NEW]).open(StateSealer([NEW]).seal(HEADER, hidden))
    with pytest.raises(InvalidState):
        opened.hidden(HEADER.identity, (1, 16), "tiny@1")


def test_hidden__refuses_another_model_or_size() -> None:
    opened = StateSealer([NEW]).open(StateSealer([NEW]).seal(HEADER, HIDDEN))
    with pytest.raises(StateModelMismatch, match="has other weights or another arithmetic here"):
        opened.hidden("cd" * 32, (1, 16), HEADER.model)
    with pytest.raises(StateModelMismatch, match=f"the state is of {HEADER.model}, and other@1 has other weights"):
        opened.hidden("cd" * 32, (1, 16), "other@1")
    for shape in ((1, 15), (2, 16), (1, 1024)):
        with pytest.raises(InvalidState):
            opened.hidden(HEADER.identity, shape, "tiny@1")


def test_open__refuses_every_changed_state() -> None:
    """20,000 changes of every kind are refused, also of the unused bits of base64, which change no decoded byte."""
    chance = random.Random(1)
    sealer = StateSealer([NEW])
    good = sealer.seal(HEADER, HIDDEN)
    for _ in range(20_000):
        bad = changed(good, chance)
        if bad == good:
            continue
        with pytest.raises(InvalidState):
            sealer.open(bad)
    for place in range(len(good)):
        with pytest.raises(InvalidState):
            sealer.open(good[:place])
    for last in ALPHABET:
        if last != good[-1]:
            with pytest.raises(InvalidState):
                sealer.open(good[:-1] + last)
    with pytest.raises(InvalidState):
        sealer.open(StateSealer([FOREIGN]).seal(HEADER, HIDDEN))
