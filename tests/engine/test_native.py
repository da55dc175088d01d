"""The kernel in C++, beyond the contract of all steppers: sizes, extremes, threads, and what it refuses."""

from __future__ import annotations

import ctypes
import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.automaton.stops import with_stops
from service.engine.kernels import choose_kernel
from service.engine.native import binding, native_stepper
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.native.self_check import EXPECTED, EXPECTED_WITH_AUTOMATON, digest_of
from service.engine.request import Request
from service.engine.sampling import History
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.scores import Scores
from service.engine.short_text import ShortText
from service.engine.stepper import InvalidRows, Row, Stepper
from service.engine.torch_stepper import TorchStepper
from service.errors import InvalidSettings
from service.model.config import ModelConfig
from service.model.quantize import QuantizedGRU, quantize
from service.store.model_store import ModelStore
from tests.harness.effort import IS_THOROUGH
from tests.harness.emulated_kernel import EMULATED
from tests.harness.models import tiny_config
from tests.harness.rows import KINDS, changed, outcome, quantized, row, run, with_checkpoints
from tests.harness.tiles import TESTED_VARIANTS

VARIANTS = list(variants())
CLOCK_SLACK = 4  # a busy machine has cold caches
CHINESE = "".join(chr(0x4E00 + index) for index in range(5000))
SETTINGS = [
    PLAIN,
    SamplingSettings(temperature=0),
    SamplingSettings(temperature=0.7, top_k=5, top_p=0.8, min_p=0.02),
    SamplingSettings(temperature=1e-300, top_p=0.5),
    SamplingSettings(top_k=65_536, min_p=1.0),
    SamplingSettings(repetition_penalty=1.3, presence_penalty=-0.5, frequency_penalty=0.7, logit_bias=((1, 3.0),)),
]

not_emulated = pytest.mark.skipif(
    bool(EMULATED), reason="is about the process or the time of a kernel that is not emulated"
)
pytestmark = pytest.mark.skipif(not VARIANTS, reason="the kernel was not compiled: no C++17 compiler")


def rows_of(stepper: Stepper, config: ModelConfig, num_rows: int, num_chars: int = 9) -> list[Row]:
    """Rows with different settings, for any charset: some read, all draw, and all are scored in part."""
    rng = np.random.default_rng(num_rows)
    rows = []
    for index in range(num_rows):
        prompt = rng.integers(0, config.vocab_size, index % 4)
        how = SETTINGS[index % len(SETTINGS)]
        stops = [rng.integers(0, config.vocab_size, length) for length in (2, 1)]
        request = Request(
            prompt,
            num_chars + index % 3,
            seed=index,
            sampling=how,
            position=index,
            num_logprobs=(None, 0, 7)[index % 3],
            score_prompt=index % 2 == 0,
            automaton=with_stops(None, stops, config.vocab_size) if index % 5 == 4 else None,
            checkpoint_positions=(index + 2, index + 6) if index % 3 == 1 else (),
        )
        one = Row.of(request, stepper.initial_hidden(), config.vocab_size)
        one.hidden[:] = rng.uniform(-1, 1, one.hidden.shape)
        rows.append(one)
    return rows


def test_variants__always_include_the_portable_one() -> None:
    assert VARIANTS[-1] == "portable"


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
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
def test_kernel__models_of_any_size_give_the_bits_of_torch(
    variant: str, changes: dict[str, Any], precision: Any
) -> None:
    model = quantized(tiny_config(**changes), precision)
    for num_rows in (1, 2, 5, 19):
        expected = outcome_of_torch(tuple(changes.items()), precision, num_rows)
        for num_threads, num_chars in ((1, 1000), (2, 4), (3, 1000)):
            stepper = NativeStepper(model, num_threads, variant, always_together=True)
            assert outcome(stepper, rows_of(stepper, model.config, num_rows), num_chars) == expected


@cache
def outcome_of_torch(changes: tuple[tuple[str, Any], ...], precision: Any, num_rows: int) -> list[Any]:
    """Return what every variant has to give. It is computed once for all of them, because torch is slow."""
    reference = TorchStepper(quantized(tiny_config(**dict(changes)), precision))
    return outcome(reference, rows_of(reference, reference.config, num_rows))


def extreme(model: QuantizedGRU, weight: Callable[[Any], Any], scale: float) -> QuantizedGRU:
    """The model with other recurrent weights, and with scales that do or don't saturate the gates."""
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


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["small", "saturating"])
@pytest.mark.parametrize("kind", ["largest", "zero", "signs"])
def test_kernel__extreme_weights_and_states_give_the_bits_of_torch(precision: Any, scale: float, kind: str) -> None:
    most = {"int8": 127, "int4": 7}[precision]
    weights: dict[str, Callable[[Any], Any]] = {
        "largest": lambda w: np.full_like(w, most),
        "zero": np.zeros_like,
        "signs": lambda w: np.where(w >= 0, most, -most),
    }
    model = extreme(quantized(tiny_config(num_units=264), precision), weights[kind], scale)
    steppers = {"torch": TorchStepper(model)} | {
        variant: NativeStepper(model, variant=variant) for variant in TESTED_VARIANTS
    }
    results = {}
    for name, stepper in steppers.items():
        rows = rows_of(stepper, model.config, 4)
        for one, state in zip(rows, (1.0, -1.0, 0.0, 1.0), strict=True):
            one.hidden[:] = state
        rows[3].hidden[:, ::2] = -1
        results[name] = outcome(stepper, rows)
    assert [name for name, result in results.items() if result != results["torch"]] == []


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1), units=st.integers(1, 150), num_rows=st.integers(1, 20), spread=st.integers(1, 127)
)
def test_recurrent_products__are_exact(
    variant: str, precision: Any, seed: int, units: int, num_rows: int, spread: int
) -> None:
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
def test_kernel__threads_change_nothing_over_many_calls(num_threads: int, together: bool) -> None:
    """Also if threads share the steps of some calls only, and if calls with few and with many rows alternate."""
    model = quantized()
    one, many = NativeStepper(model), NativeStepper(model, num_threads, always_together=together)
    for _ in range(3):
        for num_rows in (1, 3, 40, 2, 17):
            for num_chars in (1, 5):
                expected = outcome(one, rows_of(one, model.config, num_rows), num_chars)
                assert outcome(many, rows_of(many, model.config, num_rows), num_chars) == expected


def test_kernel__a_thousand_rows_get_what_each_gets_alone() -> None:
    model = quantized(tiny_config(num_units=16))
    stepper = NativeStepper(model, 2)
    rows = rows_of(stepper, model.config, 1024)
    crowd = outcome(stepper, rows)[0]
    for index in range(0, 1024, 97):
        single = rows_of(stepper, model.config, 1024)[index]
        assert outcome(stepper, [single])[0] == [crowd[index]]


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_kernel__any_number_of_rows_is_divided_among_threads_without_a_trace(variant: str, precision: Any) -> None:
    """Around the numbers at which blocks of rows get larger or more, and with weights unpacked for several blocks."""
    model = quantized(tiny_config(num_units=24), precision)
    one = NativeStepper(model, 1, "portable")
    numbers = (9, 24, 49) if EMULATED else (9, 16, 17, 24, 25, 33, 49, 97, 128, 257, 300, 330)
    for number in numbers:
        expected = outcome(one, rows_of(one, model.config, number, 2))
        for num_threads in (1, 2, 3):
            stepper = NativeStepper(model, num_threads, variant)
            assert outcome(stepper, rows_of(stepper, model.config, number, 2)) == expected, (number, num_threads)


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_kernel__reports_the_next_characters_of_any_number_of_texts_as_of_each_alone(
    variant: str, num_threads: int
) -> None:
    """Of some of the texts, which end in different steps."""
    model = quantized()

    def rows(stepper: Stepper, number: int) -> list[Row]:
        asked = [None, 3, 0, 65]
        return [row(stepper, "the lady"[: i % 9], i % 3, i, num_next=asked[i * i % 7 % 4]) for i in range(number)]

    reference, stepper = TorchStepper(model), NativeStepper(model, num_threads, variant, always_together=True)
    for number in (1, 5, 8, 9, 17, 37):
        assert outcome(stepper, rows(stepper, number)) == outcome(reference, rows(reference, number))


@not_emulated
@pytest.mark.parametrize("variant", TESTED_VARIANTS)
def test_read__short_texts_get_what_rows_get(variant: str) -> None:
    for config in (tiny_config(num_units=64), tiny_config(num_units=37, num_layers=3)):
        stepper, size = NativeStepper(quantized(config), variant=variant), config.vocab_size
        for number in (1, 7, 30):
            rng = np.random.default_rng(number)
            texts = []
            for _ in range(number):
                length = int(rng.integers(0, 13))
                some = tuple(sorted({*rng.integers(1, length + 1, 2).tolist()})) if length else ()
                top = (None, 0, 3, 1000)[rng.integers(4)]
                state = rng.uniform(-1, 1, (config.num_layers, config.num_units)).astype(np.float32)
                ids = rng.integers(0, size, length)
                texts.append(ShortText(state, int(rng.integers(99)), ids, True, some, top, bool(rng.random() < 0.5)))
            before = [text.hidden.tobytes() for text in texts]
            read = stepper.read(texts)
            assert [text.hidden.tobytes() for text in texts] == before
            for text, got in zip(texts, read, strict=True):
                request = Request(
                    text.ids,
                    0,
                    seed=5,
                    num_logprobs=text.num_logprobs,
                    score_prompt=text.num_logprobs is not None,
                    hidden=text.hidden,
                    position=text.position,
                    checkpoint_positions=tuple(text.position + count for count in text.checkpoints),
                    num_next=size if text.wants_next else None,
                )
                one = Row.of(request, stepper.initial_hidden(), size)
                scores = run(stepper, [one])[0].prompt_scores or Scores.none()
                assert got.hidden.tobytes() == one.hidden.tobytes()
                assert (*got.states,) == text.checkpoints
                assert [state.tobytes() for state in got.states.values()] == [
                    each.tobytes() for each in one.checkpoints
                ]
                assert (got.next is None) == (one.next is None)
                if got.next is not None and one.next is not None:
                    assert got.next.ids.tolist() == one.next.ids.tolist()
                    assert got.next.logprobs.tobytes() == one.next.logprobs.tobytes()
                assert got.scores.chosen.tobytes() == scores.chosen.tobytes()
                assert got.scores.top_ids.tolist() == scores.top_ids.tolist() or not len(text.ids)
                assert got.scores.top.tobytes() == scores.top.tobytes()


@not_emulated
def test_kernel__steps_in_a_forked_process() -> None:
    stepper = NativeStepper(quantized(), 2, always_together=True)
    expected = outcome(stepper, [with_checkpoints(stepper, **kind) for kind in KINDS[:3]])  # starts threads
    child = os.fork()
    if child == 0:
        same = outcome(stepper, [with_checkpoints(stepper, **kind) for kind in KINDS[:3]]) == expected
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("precision", "many"), [("int8", 10_000 if IS_THOROUGH else 2_000), ("int4", 10_000 if IS_THOROUGH else 1_000)]
)
def test_kernel__thousands_of_characters_of_the_shipped_model_are_those_of_torch(precision: Any, many: int) -> None:
    _, artifact = ModelStore(Path(__file__).parents[2] / "model_store").load("shakespeare@1")
    model = quantize(artifact.config, artifact.tensors, precision)
    start = artifact.charset.encode("ROMEO:")
    # A greedy text soon repeats itself, so the second row has a temperature.
    how = (SamplingSettings(temperature=0), SamplingSettings(temperature=0.5))
    torch.set_num_threads(1)

    def texts(stepper: Stepper, num_chars: int) -> list[Any]:
        rows = [Row(Request(start, num_chars, seed=3, sampling=one), stepper.initial_hidden()) for one in how]
        return outcome(stepper, rows)

    many, some = (60, 30) if EMULATED else (many, 300)
    assert texts(NativeStepper(model), many) == texts(TorchStepper(model), many)
    for variant in TESTED_VARIANTS[1:]:
        assert texts(NativeStepper(model, variant=variant), some) == texts(NativeStepper(model), some)


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
def test_kernel__invalid_states_and_nan_stay_within_memory_and_end(variant: str) -> None:
    """The kernel doesn't check the numbers in a state. Whatever they are, it draws valid ids and finishes the text."""
    stepper = NativeStepper(quantized(), 2, variant, always_together=True)
    for value in (np.nan, np.inf, -np.inf, 1e30, -3.0):
        for kind in KINDS:
            one = with_checkpoints(stepper, **kind)
            one.hidden[:] = value
            got = run(stepper, [one])[0]
            assert one.finished
            assert ((got.chars >= 0) & (got.chars < stepper.config.vocab_size)).all()


def test_kernel__ids_outside_the_charset_are_read_as_the_nearest_id() -> None:
    # As in the torch stepper.
    stepper = NativeStepper(quantized())
    prompts = np.array([-5, 2**40, 3]), np.array([0, stepper.config.vocab_size - 1, 3])
    one, other = (changed(row(stepper), prompt=prompt) for prompt in prompts)
    assert outcome(stepper, [one]) == outcome(stepper, [other])


def test_native_stepper__arrays_of_the_wrong_shape_are_refused() -> None:
    stepper = NativeStepper(quantized())
    penalizing = SamplingSettings(presence_penalty=1.0)
    good = row(stepper)
    bad = [replace(good, hidden=hidden) for hidden in (np.zeros((1, 63), np.float32), np.zeros((2, 64), np.float32))]
    bad += [changed(good, sampling=SamplingSettings(logit_bias=(bias,))) for bias in ((-1, 1.0), (10**6, 1.0))]
    bad += [changed(good, sampling=penalizing)]
    bad += [replace(bad[-1], history=History(3, np.empty(0, np.int64)))]
    with pytest.raises(InvalidRows) as caught:
        stepper.advance([*bad, good], 1)
    assert [*caught.value.causes] == bad
    assert good.num_read == 0
    with pytest.raises(ValueError, match="states"):
        stepper.recurrent_products(np.zeros((1, 63), np.int8))
    with pytest.raises(ValueError, match="states"):
        stepper.recurrent_products(np.zeros((1, 64), np.int16))
    with pytest.raises(ValueError, match="refuses"):
        stepper.recurrent_products(np.zeros((1, 64), np.int8), layer=1)


def test_native_stepper__what_it_stores_of_a_row_is_freed_with_the_row_or_at_its_end() -> None:
    stepper = NativeStepper(quantized())
    rows = [row(stepper, max_chars=50, seed=seed, checkpoint_positions=(3, 20)) for seed in range(3)]
    ended = row(stepper, max_chars=1)
    stepper.advance([*rows, ended], 10)
    assert ended.packed is None
    records = [weakref.ref(one.packed) for one in rows]
    states = [weakref.ref(one.hidden) for one in rows]
    gc.disable()  # nothing may refer to itself: it would stay until the next collection
    try:
        rows.clear()
        assert [reference() for reference in (*records, *states)] == [None] * 6
    finally:
        gc.enable()


def test_native_stepper__row_continues_after_a_call_that_another_row_made_fail() -> None:
    """A row that was advanced beside one that is refused continues as if the refused call had not been."""
    stepper = NativeStepper(quantized())
    good, alone = row(stepper), row(stepper)
    bad = replace(row(stepper), hidden=np.zeros((1, 63), np.float32))
    expected = [stepper.advance([alone], num_chars)[0].chars.tolist() for num_chars in (9, 9)]
    first = stepper.advance([good], 9)[0].chars.tolist()
    with pytest.raises(InvalidRows):
        stepper.advance([good, bad], 9)
    assert [first, stepper.advance([good], 9)[0].chars.tolist()] == expected


def test_native_stepper__invalid_models_are_refused() -> None:
    model = quantized()
    layer = model.layers[0]
    with pytest.raises(ValueError, match="broadcast"):
        NativeStepper(replace(model, table=model.table[:, 1:]))
    with pytest.raises(ValueError, match="expected"):
        NativeStepper(replace(model, dense=replace(model.dense, weight=model.dense.weight.astype(np.int16))))
    for precision, value in (("int8", -128), ("int4", 8)):
        weight = np.full_like(layer.recurrent.weight, value)
        wrong = replace(layer, recurrent=replace(layer.recurrent, weight=weight))
        with pytest.raises(ValueError, match="refuses"):
            NativeStepper(replace(model, precision=precision, layers=(wrong,)))  # type: ignore[arg-type]
    for num_threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match="refuses"):
            NativeStepper(model, num_threads)
    with pytest.raises(ValueError, match="refuses"):
        NativeStepper(model, variant="z80")


SIZES = st.sampled_from([-(2**62), -1, 0, 1, 2**40, 2**62])  # of these only 1 is valid


@given(
    sizes=st.tuples(SIZES, SIZES, SIZES, st.sampled_from([8, 4, 0, 16])).filter(lambda sizes: sizes[:3] != (1, 1, 1))
)
def test_kernel__invalid_sizes_are_refused_before_memory_is_touched(sizes: tuple[int, ...]) -> None:
    """The model's addresses are null, so that touching its memory would crash."""
    loaded = binding.load()
    assert loaded is not None
    model, kernel = np.zeros(1, loaded.model), ctypes.c_void_p()
    for name, size in zip(("vocab", "units", "num_layers", "bits"), sizes, strict=True):
        model[name] = size
    create = loaded.functions.gru_create
    with pytest.raises((ValueError, MemoryError)):
        binding.check(create(model.ctypes.data, b"portable", 1, 0, ctypes.byref(kernel)))
    assert not kernel


@not_emulated
def test_variants__without_the_library_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    binding.load.cache_clear()
    variants.cache_clear()
    try:
        monkeypatch.setattr(binding, "find_spec", lambda _: None)
        assert variants() == ()
        with pytest.raises(RuntimeError, match="not compiled"):
            NativeStepper(quantized())
    finally:
        binding.load.cache_clear()
        variants.cache_clear()


@pytest.mark.parametrize("variant", TESTED_VARIANTS)
def test_self_check__expects_what_every_stepper_computes(variant: str) -> None:
    make_stepper = partial(NativeStepper, variant=variant)
    assert digest_of(make_stepper) == digest_of(TorchStepper) == EXPECTED
    expected = digest_of(TorchStepper, with_automaton=True)
    assert digest_of(make_stepper, with_automaton=True) == expected == EXPECTED_WITH_AUTOMATON


@not_emulated
def test_self_check__takes_less_than_50_ms_of_the_processor() -> None:
    variants.cache_clear()
    started = time.process_time()
    assert list(variants()) == VARIANTS
    assert time.process_time() - started < 0.05 * CLOCK_SLACK


def test_variants__that_compute_other_numbers_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One variant, as on a processor that breaks it, and then all: then torch serves, and `native` is refused."""

    def broken(make_stepper: Any, wrong: set[str], *, with_automaton: bool = False) -> str:
        names: set[str] = set()

        def note(model: QuantizedGRU) -> Stepper:
            stepper: NativeStepper = make_stepper(model)
            names.add(stepper.variant)
            return stepper

        digest = digest_of(note, with_automaton=with_automaton)
        return "other" if wrong & names else digest

    try:
        for wrong in ({VARIANTS[0]}, set(VARIANTS)):
            variants.cache_clear()
            caplog.clear()
            monkeypatch.setattr(native_stepper, "digest_of", partial(broken, wrong=wrong))
            assert list(variants()) == [name for name in VARIANTS if name not in wrong]
            assert [record for record in caplog.records if VARIANTS[0] in record.getMessage()]
        assert choose_kernel("auto", 1).name == "torch"
        with pytest.raises(InvalidSettings, match="other numbers"):
            choose_kernel("native", 1)
    finally:
        variants.cache_clear()
