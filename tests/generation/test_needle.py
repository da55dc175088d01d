"""One request among others gets the same text, log-probabilities and state, to the bit, whatever the others are."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from service.engine.automaton.form import Form
from service.generation.completion import Completion, CompletionRequest, SamplingSettings
from service.registry.loaded_models import LoadedModel
from service.store.model_store import ModelStore
from tests.harness.effort import IS_THOROUGH
from tests.harness.models import loaded_model

TRIALS = 200 if IS_THOROUGH else 20
PROMPT = "ROMEO: what light is it that breaks"
FORM = Form("regex", "( [A-Za-z]{3,8}[,;]?){5,9}\n?")


def needle(model: LoadedModel, seed: int = 7) -> CompletionRequest:
    sampling = SamplingSettings(temperature=0.9, top_p=0.98, presence_penalty=0.1)
    return CompletionRequest(
        (model.charset.encode(PROMPT),), 40, seed, sampling, stop=("\n\n",), form=FORM, num_logprobs=3
    )


def straw(model: LoadedModel, rng: np.random.Generator) -> CompletionRequest:
    """Return any other request."""
    prompt = "".join(rng.choice(list(model.charset.characters), rng.integers(0, 30)))
    form = FORM if rng.random() < 0.3 else Form("choice", '["ab", "a thing", "o"]') if rng.random() < 0.1 else None
    settings = [SamplingSettings(), SamplingSettings(temperature=0), SamplingSettings(top_k=3, repetition_penalty=1.2)]
    return CompletionRequest(
        (model.charset.encode(prompt),),
        max_chars=int(rng.integers(24, 60)) if form is not None else int(rng.integers(1, 40)),
        form=form,
        seed=int(rng.integers(2**62)),
        sampling=settings[rng.integers(3)],
        stop=("e",) if rng.random() < 0.2 else (),
        num_logprobs=2 if rng.random() < 0.2 else None,
        echo=bool(rng.random() < 0.2),
    )


def outcome(completion: Completion) -> tuple[Any, ...]:
    """Return all that a completion gives, comparable to the bit."""
    pieces = [item[1] for item in completion.wholes(30) if item is not None]
    scores = [
        array.tobytes()
        for piece in pieces
        if piece.scores is not None
        for array in (piece.scores.chosen, piece.scores.top_ids, piece.scores.top, piece.scores.allowed)
        if array is not None
    ]
    end = completion.choices[0].handle.wait()
    return "".join(piece.text for piece in pieces), scores, end.reason, end.position, end.hidden.tobytes()


def trial(store: ModelStore, seed: int) -> tuple[Any, ...]:
    """Run the needle in a new engine, among 1 to 255 other requests that are submitted before and after it."""
    rng = np.random.default_rng(seed)
    torch.set_num_threads(int(rng.integers(1, 4)))
    num_others, cache = int(2 ** rng.uniform(0, 8)), int(rng.choice([0, 2**20]))
    max_running = int(rng.integers(1, 257))
    with loaded_model(store, max_running=max_running, max_waiting=256, prefix_cache_bytes=cache) as model:
        if rng.random() < 0.5:  # if there is a prefix cache, it has part of the prompt
            part = model.charset.encode(PROMPT[: rng.integers(len(PROMPT))])
            outcome(Completion(model, CompletionRequest((part,), 1, 1)))
        before = int(rng.integers(num_others + 1))
        others = [Completion(model, straw(model, rng)) for _ in range(before)]
        mine = Completion(model, needle(model))
        others += [Completion(model, straw(model, rng)) for _ in range(num_others - before)]
        for other in others[:: int(rng.integers(2, 10))]:
            other.cancel()
        return outcome(mine)


def test_needle__is_the_same_in_every_haystack(tiny_store: ModelStore) -> None:
    threads = torch.get_num_threads()
    try:
        with loaded_model(tiny_store) as model:
            alone = outcome(Completion(model, needle(model)))
            another = outcome(Completion(model, needle(model, seed=8)))
        assert re.fullmatch(FORM.value, alone[0])
        assert len(alone[0]) >= 20
        assert another != alone
        different = [seed for seed in range(TRIALS) if trial(tiny_store, seed) != alone]
        assert different == []
    finally:
        torch.set_num_threads(threads)
