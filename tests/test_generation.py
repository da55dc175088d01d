"""Continuing a text: a function of model, text, settings, seed and position; and a bounded number at a time."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from service import generation
from service.engine.sampling import SamplingSettings, draw, uniform
from service.errors import Overloaded
from service.generation import Generation, GenerationRequest, Generator
from service.loaded import LoadedModel, LoadedModels
from service.store import ModelStore
from tests.conftest import publish_tiny


@pytest.fixture(scope="module")
def model(tiny_store: ModelStore) -> LoadedModel:
    return LoadedModel(*tiny_store.load("tiny"))


def request(model: LoadedModel, prompt: str = "ROMEO:", **changes: object) -> GenerationRequest:
    fields: dict[str, object] = {"max_tokens": 30, "sampling": SamplingSettings(), "seed": 7}
    return GenerationRequest(prompt=model.charset.encode(prompt), **(fields | changes))  # type: ignore[arg-type]


def text(model: LoadedModel, request: GenerationRequest) -> str:
    return "".join(Generation(model.network, model.charset, request))


def test_a_text_is_fixed_by_its_seed(model: LoadedModel) -> None:
    one, same, other = (text(model, request(model, seed=seed)) for seed in (7, 7, 8))
    assert one == same
    assert one != other
    assert len(one) == 30


def test_a_continuation_of_the_continuation_is_the_longer_continuation(model: LoadedModel) -> None:
    whole = text(model, request(model, max_tokens=30))
    for cut in (1, 11, 29):
        rest = text(model, request(model, prompt="ROMEO:" + whole[:cut], max_tokens=30 - cut))
        assert whole[cut:] == rest


def test_every_character_is_drawn_from_the_state_after_all_before_it(model: LoadedModel) -> None:
    whole = text(model, request(model))
    ids = model.charset.encode("ROMEO:" + whole)
    import torch

    states, _ = model.network.scan(torch.from_numpy(ids), model.network.initial_hidden())
    for position in range(6, len(ids)):
        logits = model.network.logits(states[position - 1 : position])[0].numpy()
        assert draw(logits, SamplingSettings(), uniform(7, position)) == ids[position]


def test_the_size_of_the_prompts_parts_changes_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "the lady of the house " * 5
    expected = text(model, request(model, prompt))
    for size in (1, 7, 109, 110, 111):
        monkeypatch.setattr(generation, "_PREFILL", size)
        assert text(model, request(model, prompt)) == expected


def test_an_empty_prompt_is_continued_from_the_zero_state(model: LoadedModel) -> None:
    assert len(text(model, request(model, ""))) == 30


def test_greedy_is_the_same_for_every_seed(model: LoadedModel) -> None:
    settings = SamplingSettings(temperature=0)
    assert len({text(model, request(model, sampling=settings, seed=seed)) for seed in range(3)}) == 1


def test_a_stop_string_ends_the_text_before_it(model: LoadedModel) -> None:
    whole = text(model, request(model))
    stop = whole[10:13]
    made = Generation(model.network, model.charset, request(model, stop=(stop,)))
    assert "".join(made) == whole[: whole.index(stop)]
    assert made.finish_reason == "stop"
    assert made.num_generated == whole.index(stop) + len(stop)
    unmatched = Generation(model.network, model.charset, request(model, stop=("§",)))
    assert ("".join(unmatched), unmatched.finish_reason, unmatched.num_generated) == (whole, "length", 30)


def test_pieces_come_as_soon_as_they_may_be_shown(model: LoadedModel) -> None:
    assert [len(piece) for piece in Generation(model.network, model.charset, request(model))] == [1] * 30


def test_threads_side_by_side_get_what_each_gets_alone(model: LoadedModel) -> None:
    alone = {seed: text(model, request(model, seed=seed, max_tokens=100)) for seed in range(6)}
    generator, together = Generator(max_running=3, max_waiting=10), {}

    def complete(seed: int) -> None:
        together[seed] = generator.complete(model, request(model, seed=seed, max_tokens=100)).text

    threads = [threading.Thread(target=complete, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_full_server_refuses_at_once_and_recovers(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    started, release = threading.Semaphore(0), threading.Event()

    def slow(*_: object) -> float:
        started.release()
        release.wait(10)
        return 0.5

    monkeypatch.setattr(generation, "uniform", slow)
    generator = Generator(max_running=1, max_waiting=1)
    answers: list[str] = []

    def complete() -> None:
        answers.append(generator.complete(model, request(model, max_tokens=1)).text)

    running, waiting = threading.Thread(target=complete), threading.Thread(target=complete)
    running.start()
    assert started.acquire(timeout=10)
    waiting.start()
    while waiting.is_alive() and not generator._waiting:
        time.sleep(0.001)
    with pytest.raises(Overloaded):
        generator.complete(model, request(model))
    release.set()
    running.join()
    waiting.join()
    assert len(answers) == 2
    assert generator.complete(model, request(model, max_tokens=2)).num_generated == 2


def test_a_failing_generation_gives_its_place_back(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(max_running=1, max_waiting=0)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generator.complete(model, request(model))
    assert generator.complete(model, request(model)).num_generated == 30


def test_models_are_loaded_once_and_the_least_recently_used_goes(tmp_path: object) -> None:
    from pathlib import Path

    store = ModelStore(Path(str(tmp_path)))
    for name in ("a", "b", "c"):
        publish_tiny(store, name)
    models = LoadedModels(store, max_models=2)
    a = models.get("a")
    assert models.get("a@1") is a
    models.get("b")
    assert models.get("a@latest") is a
    models.get("c")  # b goes
    assert models.get("a") is a
    publish_tiny(store, "a", seed=1)
    assert models.get("a").version.ref == "a@2"
    assert models.get("a@1").digest == a.digest


def test_a_slow_load_holds_up_nobody_else(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    store = ModelStore(Path(str(tmp_path)))
    for name in ("small", "big"):
        publish_tiny(store, name)
    models, loading, release = LoadedModels(store, max_models=2), threading.Event(), threading.Event()
    small, load, loads = models.get("small"), store.load, []

    def slow(ref: str) -> object:
        loads.append(ref)
        loading.set()
        assert release.wait(10)
        return load(ref)

    monkeypatch.setattr(store, "load", slow)
    threads = [threading.Thread(target=models.get, args=("big",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loading.wait(10)
    assert models.get("small") is small
    release.set()
    for thread in threads:
        thread.join()
    assert loads == ["big@1"]


def test_the_fingerprint_names_the_model(tiny_store: ModelStore, tmp_path: object) -> None:
    from pathlib import Path

    store = ModelStore(Path(str(tmp_path)))
    publish_tiny(store, seed=5)
    one, other = LoadedModel(*tiny_store.load("tiny")), LoadedModel(*store.load("tiny"))
    assert one.fingerprint != other.fingerprint
    assert np.array_equal(one.charset.encode("a"), other.charset.encode("a"))
