"""A few steps of a small fixed model, whose bits are known: whether a variant of the kernel computes what it must.

A compiler that was told to reorder sums (`-ffast-math`), or a processor or emulator that computes differently, would
give other texts under an unchanged fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32
from service.engine.automaton.automaton import Automaton
from service.engine.request import Request
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.stepper import Row, Stepper
from service.model.config import ModelConfig
from service.model.quantize import IntegerPrecision, QuantizedGRU, QuantizedLayer, QuantizedLinear

# SHA-256 of everything that `digest_of` computes, with `service.engine.arithmetic.VERSION` 1. Both steppers give it.
EXPECTED = "288f04df97ccf02c4afded02bad171b4068047a6b408eb7093d0653fd488080e"
# The same of texts with an automaton.
EXPECTED_WITH_AUTOMATON = "196f39727f8ca2cc2766584cc4ed2edffb49856e5e30dfc112659708f1fc5a4b"

_UNITS = 77  # no multiple of the numbers that any instruction set handles at a time
_CHARSET = "".join(map(chr, range(97, 97 + 53)))
_NUM_CHARS = 24
_SETTINGS = (
    PLAIN,
    SamplingSettings(temperature=0.0, logit_bias=((3, 0.25), (7, -1.5))),
    SamplingSettings(temperature=0.7, top_k=9, top_p=0.85, min_p=0.01),
    SamplingSettings(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, top_p=0.95),
)


def digest_of(make_stepper: Callable[[QuantizedGRU], Stepper], *, with_automaton: bool = False) -> str:
    """Return the SHA-256 of all characters, states and log-probabilities that a stepper computes, in hexadecimal.

    with_automaton: of texts that have one.
    """
    digest = hashlib.sha256()
    precisions: tuple[IntegerPrecision, ...] = ("int8", "int4")
    for precision in precisions:
        stepper = make_stepper(_model(precision))
        rows = [_row(stepper, seed, _automaton() if with_automaton else None) for seed in range(2 * len(_SETTINGS))]
        for result, row in zip(stepper.advance(rows, 2 * _NUM_CHARS), rows, strict=True):
            parts = [result.chars.astype("<i8"), row.hidden.astype("<f4")]
            for scores in (result.scores, result.prompt_scores):
                if scores is not None:
                    parts += [scores.chosen.astype("<f4"), scores.top_ids.astype("<i4"), scores.top.astype("<f4")]
                    parts += [scores.allowed.astype("<f4")] if scores.allowed is not None else []
            for part in parts:
                digest.update(part.tobytes())
    return digest.hexdigest()


def _row(stepper: Stepper, seed: int, automaton: Automaton | None) -> Row:
    sampling = _SETTINGS[seed % len(_SETTINGS)]
    prompt = _numbers(5, seed, len(_CHARSET)).astype(np.int64)
    request = Request(
        prompt,
        max_chars=_NUM_CHARS,
        seed=seed,
        position=seed * 1000,
        sampling=sampling,
        num_logprobs=4,
        score_prompt=True,
        automaton=automaton,
    )
    return Row.of(request, stepper.initial_hidden(), len(_CHARSET))


@cache
def _automaton() -> Automaton:
    """Return an automaton of five states that allows a part of the characters in each, and has a stop string."""
    classes = (np.arange(len(_CHARSET)) % 7).astype(np.int32)
    transitions = np.array([[(state * 3 + char) % 6 - 1 for char in range(7)] for state in range(5)], np.int32)
    stop_chars = np.array([0, 0, 0, 0, 2], np.int32)
    return Automaton(classes, transitions, np.array([0, 1, 1, 1, 0], np.int32), stop_chars, stop_chars)


@cache
def _model(precision: IntegerPrecision) -> QuantizedGRU:
    config = ModelConfig(charset=_CHARSET, embedding_dim=1, num_units=_UNITS, num_layers=2)
    largest = {"int8": 127, "int4": 7}[precision]
    layers = (
        QuantizedLayer(_linear(3 * _UNITS, 1, largest), None),
        QuantizedLayer(_linear(3 * _UNITS, 2, largest), _linear(3 * _UNITS, 3, largest)),
    )
    table = _fractions(len(_CHARSET) * 3 * _UNITS, 4).reshape(len(_CHARSET), 3 * _UNITS)
    return QuantizedGRU(config, precision, table, layers, _linear(len(_CHARSET), 5, 127))


def _linear(num_rows: int, seed: int, largest: int) -> QuantizedLinear:
    weight = _numbers(num_rows * _UNITS, seed, 2 * largest + 1) - largest
    scale = ((1 + _fractions(num_rows, seed + 100) / 4) * np.float32(0.5 / (largest * 127))).astype(np.float32)
    return QuantizedLinear(weight.astype(np.int8).reshape(num_rows, _UNITS), scale, _fractions(num_rows, seed + 200))


def _numbers(size: int, seed: int, limit: int) -> NDArray[np.int64]:
    """Return (size,) numbers below `limit` without a pattern: integer arithmetic, so they are the same everywhere."""
    mixed = (np.arange(size, dtype=np.int64) + 7919 * seed + 1) * 2654435761 % 2**32
    return (mixed * 40503 // 2**16) % 65_521 % limit


def _fractions(size: int, seed: int) -> Float32:
    """Return (size,) numbers from -1 to 1 that float32 represents exactly."""
    return ((_numbers(size, seed, 2049) - 1024) / 1024).astype(np.float32)
