"""Elementary functions: within their stated errors, and the same bits wherever an element stands."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from service.engine import arithmetic
from service.engine.arithmetic import TANH_LIMIT, exp, log, sigmoid_of_double, tanh


def tanh_of(x: np.ndarray) -> np.ndarray:
    x = np.clip(x.astype(np.float32), np.float32(-TANH_LIMIT), np.float32(TANH_LIMIT))
    tanh(x, np.empty_like(x), np.empty_like(x))
    return x


def test_tanh_is_as_close_as_it_says_and_never_past_one() -> None:
    x = np.concatenate([np.linspace(-12, 12, 1_000_001), np.geomspace(1e-40, 12, 100_001)]).astype(np.float32)
    assert np.abs(tanh_of(x) - np.tanh(x.astype(np.float64))).max() < arithmetic.TANH_ERROR
    limit = np.float32(TANH_LIMIT).view(np.int32)
    top = np.arange(limit - 2_000_000, limit + 1, dtype=np.int32).view(np.float32)  # every number where it could be
    assert tanh_of(top).max() <= 1
    assert np.array_equal(tanh_of(-x), -tanh_of(x))


def test_the_sigmoid_is_as_close_as_it_says() -> None:
    x = np.linspace(-7.2, 7.2, 100_001).astype(np.float32)
    expected = 1 / (1 + np.exp(-2 * x.astype(np.float64)))
    sigmoid_of_double(x, np.empty_like(x), np.empty_like(x))
    assert np.abs(x - expected).max() < arithmetic.TANH_ERROR
    assert x.min() >= 0
    assert x.max() <= 1


def test_exp_is_as_close_as_it_says() -> None:
    x = -np.concatenate([np.linspace(0, 700, 200_001), np.geomspace(1e-300, 1, 10_001)])
    assert np.abs(exp(x) / np.exp(x) - 1).max() < arithmetic.EXP_ERROR
    assert exp(np.array([0.0]))[0] == 1
    assert (exp(np.array([-700.1, -1e300, -np.inf])) == 0).all()


def test_log_is_as_close_as_it_says() -> None:
    x = np.concatenate([np.geomspace(1, 1e6, 200_001), 1 + np.geomspace(1e-15, 1, 10_001)])
    assert np.abs(log(x) - np.log(x)).max() < arithmetic.LOG_ERROR
    assert log(np.array([1.0]))[0] == 0


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 33, 1000])
def test_an_element_gets_the_same_bits_wherever_it_stands(size: int) -> None:
    # The trap of library functions: the end of an array goes through other code than its middle.
    x = np.random.default_rng(0).normal(0, 3, size)
    assert np.array_equal(tanh_of(x), np.concatenate([tanh_of(x[i : i + 1]) for i in range(size)]))
    negative, positive = -np.abs(x) * 10, 1 + np.abs(x)
    assert np.array_equal(exp(negative), np.concatenate([exp(negative[i : i + 1]) for i in range(size)]))
    assert np.array_equal(log(positive), np.concatenate([log(positive[i : i + 1]) for i in range(size)]))


def test_torch_gets_the_same_bits_from_the_same_operations() -> None:
    # What the exactness of every implementation rests on: +, -, *, / and rounding are IEEE 754's, elsewhere too.
    rng = np.random.default_rng(1)
    x, y = (rng.normal(0, 1, 10_007).astype(np.float32) for _ in range(2))
    for operation, other in ((np.add, torch.add), (np.multiply, torch.mul), (np.divide, torch.div)):
        assert np.array_equal(operation(x, y), other(torch.from_numpy(x), torch.from_numpy(y)).numpy())
    assert np.array_equal(np.rint(x * 127), torch.from_numpy(x * 127).round().numpy())


def test_the_bits_are_those_of_version_1() -> None:
    # A change of any bit is a change of texts: it needs a new VERSION, and these sums with it.
    x = np.linspace(-9, 9, 4097)
    sums = [
        hashlib.sha256(f(x).tobytes()).hexdigest()[:16] for f in (tanh_of, lambda x: exp(x - 9), lambda x: log(x + 10))
    ]
    assert arithmetic.VERSION == 1
    assert sums == SUMS


SUMS = ["5bea30b7509b2e8a", "b78c4286ce0b4d2b", "b00334e7dc126a74"]
