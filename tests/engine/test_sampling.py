"""Drawing a character: the uniform is a hash, the draw is the inverse of the restricted distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import sampling
from service.engine.sampling import SamplingSettings, draw, uniform

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
SEEDS = st.integers(-(2**63), 2**63 - 1)


def distribution(settings: SamplingSettings, logits: np.ndarray = LOGITS, count: int = 20_000) -> list[float]:
    """Relative frequencies over evenly spread uniforms."""
    drawn = [draw(logits, settings, (index + 0.5) / count) for index in range(count)]
    return [drawn.count(index) / count for index in range(len(logits))]


def test_the_uniform_is_a_fixed_function() -> None:
    assert sampling._mix(sampling._GOLDEN) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0, as published
    # Other implementations of the docstring's definition have to give these too.
    assert [uniform(0, 0), uniform(7, 6), uniform(-1, 10**6)] == [
        0.6524484863740322,
        0.9156775095739224,
        0.4611314684076886,
    ]


@given(SEEDS, st.integers(0, 2**64 - 1))
def test_the_uniform_lies_in_the_half_open_interval(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_uniforms_of_positions_and_of_seeds_are_spread_evenly_and_unrelated() -> None:
    by_position = np.array([uniform(7, position) for position in range(20_000)])
    by_seed = np.array([uniform(seed, 7) for seed in range(20_000)])
    for numbers in (by_position, by_seed):
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
        assert counts.min() > 850
        assert counts.max() < 1150
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(by_position, by_seed)[0, 1]) < 0.03


def test_temperature_one_draws_from_the_models_own_distribution() -> None:
    assert distribution(SamplingSettings()) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-3)


def test_temperature_sharpens_and_flattens() -> None:
    assert distribution(SamplingSettings(temperature=0.5))[1] == pytest.approx(0.16 / 0.30, abs=1e-3)
    assert distribution(SamplingSettings(temperature=100))[0] == pytest.approx(0.25, abs=0.01)


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert distribution(SamplingSettings(temperature=0)) == [0, 1, 0, 0]
    assert draw(np.zeros(4, np.float32), SamplingSettings(temperature=0), 0.99) == 0


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-10])
def test_the_smallest_temperatures_are_greedy_and_not_an_error(temperature: float) -> None:
    assert distribution(SamplingSettings(temperature=temperature), count=10) == [0, 1, 0, 0]


def test_top_k_leaves_the_k_likeliest() -> None:
    assert distribution(SamplingSettings(top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert distribution(SamplingSettings(top_k=1)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_k=9)) == distribution(SamplingSettings())


def test_top_k_of_equals_takes_the_first() -> None:
    assert distribution(SamplingSettings(top_k=2), np.zeros(4, np.float32)) == [0.5, 0.5, 0, 0]


def test_ranks_are_those_of_the_logits_however_close() -> None:
    close = np.array([0, 1.4e-45], np.float32)
    assert draw(close, SamplingSettings(top_k=1), 0.0) == draw(close, SamplingSettings(temperature=0), 0.0) == 1


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    assert distribution(SamplingSettings(top_p=0.5)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert distribution(SamplingSettings(top_p=0.3)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_p=1e-9)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_p=0.95)) == distribution(SamplingSettings())


def test_top_p_applies_to_what_top_k_left() -> None:
    assert distribution(SamplingSettings(top_k=2, top_p=0.5)) == [0, 1, 0, 0]


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.floats(0, 100),
    st.integers(0, 50),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_max=True),
)
def test_every_draw_is_an_id_that_the_settings_allow(
    logits: list[float], temperature: float, top_k: int, top_p: float, chance: float
) -> None:
    values = np.array(logits, np.float32)
    chosen = draw(values, SamplingSettings(temperature, top_k, top_p), chance)
    assert 0 <= chosen < len(values)
    if top_k:
        assert (values > values[chosen]).sum() < top_k
    if temperature == 0:
        assert values[chosen] == values.max()


def test_the_largest_uniform_takes_the_last_character_with_any_weight() -> None:
    logits = np.array([0, 0, -np.inf], np.float32)
    assert draw(logits, SamplingSettings(), np.nextafter(1, 0)) == 1
