"""Quantisation: small errors, the same numbers on every machine, and the choice of a precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.model.quantize import _exact_product, choose_precision, quantize, quantize_rows
from tests.harness.models import random_tensors, tiny_config


@given(st.integers(0, 2**32 - 1), st.sampled_from([7, 127]), st.floats(-20, 20))
def test_quantize_rows__is_never_worse_than_without_clipping(seed: int, largest: int, exponent: float) -> None:
    weight = (np.random.default_rng(seed).normal(0, 1, (5, 64)) * 2.0**exponent).astype(np.float32)
    integers, scale = quantize_rows(weight, largest)
    weight = weight.astype(np.float64)
    assert np.abs(integers).max() <= largest
    error = np.square(weight - integers * scale[:, None]).sum(axis=1)
    unclipped = np.abs(weight).max(axis=1, keepdims=True) / largest
    plain = np.square(weight - np.rint(weight / unclipped) * unclipped).sum(axis=1)
    assert (error <= plain * (1 + 1e-9)).all()


def test_quantize_rows__clips_4_bit_rows() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (20, 1024)).astype(np.float32)
    _, scale = quantize_rows(weight, 7)
    assert (scale * 7 < np.abs(weight).max(axis=1) * 0.95).any()


def test_quantize_rows__a_row_of_zeros_stays_zeros() -> None:
    integers, scale = quantize_rows(np.zeros((2, 8), np.float32), 127)
    assert (integers == 0).all()
    assert np.isfinite(scale).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_exact_product__is_the_same_in_any_order_of_summation(seed: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = (rng.normal(0, 1, (n, columns)).astype(np.float32) for n in (3, 4))
    product = _exact_product(left, right)
    order = rng.permutation(columns)
    assert np.array_equal(product, _exact_product(left[:, order], right[:, order]))
    assert np.allclose(product, left.astype(np.float64) @ right.T.astype(np.float64), atol=1e-4)


def test_digest__depends_on_every_number() -> None:
    config = tiny_config(num_layers=2)
    tensors = random_tensors(config)
    digest = quantize(config, tensors, "int8").digest
    assert quantize(config, {name: tensor.copy() for name, tensor in tensors.items()}, "int8").digest == digest
    assert quantize(config, tensors, "int4").digest != digest
    for name in tensors:
        changed = {other: tensor.copy() for other, tensor in tensors.items()}
        changed[name].flat[0] += 0.5
        assert quantize(config, changed, "int8").digest != digest, name


def test_quantize__shapes_and_dtypes_are_as_documented() -> None:
    config = tiny_config(num_layers=2)
    model = quantize(config, random_tensors(config), "int4")
    vocab, units = config.vocab_size, config.num_units
    assert model.table.shape == (vocab, 3 * units)
    assert model.table.dtype == np.float32
    assert model.layers[0].inputs is None
    second = model.layers[1].inputs
    assert second is not None
    for linear, shape in ((model.layers[0].recurrent, (3 * units, units)), (second, (3 * units, units)),
                          (model.dense, (vocab, units))):  # fmt: skip
        assert linear.weight.shape == shape
        assert linear.weight.dtype == np.int8
        assert linear.scale.shape == linear.bias.shape == shape[:1]
        assert linear.scale.dtype == linear.bias.dtype == np.float32
    assert np.abs(model.layers[0].recurrent.weight).max() <= 7
    assert np.abs(model.dense.weight).max() > 7


@pytest.mark.parametrize(
    ("int8", "int4", "chosen"), [(1.45, 1.452, "int4"), (1.45, 1.4531, "int8"), (1.5, 1.5, "int8"), (1.4, 1.3, "int4")]
)
def test_choose_precision__takes_int4_if_it_is_nearly_as_good_as_float32(int8: float, int4: float, chosen: str) -> None:
    assert choose_precision({"float32": 1.45, "int8": int8, "int4": int4}) == chosen
