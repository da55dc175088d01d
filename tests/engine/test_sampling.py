"""Drawing characters: the uniform is a hash, and a draw inverts the distribution under the settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import sampling
from service.engine.sampling import History, choice_seed, draw_one, draw_plain, invert, uniform, uniforms, weights
from service.engine.sampling_settings import SamplingSettings

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
SEEDS = st.integers(-(2**63), 2**63 - 1)


def distribution(settings: SamplingSettings, logits: np.ndarray = LOGITS, count: int = 20_000) -> list[float]:
    """Relative frequencies of characters drawn with evenly spread uniforms."""
    spread = (np.arange(count)[:, None] + 0.5) / count
    shares = weights(logits, settings)
    drawn = invert(np.broadcast_to(shares, (count, len(shares))), spread)
    return (np.bincount(drawn, minlength=len(logits)) / count).tolist()  # type: ignore[no-any-return]


def test_uniform__is_a_fixed_function() -> None:
    assert sampling._mix(sampling._GOLDEN) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0, as published
    # Every implementation of the definition in the docstring must give these numbers.
    assert [uniform(0, 0), uniform(7, 6), uniform(-1, 10**6)] == [
        0.6524484863740322,
        0.9156775095739224,
        0.4611314684076886,
    ]


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**62)), min_size=1, max_size=5))
def test_uniforms__equal_uniform(pairs: list[tuple[int, int]]) -> None:
    seeds = np.array([seed & (2**64 - 1) for seed, _ in pairs], np.uint64)
    positions = np.array([position for _, position in pairs], np.uint64)
    assert uniforms(seeds, positions).tolist() == [uniform(seed, position) for seed, position in pairs]


@given(SEEDS, st.integers(0, 2**64 - 1))
def test_uniform__is_in_the_half_open_interval(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_uniform__is_evenly_spread_and_uncorrelated_over_positions_and_seeds() -> None:
    by_position = np.array([uniform(7, position) for position in range(20_000)])
    by_seed = np.array([uniform(seed, 7) for seed in range(20_000)])
    for numbers in (by_position, by_seed):
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
        assert counts.min() > 850
        assert counts.max() < 1150
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(by_position, by_seed)[0, 1]) < 0.03


def test_choice_seed__first_choice_has_the_seed_of_the_request_and_others_differ() -> None:
    assert choice_seed(-5, 0) == -5
    seeds = {choice_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_temperature__one_draws_from_the_distribution_of_the_model() -> None:
    assert distribution(SamplingSettings()) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-3)


def test_temperature__sharpens_and_flattens() -> None:
    assert distribution(SamplingSettings(temperature=0.5))[1] == pytest.approx(0.16 / 0.30, abs=1e-3)
    assert distribution(SamplingSettings(temperature=100))[0] == pytest.approx(0.25, abs=0.01)


def test_temperature__zero_draws_the_likeliest_and_the_first_of_equals() -> None:
    assert distribution(SamplingSettings(temperature=0)) == [0, 1, 0, 0]
    assert draw_one(np.zeros(4, np.float32), SamplingSettings(temperature=0), 0.99) == 0


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-10])
def test_temperature__smallest_values_are_greedy(temperature: float) -> None:
    assert distribution(SamplingSettings(temperature=temperature), count=10) == [0, 1, 0, 0]
    column = np.array([[temperature]])
    assert draw_plain(LOGITS[None], column, np.array([[0.999]])) == [1]


def test_top_k__leaves_the_k_likeliest() -> None:
    assert distribution(SamplingSettings(top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert distribution(SamplingSettings(top_k=1)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_k=9)) == distribution(SamplingSettings())


def test_top_k__of_equals_takes_the_first() -> None:
    assert distribution(SamplingSettings(top_k=2), np.zeros(4, np.float32)) == [0.5, 0.5, 0, 0]


def test_top_k__ranks_logits_however_close() -> None:
    close = np.array([0, 1.4e-45], np.float32)
    assert draw_one(close, SamplingSettings(top_k=1), 0.0) == draw_one(close, SamplingSettings(temperature=0), 0.0) == 1


def test_top_p__leaves_the_fewest_that_reach_it() -> None:
    assert distribution(SamplingSettings(top_p=0.5)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert distribution(SamplingSettings(top_p=0.3)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_p=1e-9)) == [0, 1, 0, 0]
    assert distribution(SamplingSettings(top_p=0.95)) == distribution(SamplingSettings())


def test_top_p__applies_after_top_k() -> None:
    assert distribution(SamplingSettings(top_k=2, top_p=0.5)) == [0, 1, 0, 0]


def test_min_p__leaves_characters_likely_relative_to_the_likeliest() -> None:
    assert distribution(SamplingSettings(min_p=0.6)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert distribution(SamplingSettings(min_p=1)) == [0, 1, 0, 0]


def test_logit_bias__adds_to_a_logit_and_can_force_or_forbid() -> None:
    doubled = distribution(SamplingSettings(logit_bias=((0, float(np.log(2))),)))
    assert doubled == pytest.approx([0.2 / 1.1, 0.4 / 1.1, 0.2 / 1.1, 0.3 / 1.1], abs=1e-3)
    assert distribution(SamplingSettings(logit_bias=((2, 100.0),))) == [0, 0, 1, 0]
    assert distribution(SamplingSettings(logit_bias=((1, -100.0),), temperature=0)) == [0, 0, 0, 1]


def test_penalties__are_those_of_openai_and_ctrl() -> None:
    history = History(4, np.array([3]))
    for char in (1, 1, 2):
        history.add(char)
    logits = np.array([1, 2, -3, 4], np.float32)

    def shifted(**penalties: float) -> list[float]:
        """The logits after penalties, up to a constant."""
        return (np.log(weights(logits, SamplingSettings(**penalties), history))).tolist()  # type: ignore[no-any-return,arg-type]

    def differences(values: list[float]) -> list[float]:
        return [value - values[0] for value in values]

    assert differences(shifted(frequency_penalty=0.5)) == pytest.approx(differences([1, 2 - 1, -3 - 0.5, 4]))
    assert differences(shifted(presence_penalty=0.5)) == pytest.approx(differences([1, 2 - 0.5, -3 - 0.5, 4]))
    assert differences(shifted(repetition_penalty=2)) == pytest.approx(differences([1, 1, -6, 2]))


SETTINGS = {
    "none": SamplingSettings(),
    "temperature": SamplingSettings(temperature=0.7),
    "hot": SamplingSettings(temperature=3.0),
    "top_k": SamplingSettings(top_k=5),
    "top_p": SamplingSettings(top_p=0.8),
    "min_p": SamplingSettings(min_p=0.05),
    "repetition_penalty": SamplingSettings(repetition_penalty=1.3),
    "presence_penalty": SamplingSettings(presence_penalty=0.8),
    "frequency_penalty": SamplingSettings(frequency_penalty=0.4),
    "logit_bias": SamplingSettings(logit_bias=((3, 2.0), (10, -1.5))),
    "all": SamplingSettings(0.9, 12, 0.95, 0.01, 1.1, 0.2, 0.1, ((4, 1.0),)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_weights__draws_have_the_distribution_of_the_settings(name: str) -> None:
    """Chi-square of 200,000 draws against probabilities that this file computes in another way."""
    settings, rng = SETTINGS[name], np.random.default_rng(3)
    logits = rng.normal(0, 2, 30).astype(np.float32)
    history = History(30, np.array([1, 2, 3]))
    for char in (3, 5, 5, 7):
        history.add(char)
    expected = _expected(logits, settings, [1, 2, 3], [3, 5, 5, 7])
    counts, size, shares = np.zeros(30), 20_000, weights(logits, settings, history)
    for start in range(0, 200_000, size):
        positions = np.arange(start, start + size, dtype=np.uint64)
        counts += np.bincount(
            invert(np.broadcast_to(shares, (size, 30)), uniforms(np.array([11], np.uint64), positions)[:, None]),
            minlength=30,
        )
    assert (counts[expected == 0] == 0).all()
    frequent = expected * 200_000 >= 5
    chi_square = ((counts - expected * 200_000)[frequent] ** 2 / (expected * 200_000)[frequent]).sum()
    degrees = max(1, int(frequent.sum()) - 1)
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations above the mean


def _expected(logits: np.ndarray, settings: SamplingSettings, prompt: list[int], generated: list[int]) -> np.ndarray:
    values = {char: float(logit) for char, logit in enumerate(logits)}
    for char in set(prompt) | set(generated):
        penalty = settings.repetition_penalty
        values[char] = values[char] / penalty if values[char] > 0 else values[char] * penalty
    for char in generated:
        values[char] -= settings.frequency_penalty
    for char in set(generated):
        values[char] -= settings.presence_penalty
    for char, bias in settings.logit_bias:
        values[char] += bias
    total = sum(np.exp(value / settings.temperature) for value in values.values())
    shares = {char: np.exp(value / settings.temperature) / total for char, value in values.items()}
    ranked = sorted(shares, key=lambda char: (-shares[char], char))
    ranked = [char for char in ranked if shares[char] >= settings.min_p * shares[ranked[0]]]
    ranked = ranked[: settings.top_k] if settings.top_k else ranked
    chosen, mass, total = [], 0.0, sum(shares[char] for char in ranked)
    for char in ranked:
        chosen.append(char)
        mass += shares[char] / total
        if mass >= settings.top_p:
            break
    result = np.zeros(len(logits))
    for char in chosen:
        result[char] = shares[char] / sum(shares[other] for other in chosen)
    return result


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    logits=st.lists(FLOATS, min_size=1, max_size=40),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    bias=st.floats(-100, 100),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_draw_one__any_settings_draw_an_id(
    logits: list[float], bias: float, chance: float, temperature: float, top_k: int, **others: Any
) -> None:
    values = np.array(logits, np.float32)
    history = History(len(values), np.array([0]))
    history.add(len(values) - 1)
    settings = SamplingSettings(temperature, top_k, logit_bias=((0, bias),), **others)
    assert 0 <= draw_one(values, settings, chance, history) < len(values)
    restricted = SamplingSettings(temperature, top_k)
    chosen = draw_one(values, restricted, chance)
    if top_k:
        assert (values > values[chosen]).sum() < top_k
    if temperature == 0:
        assert values[chosen] == values.max()


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5), min_size=1, max_size=6), st.data())
def test_draw_plain__rows_drawn_together_get_what_each_gets_alone(rows: list[list[float]], data: st.DataObject) -> None:
    logits = np.array(rows, np.float32)
    one = st.lists(st.floats(0, 1, exclude_max=True), min_size=len(rows), max_size=len(rows))
    chances = np.array(data.draw(one))[:, None]
    temperatures = np.array(data.draw(one))[:, None] + 0.01
    together = draw_plain(logits, temperatures, chances)
    alone = [
        draw_one(logits[i], SamplingSettings(float(temperatures[i, 0])), float(chances[i, 0])) for i in range(len(rows))
    ]
    assert together.tolist() == alone


@given(
    logits=st.lists(FLOATS, min_size=2, max_size=40),
    allowed=st.sets(st.integers(0, 39), min_size=1),
    chance=st.sampled_from([0.0, float(np.nextafter(1, 0))]) | st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 1e-300, 1.0, 100.0]),
    top_p=st.sampled_from([1e-9, 0.5, 1.0]),
)
def test_allowed__are_the_only_characters_that_are_drawn_and_keep_their_shares(
    logits: list[float], allowed: set[int], chance: float, temperature: float, top_p: float
) -> None:
    """Also with the smallest and the largest uniform, although `exp` gives every number a weight."""
    values = np.array(logits, np.float32)
    ids = tuple(sorted(one for one in allowed if one < len(values))) or (1,)
    settings = SamplingSettings(temperature, top_k=3, top_p=top_p, allowed=ids)
    drawn = draw_one(values, settings, chance)
    assert drawn in ids
    # Of the allowed characters alone, the same one is drawn.
    assert ids.index(drawn) == draw_one(values[[*ids]], SamplingSettings(temperature, top_k=3, top_p=top_p), chance)


def test_draw_one__largest_uniform_never_draws_an_excluded_character() -> None:
    logits, largest = np.array([0, 0, -1, -2000], np.float32), np.nextafter(1, 0)
    assert draw_one(logits, SamplingSettings(), largest) == 2
    assert draw_one(logits, SamplingSettings(top_k=2), largest) == 1
