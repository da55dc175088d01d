"""Completions: the text depends on model, prompt, settings, seed and position, not on how it is requested or sent."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.automaton.form import Form
from service.engine.scores import Scores
from service.errors import InvalidValue, Overloaded
from service.generation.completion import Choice, Completion, CompletionRequest, SamplingSettings
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings, loaded_model, publish_tiny


@pytest.fixture
def model(tiny_store: ModelStore) -> Iterator[LoadedModel]:
    with loaded_model(tiny_store) as model:
        yield model


def request(model: LoadedModel, *prompts: str, **changes: Any) -> CompletionRequest:
    fields: dict[str, Any] = {"max_chars": 30, "seed": 7}
    return CompletionRequest(tuple(map(model.charset.encode, prompts or ("ROMEO:",))), **(fields | changes))


def finish(completion: Completion, flush_interval_s: float | None = None) -> dict[int, tuple[str, Scores | None]]:
    """Return the text and the scores of every choice."""
    texts: dict[int, str] = dict.fromkeys(range(len(completion.choices)), "")
    scores: dict[int, list[Scores]] = {index: [] for index in texts}
    items = completion.wholes(5) if flush_interval_s is None else completion.chunks(flush_interval_s, 5)
    for item in items:
        assert item is not None
        choice, piece = item
        texts[choice.index] += piece.text
        if piece.scores is not None:
            assert len(piece.scores.chosen) == len(piece.text)
            scores[choice.index].append(piece.scores)
    return {index: (texts[index], Scores.join(scores[index]) if scores[index] else None) for index in texts}


def text(model: LoadedModel, *prompts: str, **changes: Any) -> str:
    return finish(Completion(model, request(model, *prompts, **changes)))[0][0]


def test_seed__determines_the_text(model: LoadedModel) -> None:
    one, same, other = (text(model, seed=seed) for seed in (7, 7, 8))
    assert one == same
    assert one != other
    assert len(one) == 30


def test_completion__of_a_completion_is_the_longer_completion(model: LoadedModel) -> None:
    whole = text(model)
    for cut in (1, 11, 29):
        assert text(model, "ROMEO:" + whole[:cut], max_chars=30 - cut) == whole[cut:]


def test_prompt__may_be_empty(model: LoadedModel) -> None:
    assert len(text(model, "")) == 30


def test_temperature_0__gives_the_same_text_for_every_seed(model: LoadedModel) -> None:
    assert len({text(model, sampling=SamplingSettings(temperature=0), seed=seed) for seed in range(3)}) == 1


@pytest.mark.parametrize("flush_interval_s", [None, 0.0, 0.002])
def test_flush_interval__does_not_change_the_text(model: LoadedModel, flush_interval_s: float | None) -> None:
    whole = text(model, max_chars=500)
    completion = Completion(model, request(model, max_chars=500))
    assert finish(completion, flush_interval_s)[0][0] == whole
    assert completion.num_generated == 500


def test_prefix_cache__changes_no_bit(tiny_store: ModelStore) -> None:
    prompts = ["ROMEO:", "ROMEO: what", "ROMEO: what light", "", "R", "ROMEO: what light"]
    how = {"num_logprobs": 3, "sampling": SamplingSettings(top_k=8, repetition_penalty=1.3)}
    results, cached = [], []
    for size in (0, 2**20):
        with loaded_model(tiny_store, prefix_cache_bytes=size) as model:
            completions = [Completion(model, request(model, prompt, **how)) for prompt in prompts for _ in range(2)]
            results.append([finish(completion)[0] for completion in completions])
            again = [Completion(model, request(model, prompt, **how)) for prompt in prompts]
            results[-1] += [finish(completion)[0] for completion in again]
            cached.append([completion.num_cached for completion in again])
    for (one, one_scores), (other, other_scores) in zip(*results, strict=True):
        assert one == other
        assert one_scores is not None
        assert other_scores is not None
        assert one_scores.chosen.tobytes() == other_scores.chosen.tobytes()
    assert cached == [[0] * 6, [len(prompt) for prompt in prompts]]


def test_prefix_cache__saves_stepping_a_known_beginning(model: LoadedModel) -> None:
    whole = text(model)
    completion = Completion(model, request(model, "ROMEO:" + whole + " I"))
    finish(completion)
    assert completion.num_cached == 36
    assert completion.num_prompt == 38


def test_stop__ends_the_text_before_the_string(model: LoadedModel) -> None:
    whole = text(model)
    stop = whole[10:13]
    for stops in ((stop,), ("zzzz", stop), (stop[1:], stop)):
        made = Completion(model, request(model, stop=stops))
        assert finish(made)[0][0] == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
    unmatched = Completion(model, request(model, stop=("zzzz",)))
    assert finish(unmatched)[0][0] == whole
    assert unmatched.choices[0].finish_reason == "length"


def test_stop__returns_no_scores_of_the_string(model: LoadedModel) -> None:
    whole = text(model)
    made = Completion(model, request(model, stop=(whole[10:13],), num_logprobs=2))
    shown, scores = finish(made, 0.0)[0]
    assert scores is not None
    assert len(scores.chosen) == len(shown) == whole.index(whole[10:13])
    assert made.num_generated == len(shown) + 3


def test_prompts__get_the_text_that_each_gets_alone(model: LoadedModel) -> None:
    prompts = ["ROMEO:", "", "JULIET: O", "ROMEO:"]
    together = finish(Completion(model, request(model, *prompts)))
    assert [together[index][0] for index in range(4)] == [text(model, prompt) for prompt in prompts]


def test_n__gives_different_texts_the_first_as_with_n_1(model: LoadedModel) -> None:
    texts = finish(Completion(model, request(model, "ROMEO:", "I", n=4, best_of=4)))
    assert len({texts[index][0] for index in range(8)}) == 8
    assert texts[0][0] == text(model)
    assert texts[4][0] == text(model, "I")
    assert finish(Completion(model, request(model, n=4, best_of=4)))[2] == texts[2]


def test_n__reads_the_prompt_once(tiny_store: ModelStore) -> None:
    steps = 0
    with loaded_model(tiny_store, prefix_cache_bytes=0) as model:
        advance = model.engine._stepper.advance

        def count(rows: Any, num_chars: int) -> Any:
            nonlocal steps
            before = sum(row.position for row in rows)
            result = advance(rows, num_chars)
            steps += sum(row.position for row in rows) - before
            return result

        model.engine._stepper.advance = count  # type: ignore[method-assign]
        finish(Completion(model, request(model, "the lady " * 20, n=5, best_of=5, max_chars=2)))
    assert steps == 180 + 5 * 2


def test_best_of__chooses_the_highest_mean_logprob(model: LoadedModel) -> None:
    every = Completion(model, request(model, n=6, best_of=6, num_logprobs=0))
    scores = {index: float(scored.chosen.mean()) for index, (_, scored) in finish(every).items() if scored is not None}
    ranked = sorted(scores, key=lambda index: -scores[index])
    best = Completion(model, request(model, n=2, best_of=6))
    shown = finish(best)
    assert [choice.index for choice in best.chosen()[0]] == ranked[:2]
    assert [shown[index][1] for index in shown] == [None] * 6
    assert best.num_generated == 180


def test_echo__returns_and_scores_the_prompt(model: LoadedModel) -> None:
    plain = text(model)
    assert text(model, echo=True) == "ROMEO:" + plain
    shown, scores = finish(Completion(model, request(model, echo=True, num_logprobs=4)), 0.0)[0]
    assert shown == "ROMEO:" + plain
    assert scores is not None
    assert np.isnan(scores.chosen).tolist() == [True] + [False] * 35
    assert scores.top.shape == (36, 4)
    read, read_scores = finish(Completion(model, request(model, shown, echo=True, num_logprobs=4, max_chars=0)))[0]
    assert read == shown
    assert read_scores is not None
    assert read_scores.chosen[1:].tobytes() == scores.chosen[1:].tobytes()


def test_echo__of_an_empty_prompt_is_empty(model: LoadedModel) -> None:
    shown, scores = finish(Completion(model, request(model, "", echo=True, num_logprobs=1, max_chars=0)))[0]
    assert shown == ""
    assert scores is not None
    assert len(scores.chosen) == 0
    assert text(model, "", echo=True, max_chars=0) == ""


def test_threads__get_the_text_that_each_gets_alone(model: LoadedModel) -> None:
    alone = {seed: text(model, seed=seed, max_chars=100) for seed in range(6)}
    together: dict[int, str] = {}

    def complete(seed: int) -> None:
        together[seed] = text(model, seed=seed, max_chars=100)

    threads = [threading.Thread(target=complete, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_overload__refuses_the_whole_request(tiny_store: ModelStore) -> None:
    with loaded_model(tiny_store, max_running=2, max_waiting=1) as model:
        with pytest.raises(Overloaded):
            Completion(model, request(model, n=4, best_of=4))
        assert len(finish(Completion(model, request(model, n=3, best_of=3)))) == 3


def test_cancel__stops_all_choices(model: LoadedModel) -> None:
    completion = Completion(model, request(model, n=3, best_of=3, max_chars=10**6))
    completion.cancel()
    assert {choice.handle.wait().reason for choice in completion.choices} == {"cancelled"}
    over: list[Choice] = [item[0] for item in completion.chunks(0.0, 1) if item is not None]
    assert {choice.index for choice in over} == {0, 1, 2}


def test_models__are_loaded_once_and_evicted_least_recently_used_first(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    for name in ("a", "b", "c"):
        publish_tiny(store, name)
    models = LoadedModels(store, 2, engine_settings())
    a = models.get("a")
    assert models.get("a@1") is a
    b = models.get("b")
    assert models.get("a@latest") is a
    before = text(b)
    models.get("c")  # evicts b
    assert models.get("a") is a
    assert text(b) == before  # a request that has b can still use it
    assert models.get("b") is not b
    publish_tiny(store, "a", seed=1)
    assert models.get("a") is a  # requests don't look for a new version
    models.resolver.refresh()
    assert models.get("a").version.ref == "a@2"
    assert models.get("a@1").digest == a.digest
    models.close()


def test_models__can_be_used_while_another_one_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path)
    for name in ("small", "big"):
        publish_tiny(store, name)
    models, loading, release = LoadedModels(store, 2, engine_settings()), threading.Event(), threading.Event()
    small, load, loads = models.get("small"), store.load, []

    def slow(ref: str) -> object:
        loads.append(ref)
        loading.set()
        assert release.wait(60)
        return load(ref)

    monkeypatch.setattr(store, "load", slow)
    threads = [threading.Thread(target=models.get, args=("big",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loading.wait(60)
    assert models.get("small") is small
    release.set()
    for thread in threads:
        thread.join()
    assert loads == ["big@1"]


def test_fingerprint__depends_on_model_and_arithmetic(tiny_store: ModelStore, tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store, seed=5)
    prints = set()
    for where, precision in ((tiny_store, "int8"), (tiny_store, "int4"), (store, "int8")):
        with loaded_model(where, precision=precision) as model:
            prints.add(model.fingerprint)
        with loaded_model(where, precision=precision) as again:
            assert again.fingerprint in prints
    assert len(prints) == 3


def test_precision__is_the_versions_own_unless_set(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    with loaded_model(store) as model:
        assert model.precision == "int8"
    publish_tiny(store, facts={"serving_precision": "int4"})
    with loaded_model(store) as model:
        assert model.precision == "int4"
    with loaded_model(store, precision="int8") as model:
        assert model.precision == "int8"


CHOICES = ["", "the", "thou art", "e"]
FORMS = [Form("regex", "(?:[a-z]{2,5} ){3}[A-Z]"), Form("regex", "[^e]*"), Form("choice", json.dumps(CHOICES))]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.value)
@pytest.mark.parametrize("stop", [(), ("e", "th"), (" ",)], ids=repr)
def test_form__every_text_has_it_streamed_or_whole_up_to_a_stop_string(
    model: LoadedModel, form: Form, stop: tuple[str, ...]
) -> None:
    """With all settings, several choices of one prompt, and any number of characters that suffices."""
    pattern = "|".join(CHOICES) if form.kind == "choice" else form.value
    settings = [SamplingSettings(), SamplingSettings(temperature=0.7, top_p=0.9), SamplingSettings(top_k=3, min_p=0.1)]
    for how in (*settings, SamplingSettings(repetition_penalty=1.4, frequency_penalty=0.3)):
        for max_chars in (14, 15, 18, 40):
            what: dict[str, Any] = {"form": form, "stop": stop, "max_chars": max_chars, "sampling": how}
            made = Completion(model, request(model, n=4, best_of=4, num_logprobs=0, returns_state=True, **what))
            for index, (shown, scores) in finish(made, 0.0).items():
                choice = made.choices[index]
                assert re.fullmatch(pattern, shown)
                assert choice.finish_reason == "stop" or choice.num_generated == max_chars
                assert scores is not None
                assert len(scores.chosen) == len(shown)
                if scores.allowed is not None:
                    assert (scores.allowed >= scores.chosen - 1e-5).all()
                assert choice.state is not None
                assert choice.state[1] == 6 + len(shown)
                fed = Completion(model, request(model, "ROMEO:" + shown, max_chars=0)).choices[0].handle.wait()
                assert choice.state[0].tobytes() == fed.hidden.tobytes()
            again = Completion(model, request(model, n=4, best_of=4, **what))
            assert [shown for shown, _ in finish(again).values()] == [
                choice.generated[: len(choice.generated) - _end_of(choice)] for choice in made.choices
            ]


def test_form__log_probabilities_among_the_allowed_are_beside_those_of_an_echoed_prompt(model: LoadedModel) -> None:
    """A prompt has none; and where the form allows everything, they are the model's own."""
    for form, num_chars in ((FORMS[0], 10), (Form("regex", r"[\s\S]*"), 20)):
        what: dict[str, Any] = {"form": form, "max_chars": num_chars, "num_logprobs": 1, "echo": True}
        shown, scores = finish(Completion(model, request(model, **what)), 0.0)[0]
        assert scores is not None
        assert scores.allowed is not None
        assert len(scores.allowed) == len(shown) == 6 + num_chars
        assert np.isnan(scores.allowed).tolist() == [True] * 6 + [False] * num_chars
        assert (scores.allowed[6:] >= scores.chosen[6:]).all()
        assert (scores.allowed[6:] == scores.chosen[6:]).all() == (form is not FORMS[0])


def _end_of(choice: Choice) -> int:
    return choice.handle.wait().num_stop_chars


def test_form__that_needs_more_characters_is_refused_with_their_number(model: LoadedModel) -> None:
    with pytest.raises(InvalidValue, match="at least 10 characters") as caught:
        Completion(model, request(model, form=FORMS[0], max_chars=9))
    assert caught.value.param == "max_tokens"
    assert len(text(model, form=FORMS[0], max_chars=10)) == 10


def test_form__has_only_the_allowed_characters(model: LoadedModel) -> None:
    allowed = tuple(model.charset.exact("aeth ").tolist())
    how = {"sampling": SamplingSettings(allowed=allowed), "form": Form("regex", "[a-z ]{8}"), "stop": ("t", "zz")}
    for seed in range(5):
        assert set(text(model, seed=seed, **how)) <= set("aeth ")
    with pytest.raises(InvalidValue):
        text(model, sampling=SamplingSettings(allowed=allowed), form=Form("regex", "x+"))
