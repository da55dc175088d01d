"""The settings that one text is sampled with, and the draw of one character.

The random number for the character at position p is a hash of (seed, p). There is no generator and no hidden counter:
the same model, text, settings, seed and position give the same character, whatever was drawn before or elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose from the model's distribution.

    temperature: divides the logits; 0 takes the likeliest character always. top_k: only the k likeliest; 0 is all of
    them. top_p: only the likeliest ones that together reach this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a hash of (seed, position); both are taken modulo 2**64.

    Two rounds of the finaliser of SplitMix64 (Steele, Lea, Flood 2014, with Stafford's constants): the first over the
    seed alone, so that neighbouring seeds share no part of their sequences.
    """
    return (_mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def draw(logits: NDArray[np.float32], settings: SamplingSettings, uniform: float) -> int:
    """The id that `uniform` in [0, 1) chooses from (V,) logits.

    Inverse of the cumulative distribution in the order of ids, float64. Equal logits rank in the order of ids.
    """
    if settings.temperature == 0:
        return int(np.argmax(logits))
    # Subtracting before dividing: however small the temperature, the largest stays at 0 and others fall to -inf.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits.max())) / settings.temperature
    weights = np.exp(scaled)  # (V,), unnormalised probabilities; the largest is 1
    if 0 < settings.top_k < len(weights) or settings.top_p < 1:
        weights = _restrict(weights, np.argsort(-logits, kind="stable"), settings)
    cumulative = np.cumsum(weights)
    chosen = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # Rounding may put the product on the total itself: then the last character with any weight is meant.
    return min(chosen, int(np.flatnonzero(weights)[-1]))


def _restrict(
    weights: NDArray[np.float64], ranked: NDArray[np.int64], settings: SamplingSettings
) -> NDArray[np.float64]:
    """Weights with zeros for what top_k, and then top_p, leave out. ranked: ids, the likeliest first; it stays."""
    if settings.top_k > 0:
        ranked = ranked[: settings.top_k]
    if settings.top_p < 1:
        reached = np.cumsum(weights[ranked])
        ranked = ranked[: int(np.searchsorted(reached, settings.top_p * reached[-1], side="left")) + 1]
    kept = np.zeros_like(weights)
    kept[ranked] = weights[ranked]
    return kept


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
