"""Elementary functions: within their stated errors, with bits that don't depend on an element's place in an array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from service.engine import arithmetic
from service.engine.arithmetic import SIGMOID, TANH, Activation, activate, exp, log


def activation_of(activation: Activation, x: np.ndarray) -> np.ndarray:
    limit = np.float32(activation.limit)
    y = np.clip((x * activation.scale).astype(np.float32), -limit, limit)
    activate(activation, y, np.empty_like(y), np.empty_like(y))
    return y


@pytest.mark.parametrize(
    ("activation", "exact", "lowest"),
    [(TANH, np.tanh, -1.0), (SIGMOID, lambda x: 1 / (1 + np.exp(-x)), 0.0)],
    ids=["tanh", "sigmoid"],
)
def test_activate__is_within_its_error_and_bounds(
    activation: Activation, exact: Callable[[np.ndarray], np.ndarray], lowest: float
) -> None:
    x = np.concatenate([np.linspace(-30, 30, 1_000_001), np.geomspace(1e-40, 12, 100_001)])
    assert np.abs(activation_of(activation, x) - exact(x)).max() < activation.error
    limit = np.float32(activation.limit).view(np.int32)
    y = np.arange(limit - 2_000_000, limit + 1, dtype=np.int32).view(np.float32)  # every number near the limit
    for sign in (1, -1):
        signed = y * np.float32(sign)
        activate(activation, signed, np.empty_like(y), np.empty_like(y))
        assert signed.max() <= 1
        assert signed.min() >= lowest


def test_exp__is_within_its_error() -> None:
    x = -np.concatenate([np.linspace(0, 700, 200_001), np.geomspace(1e-300, 1, 10_001)])
    assert np.abs(exp(x.copy()) / np.exp(x) - 1).max() < arithmetic.EXP_ERROR
    assert exp(np.array([0.0]))[0] == 1
    assert (exp(np.array([-700.1, -1e300, -np.inf])) == exp(np.array([-700.0]))).all()


def test_log__is_within_its_error() -> None:
    x = np.concatenate([np.geomspace(1, 1e6, 200_001), 1 + np.geomspace(1e-15, 1, 10_001)])
    assert np.abs(log(x) - np.log(x)).max() < arithmetic.LOG_ERROR
    assert log(np.array([1.0]))[0] == 0


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 33, 1000])
def test_functions__bits_do_not_depend_on_the_place_in_an_array(size: int) -> None:
    # Library functions compute the end of an array with other code than its middle.
    x = np.random.default_rng(0).normal(0, 3, size)
    negative, positive = -np.abs(x) * 10, 1 + np.abs(x)
    functions: list[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = [
        (lambda x: activation_of(TANH, x), x),
        (lambda x: activation_of(SIGMOID, x), x),
        (lambda x: exp(x.copy()), negative),
        (log, positive),
    ]
    for function, values in functions:
        alone = np.concatenate([function(values[i : i + 1]) for i in range(size)])
        assert np.array_equal(function(values), alone)


def test_torch__operations_give_the_bits_of_numpy() -> None:
    # All implementations agree because +, -, *, / and rounding are those of IEEE 754 everywhere.
    rng = np.random.default_rng(1)
    x, y = (rng.normal(0, 1, 10_007).astype(np.float32) for _ in range(2))
    for operation, other in ((np.add, torch.add), (np.multiply, torch.mul), (np.divide, torch.div)):
        assert np.array_equal(operation(x, y), other(torch.from_numpy(x), torch.from_numpy(y)).numpy())
    assert np.array_equal(np.rint(x * 127), torch.from_numpy(x * 127).round().numpy())


def test_functions__bits_are_those_of_version_1() -> None:
    # If a bit changes, texts change: that needs a new VERSION and new sums here.
    x = np.linspace(-9, 9, 4097)
    values = [activation_of(TANH, x), activation_of(SIGMOID, x), exp(x - 9), log(x + 10)]
    sums = [hashlib.sha256(value.tobytes()).hexdigest()[:16] for value in values]
    assert arithmetic.VERSION == 1
    assert sums == SUMS


SUMS = ["10df1609ab776a80", "2958912f88734ecf", "9bc99e5590d1202f", "5996c13b76bbe043"]
