"""Draws characters, for many texts at once.

The random number for the character at position p is a hash of (seed, p). There is no generator and no hidden counter:
the same model, text, settings, seed and position give the same character, regardless of what else was drawn.

Settings apply in this order: penalties (repetition, then frequency and presence), logit_bias, allowed (by the settings
and by an automaton), temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Float64, Ids
from service.engine import arithmetic
from service.engine.sampling_settings import SamplingSettings

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class History:
    """What penalties count: which characters the prompt has, and how often each character was generated."""

    def __init__(self, vocab_size: int, prompt: Ids) -> None:
        self.in_prompt = np.zeros(vocab_size, np.bool_)  # (V,)
        self.in_prompt[prompt] = True
        self.num_generated = np.zeros(vocab_size, np.float64)  # (V,)

    def add(self, char: int) -> None:
        """Count a generated character."""
        self.num_generated[char] += 1


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits: a hash of seed and position, both modulo 2**64.

    The hash is two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014, with Stafford's constants). The
    first round hashes the seed alone, so that the sequences of neighbouring seeds have nothing in common.
    """
    return (_mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> Float64:
    """Return `uniform` of each pair of seed and position. The shapes are broadcast."""
    golden = np.uint64(_GOLDEN)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        mixed = _mix_array(_mix_array(seeds + golden) + (positions + np.uint64(1)) * golden)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of one of several choices for a prompt. Choice 0 has the seed of the request."""
    return seed if index == 0 else _mix(_mix(seed + _GOLDEN) ^ _mix(index)) >> 1


def draw_plain(
    logits: Float32, temperatures: Float64 | None, uniforms: Float64, mask: NDArray[np.bool_] | None = None
) -> Ids:
    """Draw an id for each row by the inverse of its cumulative distribution, summed in the order of ids in float64.

    Args:
        logits: (B, V).
        temperatures: (B, 1), above 0. None if all are 1; dividing by 1 would give the same bits.
        uniforms: (B, 1), in [0, 1).
        mask: (B, V), the characters that may be drawn, at least one in each row; None: all.

    Returns (B,) ids.
    """
    # Subtract before dividing: with any temperature, however small, the largest stays at 0 and others go towards -inf.
    shifted = logits.astype(np.float64)
    if mask is not None:
        shifted[~mask] = -np.inf
    shifted -= np.maximum.reduce(shifted, axis=1, keepdims=True)
    if temperatures is not None:
        with np.errstate(over="ignore"):
            shifted /= temperatures
    weights = arithmetic.exp(shifted)
    if mask is None:
        return invert(weights, uniforms)
    weights[~mask] = 0  # `exp` gives every number a weight
    last = weights.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return np.asarray(np.minimum(invert(weights, uniforms), last))


def draw_one(
    logits: Float32,
    settings: SamplingSettings,
    uniform: float,
    history: History | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> int:
    """Return the id that `uniform` in [0, 1) selects from (V,) logits under any settings.

    Equal logits rank in the order of ids. Settings with penalties need a history. mask: see `weights`.
    """
    shares = weights(logits, settings, history, mask)
    chosen = int(invert(shares[None], np.array([[uniform]]))[0])
    # Rounding may make `uniform * total` equal to the total. Then the last character that has a weight is right.
    return min(chosen, int(np.flatnonzero(shares)[-1]))


def weights(
    logits: Float32,
    settings: SamplingSettings,
    history: History | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Float64:
    """Return (V,) unnormalised probabilities of characters under the settings, from (V,) logits.

    mask: (V,), the characters that may be drawn, beside what the settings allow; None: all.
    """
    adjusted = _adjust(logits, settings, history)
    if mask is not None:
        adjusted[~mask] = -np.inf
    if settings.temperature == 0:
        greedy = np.zeros(len(adjusted))
        greedy[np.argmax(adjusted)] = 1.0
        return greedy
    with np.errstate(over="ignore"):
        scaled = (adjusted - adjusted.max()) / settings.temperature
    shares = arithmetic.exp(scaled)  # the largest is 1
    if settings.allowed is not None or mask is not None:
        shares[np.isneginf(adjusted)] = 0  # `exp` gives every number a weight
    return _restrict(shares, adjusted, settings) if settings.restricts else shares


def _adjust(logits: Float32, settings: SamplingSettings, history: History | None) -> Float64:
    """Return (V,) float64 logits after penalties and bias, -inf for characters that are not allowed.

    They are computed in float64, element by element.
    """
    adjusted = logits.astype(np.float64)
    if settings.penalizes:
        if history is None:
            raise ValueError("penalties need a history")
        if settings.repetition_penalty != 1:
            seen = history.in_prompt | (history.num_generated > 0)
            penalty = settings.repetition_penalty
            adjusted = np.where(seen, np.where(adjusted > 0, adjusted / penalty, adjusted * penalty), adjusted)
        adjusted = adjusted - history.num_generated * settings.frequency_penalty
        adjusted = adjusted - (history.num_generated > 0) * settings.presence_penalty
    for char, bias in settings.logit_bias:
        adjusted[char] += bias
    if settings.allowed is not None:
        allowed = adjusted[[*settings.allowed]]
        adjusted.fill(-np.inf)
        adjusted[[*settings.allowed]] = allowed
    return adjusted


def _restrict(weights: Float64, logits: Float64, settings: SamplingSettings) -> Float64:
    """Return the weights, zero for characters that min_p, top_k and then top_p exclude. The likeliest always stays."""
    ranked = np.argsort(-logits, kind="stable")  # the likeliest first
    if settings.min_p > 0:
        ranked = ranked[: max(1, int(np.count_nonzero(weights >= settings.min_p)))]
    if settings.top_k > 0:
        ranked = ranked[: settings.top_k]
    if settings.top_p < 1:
        reached = np.cumsum(weights[ranked])
        ranked = ranked[: int(np.searchsorted(reached, settings.top_p * reached[-1], side="left")) + 1]
    restricted = np.zeros_like(weights)
    restricted[ranked] = weights[ranked]
    return restricted


def invert(weights: Float64, uniforms: Float64) -> Ids:
    """Return (B,) ids by the inverse of the cumulative distribution, from (B, V) weights and (B, 1) uniforms."""
    cumulative = np.add.accumulate(weights, axis=1)
    chosen = np.add.reduce(cumulative <= uniforms * cumulative[:, -1:], axis=1, dtype=np.int64)
    return np.asarray(np.minimum(chosen, weights.shape[1] - 1))


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))
