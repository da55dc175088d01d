"""The contract of steppers: what happens to a row depends on this row alone, to the bit.

The suite runs for every implementation in STEPPERS.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import stepper as stepper_module
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.engine.automaton.stops import with_stops
from service.engine.integer_product import IntegerProduct
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.request import Request
from service.engine.sampling import History, draw_one, uniform
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import Batch, Row, Stepper, StepResult, mean_loss
from service.engine.torch_stepper import TorchStepper
from service.errors import InvalidValue
from service.model.config import ModelConfig
from service.model.encoded_text import EncodedText
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.model.quantize import IntegerPrecision, QuantizedGRU, quantize
from tests.harness.automata import random_automaton
from tests.harness.emulated_kernel import EMULATED
from tests.harness.models import random_tensors
from tests.harness.rows import CHARSET, CONFIG, DEEP, KINDS, everything, quantized, row, run, with_checkpoints
from tests.harness.tiles import TESTED_VARIANTS

STEPPERS: dict[str, Callable[[QuantizedGRU], Stepper]] = {} if EMULATED else {"torch": TorchStepper}
STEPPERS |= {f"native_{name}": partial(NativeStepper, variant=name) for name in TESTED_VARIANTS}


MODELS = {"int8": quantized(), "int4": quantized(precision="int4"), "deep": quantized(DEEP)}


@pytest.fixture(params=[f"{name}-{model}" for name in STEPPERS for model in MODELS])
def stepper(request: pytest.FixtureRequest) -> Stepper:
    name, model = request.param.split("-")
    return STEPPERS[name](MODELS[model])


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The name of the stepper's model."""
    return str(request.node.callspec.params["stepper"].split("-")[1])


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> list[list[Any]]:
    """What each kind of row gets alone, one character per call."""
    return _alone(request.node.callspec.params["stepper"])


@cache
def _alone(stepper_and_model: str) -> list[list[Any]]:
    name, model = stepper_and_model.split("-")
    stepper, results = STEPPERS[name](MODELS[model]), []
    for kind in KINDS:
        one = with_checkpoints(stepper, **kind)
        results.append(everything(one, run(stepper, [one], 1)[0]))
    return results


@settings(max_examples=25)
@given(data=st.data())
def test_stepper__neighbours_and_tick_lengths_change_nothing(
    stepper: Stepper, alone: list[list[Any]], data: st.DataObject
) -> None:
    """Rows join and leave at random characters, in random order, in ticks of random length."""
    waiting = data.draw(st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=40))
    running: list[tuple[int, Row, list[StepResult]]] = []
    while waiting or running:
        for _ in range(data.draw(st.integers(0 if running else 1, 8))):
            if waiting:
                kind = waiting.pop()
                running.append((kind, with_checkpoints(stepper, **KINDS[kind]), []))
        running = data.draw(st.permutations(running))
        results = stepper.advance([one for _, one, _ in running], data.draw(st.integers(1, 9)))
        for (_, _, parts), result in zip(running, results, strict=True):
            parts.append(result)
        for kind, one, parts in [entry for entry in running if entry[1].finished]:
            assert everything(one, StepResult.join(parts)) == alone[kind], kind
        running = [entry for entry in running if not entry[1].finished]


def test_stepper__rows_in_turns_get_what_each_gets_alone(stepper: Stepper, alone: list[list[Any]]) -> None:
    """Each call advances any of the rows, in any order: rows leave for some calls and come back."""
    rng = np.random.default_rng(3)
    rows = [with_checkpoints(stepper, **kind) for kind in KINDS]
    parts: list[list[StepResult]] = [[] for _ in rows]
    while any(one.finished is None for one in rows):
        turn = rng.permutation(len(rows))[: rng.integers(1, len(rows))].tolist()
        for i, result in zip(turn, stepper.advance([rows[i] for i in turn], int(rng.integers(0, 9))), strict=True):
            parts[i].append(result)
    assert [everything(one, StepResult.join(part)) for one, part in zip(rows, parts, strict=True)] == alone


@pytest.mark.parametrize("num_chars", [1, 3, 8])
def test_stepper__batch_gets_what_each_row_gets_alone(stepper: Stepper, alone: list[list[Any]], num_chars: int) -> None:
    """Rows end, pass checkpoints and begin to generate while the batch stays the same."""
    rows = Batch(with_checkpoints(stepper, **kind) for kind in KINDS)
    parts: list[list[StepResult]] = [[] for _ in rows]
    finished: list[int] = []
    while len(finished) < len(rows):
        steps = stepper.advance(rows, num_chars)
        finished += steps.finished
        for part, result in zip(parts, steps, strict=True):
            part.append(result)
    assert sorted(finished) == [*range(len(rows))]
    assert [everything(one, StepResult.join(part)) for one, part in zip(rows, parts, strict=True)] == alone


def test_stepper__counts_what_a_call_has_read_and_generated(stepper: Stepper) -> None:
    rows = [row(stepper, prompt, max_chars) for prompt, max_chars in (("abc", 9), ("", 2), ("abcdefgh", 9))]
    steps = stepper.advance(rows, 5)
    assert (steps.num_read, steps.num_generated) == (3 + 5, 2 + 2)
    assert [len(one.chars) for one in steps] == [2, 2, 0]
    assert steps.part(2) is None
    assert steps.finished == [1]
    assert stepper.advance(rows, 1000).finished == [0, 2]
    assert stepper.advance(rows, 1000).finished == []
    assert [len(one.chars) for one in steps[1:]] == [2, 0]
    assert len(steps[-1].chars) == 0
    with pytest.raises(IndexError):
        steps[3]


def test_stepper__torch_threads_change_nothing(stepper: Stepper, alone: list[list[Any]]) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = [with_checkpoints(stepper, **kind) for kind in KINDS]
            assert [everything(*pair) for pair in zip(rows, run(stepper, rows), strict=True)] == alone
    finally:
        torch.set_num_threads(before)


def test_stepper__state_after_a_text_is_the_same_whether_drawn_or_read(stepper: Stepper) -> None:
    drawn = row(stepper, max_chars=25, num_logprobs=5)
    got = run(stepper, [drawn])[0]
    text = "ROMEO:" + CHARSET.decode(got.chars)
    read = row(stepper, prompt=text, max_chars=0, num_logprobs=5, score_prompt=True)
    scores = run(stepper, [read])[0].prompt_scores
    assert scores is not None
    assert got.scores is not None
    assert read.hidden.tobytes() == drawn.hidden.tobytes()
    assert read.position == drawn.position == 31
    assert scores.slice(6, None).chosen.tobytes() == got.scores.chosen.tobytes()
    assert scores.slice(6, None).top_ids.tobytes() == got.scores.top_ids.tobytes()


def test_stepper__draws_with_the_hash_of_seed_and_position(stepper: Stepper) -> None:
    got = run(stepper, [row(stepper, max_chars=20, num_logprobs=len(CHARSET))])[0]
    assert got.scores is not None
    for index, char in enumerate(got.chars):
        logprobs = np.empty(len(CHARSET))
        logprobs[got.scores.top_ids[index]] = got.scores.top[index]
        assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-5)
        cumulative = np.cumsum(np.exp(logprobs))
        chance = uniform(7, 6 + index)
        assert (cumulative[char - 1] if char else 0) <= chance + 1e-5
        assert chance <= cumulative[char] + 1e-5
        assert got.scores.chosen[index] == logprobs[char]


def test_stepper__another_seed_gives_another_text(stepper: Stepper) -> None:
    one, other = run(stepper, [row(stepper), row(stepper, seed=8)])
    assert one.chars.tolist() != other.chars.tolist()


def test_stepper__row_continues_from_the_state_of_another(stepper: Stepper) -> None:
    whole = run(stepper, [row(stepper, max_chars=30)])[0]
    first = row(stepper, max_chars=13)
    start = run(stepper, [first])[0]
    second = row(stepper, prompt="", max_chars=17, hidden=first.hidden.copy(), position=first.position)
    rest = run(stepper, [second])[0]
    assert [*start.chars, *rest.chars] == whole.chars.tolist()


def test_stepper__checkpoints_are_the_states_after_their_positions(stepper: Stepper) -> None:
    whole = row(stepper, checkpoint_positions=(3, 6, 7, 36, 37))
    text = CHARSET.decode(run(stepper, [whole])[0].chars)
    expected = []
    for end in (3, 6, 7, 36):
        read = row(stepper, prompt=("ROMEO:" + text)[:end], max_chars=0)
        run(stepper, [read])
        expected.append(read.hidden.tobytes())
    assert [hidden.tobytes() for hidden in whole.checkpoints] == expected


def test_stepper__stop_string_ends_a_row_at_its_last_character(stepper: Stepper) -> None:
    text = CHARSET.decode(run(stepper, [row(stepper)])[0].chars)
    stop = text[10:12]
    stopped = row(stepper, stops=("..!", stop))
    assert CHARSET.decode(run(stepper, [stopped])[0].chars) == text[: text.index(stop) + 2]
    assert stopped.finished == "stop"
    read = row(stepper, prompt="ROMEO:" + text[: text.index(stop) + 2], max_chars=0)
    run(stepper, [read])
    assert stopped.hidden.tobytes() == read.hidden.tobytes()


def test_stepper__stop_string_that_begins_in_the_prompt_does_not_count(stepper: Stepper) -> None:
    text = CHARSET.decode(run(stepper, [row(stepper)])[0].chars)
    crossing = row(stepper, stops=("O:", ":" + text[0]), max_chars=3)
    assert CHARSET.decode(run(stepper, [crossing])[0].chars) == text[:3]


def test_stepper__finished_rows_are_unchanged(stepper: Stepper) -> None:
    done = row(stepper, max_chars=3)
    run(stepper, [done])
    before = (done.hidden.tobytes(), done.position)
    assert len(stepper.advance([done], 5)[0].chars) == 0
    assert (done.hidden.tobytes(), done.position) == before
    assert not stepper.advance([], 5)


def test_stepper__state_stays_within_its_bounds(stepper: Stepper) -> None:
    one = row(stepper, prompt="AEI " * 100, max_chars=100, sampling=SamplingSettings(temperature=5))
    run(stepper, [one])
    assert np.abs(one.hidden).max() <= 1


@pytest.mark.parametrize("config", [CONFIG, DEEP], ids=["one layer", "three layers"])
@pytest.mark.parametrize("name", STEPPERS)
def test_stepper__is_close_to_the_float32_network(name: str, config: ModelConfig) -> None:
    """As close as eight or four bits allow, over a whole text."""
    tensors = random_tensors(config)
    text = CHARSET.encode("ROMEO: what light is it that breaks?")
    reference = FoldedGRU(GRUCharModel.from_tensors(config, tensors))
    states, _ = reference.scan(torch.from_numpy(text), reference.initial_hidden())
    expected = torch.log_softmax(reference.logits(states), -1)[torch.arange(len(text) - 1), text[1:]].double().numpy()
    tolerances: dict[IntegerPrecision, float] = {"int8": 0.02, "int4": 0.2}
    for precision, tolerance in tolerances.items():
        stepper = STEPPERS[name](quantize(config, tensors, precision))
        scored = row(stepper, prompt=CHARSET.decode(text), max_chars=0, num_logprobs=0, score_prompt=True)
        scores = run(stepper, [scored])[0].prompt_scores
        assert scores is not None
        assert np.abs(scores.chosen[1:] - expected).max() < tolerance
        assert np.abs(scored.hidden[-1] - states[-1].numpy()).max() < tolerance


@pytest.mark.parametrize("scores_starts", [True, False])
def test_mean_loss__reads_each_text_from_the_zero_state(
    stepper: Stepper, scores_starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are those of the texts alone, for any number of texts side by side and characters at a time."""
    lengths = [3, 1, 40, 7, 1, 1, 100, 2]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.random.default_rng(1).integers(0, len(CHARSET), sum(lengths)).astype(np.uint8)
    text = EncodedText(ids, starts, scores_starts)
    losses: list[float] = []
    for number, (begin, end) in enumerate(text.spans()):
        chars = ids[begin:end].astype(np.int64)
        alone = Row(Request(chars, 0, 0, num_logprobs=0, score_prompt=True), stepper.initial_hidden())
        scores = run(stepper, [alone])[0].prompt_scores
        assert scores is not None
        losses += (-scores.chosen[0 if scores_starts and number > 0 else 1 :]).tolist()
    assert len(losses) == text.num_scored == (154 if scores_starts else 147)
    for texts, chars_at_a_time in [(64, 2048), (1, 2048), (3, 5)]:
        monkeypatch.setattr(stepper_module, "_MEASURED_TEXTS", texts)
        monkeypatch.setattr(stepper_module, "_MEASURED_CHARS", chars_at_a_time)
        reported: list[int] = []
        assert mean_loss(stepper, text, reported.append) == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert sum(reported) == len(losses)


def test_stepper__penalties_count_generated_characters(stepper: Stepper) -> None:
    """Draws the text again: log-probabilities are logits up to a constant, which changes no draw."""
    how = SamplingSettings(frequency_penalty=0.7, presence_penalty=0.4)
    got = run(stepper, [row(stepper, sampling=how, num_logprobs=len(CHARSET))])[0]
    history = History(len(CHARSET), CHARSET.encode("ROMEO:"))
    assert got.scores is not None
    for index, char in enumerate(got.chars):
        logits = np.empty(len(CHARSET))
        logits[got.scores.top_ids[index]] = got.scores.top[index]
        assert draw_one(logits, how, uniform(7, 6 + index), history) == char  # type: ignore[arg-type]
        history.add(int(char))
    assert run(stepper, [row(stepper)])[0].chars.tolist() != got.chars.tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 70), st.integers(1, 5))
def test_integer_product__is_exact(seed: int, columns: int, rows: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    weight, left = (rng.integers(-127, 128, (n, columns)).astype(np.int8) for n in (rows, batch))
    product = IntegerProduct(weight)
    expected = left.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(product(torch.from_numpy(left)).numpy(), expected)


def test_integer_product__is_exact_if_the_fast_product_saturates_or_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(left: torch.Tensor, right: torch.Tensor, **_: object) -> torch.Tensor:
        return (left.to(torch.int32) @ right.to(torch.int32)).clamp(-(2**15), 2**15 - 1)

    weight = np.full((3, 1100), 127, np.int8)
    left = np.full((2, 1100), -127, np.int8)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert (
        IntegerProduct(weight)(torch.from_numpy(left)).numpy() == -127 * 127 * 1100
    ).all()  # more than 2**24: needs float64
    small = IntegerProduct(weight[:, :64])
    assert (small(torch.from_numpy(left[:, :64])).numpy() == -127 * 127 * 64).all()
    monkeypatch.delattr(torch, "_int_mm")
    assert (IntegerProduct(weight)(torch.from_numpy(left)).numpy() == -127 * 127 * 1100).all()


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.6),
    SamplingSettings(temperature=0),
    SamplingSettings(top_k=4),
    SamplingSettings(min_p=0.05, top_p=0.9),
    SamplingSettings(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
    SamplingSettings(1.5, logit_bias=((2, 3.0), (30, -2.0)), frequency_penalty=0.1),
]


def ruled_row(stepper: Stepper, seed: int, **changes: Any) -> Row:
    """Return a row with a random automaton, stop strings or both, and random settings: each seed has its own."""
    rng = np.random.default_rng(seed)
    form = None if rng.random() < 0.2 else random_automaton(seed, len(CHARSET))
    stops = [rng.integers(0, len(CHARSET), rng.integers(1, 3)) for _ in range(rng.integers(0, 9))]
    if form is not None and rng.random() < 0.5:
        stops = []
    automaton = with_stops(form, stops, len(CHARSET))
    fewest = 0 if automaton is None else int(automaton.fewest[0])
    num_left = fewest + int(rng.choice([0, 1, 3, 20]))
    request = Request(
        rng.integers(0, len(CHARSET), rng.integers(0, 4)),
        max_chars=num_left,
        seed=seed,
        sampling=SETTINGS[rng.integers(len(SETTINGS))],
        automaton=automaton,
        min_chars=int(rng.integers(0, 6)) if form is None else 0,
        num_logprobs=(None, None, 0, 3)[rng.integers(4)],
        score_prompt=bool(rng.random() < 0.5),
        num_next=2 if rng.random() < 0.3 else None,
    )
    return Row.of(replace(request, **changes), stepper.initial_hidden(), len(CHARSET))


@pytest.fixture(scope="module")
def ruled_alone() -> Callable[[str, int], list[Any]]:
    """What the torch stepper gives a row with an automaton alone, one character per call."""
    steppers = {name: TorchStepper(model) for name, model in MODELS.items()}

    @cache
    def alone(model: str, seed: int) -> list[Any]:
        one = ruled_row(steppers[model], seed)
        return everything(one, run(steppers[model], [one], 1)[0])

    return alone


@settings(max_examples=12)
@given(
    seeds=st.lists(st.integers(0, 400), min_size=1, max_size=24, unique=True),
    num_chars=st.integers(1, 7),
    cut=st.integers(0, 12),
)
def test_stepper__automata_change_nothing_for_neighbours_and_can_be_interrupted_anywhere(
    stepper: Stepper,
    model: str,
    ruled_alone: Callable[[str, int], list[Any]],
    seeds: list[int],
    num_chars: int,
    cut: int,
) -> None:
    """Also if a row is interrupted, and another continues it from what it has generated."""
    rows = [ruled_row(stepper, seed) for seed in seeds]
    results = run(stepper, rows, num_chars)
    expected = [ruled_alone(model, seed) for seed in seeds]
    assert [everything(*pair) for pair in zip(rows, results, strict=True)] == expected
    for seed, one, result in zip(seeds, rows, results, strict=True):
        request, num_before = one.request, min(cut, len(result.chars))
        first = ruled_row(stepper, seed, max_chars=num_before, num_left=request.max_chars)
        assert run(stepper, [first])[0].chars.tolist() == result.chars[:num_before].tolist()
        rest = replace(
            request,
            prompt=request.prompt[:0],
            history_prompt=request.prompt,
            generated=result.chars[:num_before],
            hidden=first.hidden,
            position=first.position,
            max_chars=request.max_chars - num_before,
        )
        second = Row.of(rest, stepper.initial_hidden(), len(CHARSET))
        assert run(stepper, [second])[0].chars.tolist() == result.chars[num_before:].tolist()
        assert (second.finished, second.state, second.position) == (one.finished, one.state, one.position)
        assert second.hidden.tobytes() == one.hidden.tobytes()


@settings(max_examples=60)
@given(seed=st.integers(0, 400))
def test_stepper__text_of_an_automaton_is_complete_and_ends_where_it_says(seed: int) -> None:
    stepper = TorchStepper(quantized())
    one = ruled_row(stepper, seed)
    request, automaton = one.request, one.request.automaton
    result = run(stepper, [one])[0]
    chars = result.chars.tolist()
    if automaton is None:
        assert (len(chars), one.finished) == (request.max_chars, "length")
        return
    states = [automaton.walk(0, chars[:end]) for end in range(len(chars) + 1)]
    assert one.state == states[-1] >= 0
    assert automaton.fewest[states[-1]] == 0
    assert result.num_withheld == automaton.withheld[states[-1]] or not chars
    is_over = [
        bool(automaton.stop_chars[state] and end > request.min_chars)
        or (automaton.restricts and automaton.ends(state, request.max_chars - end))
        for end, state in enumerate(states)
    ]
    assert not any(is_over[:-1])
    assert one.finished == ("stop" if is_over[-1] else "length")
    assert is_over[-1] or len(chars) == request.max_chars
    if result.scores is not None and automaton.restricts:
        assert result.scores.allowed is not None
        assert (result.scores.allowed >= result.scores.chosen - 1e-6).all()
        assert (result.scores.allowed <= 1e-6).all()


def test_stepper__log_probability_among_the_allowed_is_the_models_own_without_the_others(stepper: Stepper) -> None:
    one = row(stepper, automaton=random_automaton(2, len(CHARSET)), num_logprobs=len(CHARSET))
    got = run(stepper, [one])[0]
    automaton, state = one.request.automaton, 0
    assert automaton is not None
    assert got.scores is not None
    assert got.scores.allowed is not None
    for place, char in enumerate(got.chars.tolist()):
        logprobs = np.empty(len(CHARSET))
        logprobs[got.scores.top_ids[place]] = got.scores.top[place]
        mask = automaton.allowed(state, 30 - place)
        assert got.scores.allowed[place] == pytest.approx(
            logprobs[char] - np.log(np.exp(logprobs[mask]).sum()), abs=1e-5
        )
        state = automaton.next_state(state, char)


def test_stepper__draws_texts_of_a_form_as_often_as_the_model_would() -> None:
    """Chi-square of a form with five texts of three characters: all steps, with characters enough to forbid nothing."""
    stepper = TorchStepper(quantized()) if not variants() else NativeStepper(quantized())
    texts = ["the", "tho", "thy", "one", "ono"]
    form = compile_form(Form("choice", json.dumps(texts)), CHARSET.characters)
    rows = [row(stepper, automaton=form, max_chars=3, seed=seed) for seed in range(4000)]
    drawn = Counter(CHARSET.decode(result.chars) for result in run(stepper, rows))
    read = row(stepper, max_chars=0)
    run(stepper, [read])

    def probability(text: str) -> float:
        """Enumerated: each character among those that may come next, as the model alone sees them."""
        total, hidden = 1.0, read.hidden
        for place, char in enumerate(text):
            start = row(stepper, prompt="", max_chars=0, hidden=hidden.copy(), num_next=len(CHARSET))
            run(stepper, [start])
            assert start.next is not None
            shares = dict(zip(start.next.ids.tolist(), np.exp(start.next.logprobs.astype(float)), strict=True))
            following = {other[place] for other in texts if other.startswith(text[:place])}
            ids = {other: int(CHARSET.encode(other)[0]) for other in following}
            total *= shares[ids[char]] / sum(shares[each] for each in ids.values())
            step = row(stepper, prompt=char, max_chars=0, hidden=hidden.copy())
            run(stepper, [step])
            hidden = step.hidden
        return total

    expected = {text: len(rows) * probability(text) for text in texts}
    assert sum(expected.values()) == pytest.approx(len(rows))
    assert set(drawn) <= set(texts)
    chi_square = sum((drawn[text] - expected[text]) ** 2 / expected[text] for text in texts)
    assert chi_square < 18.5  # with 4 degrees of freedom, 1 of 1,000 is above it; the seeds are fixed


def test_stepper__characters_that_settings_forbid_must_not_be_needed_by_the_automaton(stepper: Stepper) -> None:
    form = compile_form(Form("choice", '["ab"]'), CHARSET.characters)
    with pytest.raises(InvalidValue, match="not allowed"):
        row(stepper, automaton=form, sampling=SamplingSettings(allowed=(int(CHARSET.encode("a")[0]),)))
    with pytest.raises(InvalidValue, match="at least 2 characters") as caught:
        row(stepper, automaton=form, max_chars=1)
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidValue, match="beginning"):
        row(stepper, automaton=form, generated=CHARSET.encode("b"))
