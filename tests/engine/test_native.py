"""The kernel in C++ beyond the contract that every stepper fulfils: sizes, extremes, threads, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.native import binding
from service.engine.native.native_stepper import NativeStepper
from service.engine.sampling import PLAIN, History, SamplingSettings
from service.engine.stepper import Row, Stepper
from service.engine.torch_stepper import TorchStepper
from service.model.config import ModelConfig
from service.model.quantize import QuantizedGRU, quantize
from service.store.model_store import ModelStore
from tests.harness.models import tiny_config
from tests.harness.rows import KINDS, outcome, quantized, row, run, with_checkpoints

VARIANTS = binding.variants()
CHINESE = "".join(chr(0x4E00 + index) for index in range(5000))
SETTINGS = [
    PLAIN,
    SamplingSettings(temperature=0),
    SamplingSettings(temperature=0.7, top_k=5, top_p=0.8, min_p=0.02),
    SamplingSettings(temperature=1e-300, top_p=0.5),
    SamplingSettings(top_k=10**6, min_p=1.0),
    SamplingSettings(repetition_penalty=1.3, presence_penalty=-0.5, frequency_penalty=0.7, logit_bias=((1, 3.0),)),
]

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the kernel was not compiled: no C++17 compiler")


def rows_of(stepper: Stepper, config: ModelConfig, num_rows: int, num_chars: int = 9) -> list[Row]:
    """All sorts of rows, of any charset: some read, all draw, all are scored in part."""
    rng = np.random.default_rng(num_rows)
    rows = []
    for index in range(num_rows):
        prompt = rng.integers(0, config.vocab_size, index % 4)
        how = SETTINGS[index % len(SETTINGS)]
        one = Row(stepper.initial_hidden(), index, prompt, num_chars + index % 3, seed=index, sampling=how)
        one.hidden[:] = rng.uniform(-1, 1, one.hidden.shape)
        one.history = History(config.vocab_size, prompt) if how.penalizes else None
        one.num_logprobs, one.score_prompt = (None, 0, 7)[index % 3], index % 2 == 0
        one.stops = (
            (rng.integers(0, config.vocab_size, 2), rng.integers(0, config.vocab_size, 1)) if index % 5 == 4 else ()
        )
        one.checkpoint_positions = (index + 2, index + 6) if index % 3 == 1 else ()
        rows.append(one)
    return rows


def test_it_is_there_where_there_is_a_compiler() -> None:
    assert VARIANTS or shutil.which("c++") is None
    assert "portable" in VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_units": 1},
        {"num_units": 7, "num_layers": 2},
        {"num_units": 37, "num_layers": 3},
        {"num_units": 100, "charset": "ab"},
        {"num_units": 33, "charset": CHINESE},
        {"num_units": 136},
    ],
    ids=["1 unit", "2 layers of 7", "3 layers of 37", "V = 2", "V = 5000", "136 units"],
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_any_sizes_give_torchs_bits(variant: str, changes: dict[str, Any], precision: Any) -> None:
    model = quantized(tiny_config(**changes), precision)
    reference = TorchStepper(model)
    for num_rows in (1, 2, 5, 19):
        expected = outcome(reference, rows_of(reference, model.config, num_rows))
        for num_threads, num_chars in ((1, 1000), (2, 4), (3, 1000)):
            stepper = NativeStepper(model, num_threads, variant, always_together=True)
            assert outcome(stepper, rows_of(stepper, model.config, num_rows), num_chars) == expected


def extreme(model: QuantizedGRU, weight: Callable[[Any], Any], scale: float) -> QuantizedGRU:
    """The model with every integer weight replaced, and scales that saturate the gates or not."""
    layers = tuple(
        replace(
            layer,
            recurrent=replace(
                layer.recurrent,
                weight=weight(layer.recurrent.weight).astype(np.int8),
                scale=np.full_like(layer.recurrent.scale, scale),
            ),
        )
        for layer in model.layers
    )
    return replace(model, layers=layers, table=model.table * np.float32(50 * scale))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["small", "saturating"])
@pytest.mark.parametrize("kind", ["largest", "zero", "signs"])
def test_extreme_weights_and_states_give_torchs_bits(variant: str, precision: Any, scale: float, kind: str) -> None:
    most = {"int8": 127, "int4": 7}[precision]
    weights: dict[str, Callable[[Any], Any]] = {
        "largest": lambda w: np.full_like(w, most),
        "zero": np.zeros_like,
        "signs": lambda w: np.where(w >= 0, most, -most),
    }
    model = extreme(quantized(tiny_config(num_units=264), precision), weights[kind], scale)
    results = []
    for stepper in (TorchStepper(model), NativeStepper(model, variant=variant)):
        rows = rows_of(stepper, model.config, 4)
        for one, state in zip(rows, (1.0, -1.0, 0.0, 1.0), strict=True):
            one.hidden[:] = state
        rows[3].hidden[:, ::2] = -1
        results.append(outcome(stepper, rows))
    assert results[0] == results[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), units=st.integers(1, 150), num_rows=st.integers(1, 20), spread=st.integers(1, 127)
)
def test_products_are_exact(variant: str, precision: Any, seed: int, units: int, num_rows: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    model = quantized(tiny_config(num_units=units), precision)
    most = min(spread, {"int8": 127, "int4": 7}[precision])
    weight = rng.integers(-most, most + 1, (3 * units, units)).astype(np.int8)
    layer = replace(model.layers[0], recurrent=replace(model.layers[0].recurrent, weight=weight))
    stepper = NativeStepper(replace(model, layers=(layer,)), variant=variant)
    states = rng.choice([-127, 127, 0, spread], (num_rows, units)).astype(np.int8)
    expected = states.astype(np.int64) @ weight.T.astype(np.int64)
    assert np.array_equal(stepper.recurrent_products(states), expected)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_threads_change_nothing_over_many_calls(num_threads: int, together: bool) -> None:
    """Also when threads meet for some calls and not for others, and rows are few in one and many in the next."""
    model = quantized()
    one, many = NativeStepper(model), NativeStepper(model, num_threads, always_together=together)
    for _ in range(3):
        for num_rows in (1, 3, 40, 2, 17):
            for num_chars in (1, 5):
                expected = outcome(one, rows_of(one, model.config, num_rows), num_chars)
                assert outcome(many, rows_of(many, model.config, num_rows), num_chars) == expected


def test_a_thousand_rows_get_what_each_gets_alone() -> None:
    model = quantized(tiny_config(num_units=16))
    stepper = NativeStepper(model, 2)
    rows = rows_of(stepper, model.config, 1024)
    crowd = outcome(stepper, rows)[0]
    for index in range(0, 1024, 97):
        single = rows_of(stepper, model.config, 1024)[index]
        assert outcome(stepper, [single])[0] == [crowd[index]]


def test_it_steps_in_a_process_that_was_forked() -> None:
    stepper = NativeStepper(quantized(), 2, always_together=True)
    expected = outcome(stepper, [with_checkpoints(stepper, **kind) for kind in KINDS[:3]])  # has threads now
    child = os.fork()
    if child == 0:
        same = outcome(stepper, [with_checkpoints(stepper, **kind) for kind in KINDS[:3]]) == expected
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_shipped_model_writes_ten_thousand_greedy_characters_as_torch_does(precision: Any) -> None:
    _, artifact = ModelStore(Path(__file__).parents[2] / "model_store").load("shakespeare@1")
    model = quantize(artifact.config, artifact.tensors, precision)
    start = artifact.charset.encode("ROMEO:")
    # The likeliest characters alone soon go round in a circle; the other row doesn't.
    how = (SamplingSettings(temperature=0), SamplingSettings(temperature=0.5))
    torch.set_num_threads(1)

    def texts(stepper: Stepper, num_chars: int) -> list[Any]:
        rows = [Row(stepper.initial_hidden(), 0, start, num_chars, seed=3, sampling=one) for one in how]
        return outcome(stepper, rows)

    assert texts(NativeStepper(model), 10_000) == texts(TorchStepper(model), 10_000)
    for variant in VARIANTS[1:]:
        assert texts(NativeStepper(model, variant=variant), 300) == texts(NativeStepper(model), 300)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_no_state_or_no_number_does_no_harm(variant: str) -> None:
    """Contents are the engine's to check: whatever they are, the kernel stays within its memory and comes to an end."""
    stepper = NativeStepper(quantized(), 2, variant, always_together=True)
    for value in (np.nan, np.inf, -np.inf, 1e30, -3.0):
        for kind in KINDS:
            one = with_checkpoints(stepper, **kind)
            one.hidden[:] = value
            got = run(stepper, [one])[0]
            assert one.finished
            assert ((got.chars >= 0) & (got.chars < stepper.config.vocab_size)).all()


def test_ids_beyond_the_charset_are_read_as_its_ends() -> None:
    # As the torch stepper does.
    stepper = NativeStepper(quantized())
    one, other = row(stepper), row(stepper)
    one.prompt, other.prompt = np.array([-5, 2**40, 3]), np.array([0, stepper.config.vocab_size - 1, 3])
    assert outcome(stepper, [one]) == outcome(stepper, [other])


def test_hostile_shapes_are_refused() -> None:
    stepper = NativeStepper(quantized())
    for hidden in (np.zeros((1, 63), np.float32), np.zeros((2, 64), np.float32), np.zeros((1, 64))):
        with pytest.raises(ValueError, match="states"):
            stepper.advance([row(stepper, hidden=hidden)], 1)
    for bias in ((-1, 1.0), (10**6, 1.0)):
        with pytest.raises(ValueError, match="logit_bias"):
            stepper.advance([row(stepper, sampling=SamplingSettings(logit_bias=(bias,)))], 1)
    penalizing = SamplingSettings(presence_penalty=1.0)
    with pytest.raises(ValueError, match="history"):
        stepper.advance([row(stepper, sampling=penalizing, history=None)], 1)
    with pytest.raises(ValueError, match="history"):
        stepper.advance([row(stepper, sampling=penalizing, history=History(3, np.empty(0, np.int64)))], 1)
    with pytest.raises(ValueError, match="states"):
        stepper.recurrent_products(np.zeros((1, 63), np.int8))
    with pytest.raises(ValueError, match="states"):
        stepper.recurrent_products(np.zeros((1, 64), np.int16))
    with pytest.raises(ValueError, match="sense"):
        stepper.recurrent_products(np.zeros((1, 64), np.int8), layer=1)


def test_hostile_models_are_refused() -> None:
    model = quantized()
    layer = model.layers[0]
    with pytest.raises(ValueError, match="broadcast"):
        NativeStepper(replace(model, table=model.table[:, 1:]))
    with pytest.raises(ValueError, match="expected"):
        NativeStepper(replace(model, dense=replace(model.dense, weight=model.dense.weight.astype(np.int16))))
    for precision, value in (("int8", -128), ("int4", 8)):
        weight = np.full_like(layer.recurrent.weight, value)
        wrong = replace(layer, recurrent=replace(layer.recurrent, weight=weight))
        with pytest.raises(ValueError, match="sense"):
            NativeStepper(replace(model, precision=precision, layers=(wrong,)))  # type: ignore[arg-type]
    for num_threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match="sense"):
            NativeStepper(model, num_threads)
    with pytest.raises(ValueError, match="sense"):
        NativeStepper(model, variant="z80")


@given(sizes=st.lists(st.sampled_from([-(2**62), -1, 0, 1, 2**40, 2**62]), min_size=4, max_size=4))
def test_sizes_that_make_no_sense_are_refused_before_memory_is_touched(sizes: list[int]) -> None:
    loaded = binding.load()
    assert loaded is not None
    about, kernel = binding.Model(*sizes), ctypes.c_void_p()
    with pytest.raises((ValueError, MemoryError)):
        binding.check(loaded.gru_create(ctypes.byref(about), b"portable", 1, 0, ctypes.byref(kernel)))
    assert not kernel


def test_without_the_library_there_are_no_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    binding.load.cache_clear()
    try:
        monkeypatch.setattr(binding, "find_spec", lambda _: None)
        assert binding.variants() == []
        with pytest.raises(RuntimeError, match="not compiled"):
            NativeStepper(quantized())
    finally:
        binding.load.cache_clear()
