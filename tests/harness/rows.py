"""Small quantised models and rows for the tests of the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from service.engine.automaton.dfa import Dfa
from service.engine.automaton.stops import with_stops
from service.engine.request import Request
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import Row, Stepper, StepResult
from service.model.charset import Charset
from service.model.config import ModelConfig
from service.model.quantize import IntegerPrecision, QuantizedGRU, quantize
from tests.harness.automata import random_automaton
from tests.harness.models import TINY_CHARSET, random_tensors, tiny_config

CONFIG = tiny_config(num_units=64)
DEEP = tiny_config(num_units=48, num_layers=3)
CHARSET = Charset(CONFIG.charset)
# Of the text without characters alone.
EMPTY = Dfa(np.zeros(len(CHARSET), np.int32), np.full((1, 1), -1, np.int32), np.ones(1, np.bool_)).automaton()


def quantized(config: ModelConfig = CONFIG, precision: IntegerPrecision = "int8", gain: float = 4.0) -> QuantizedGRU:
    """A model with random weights, larger than at the start of training, so that texts differ."""
    tensors = {name: tensor * np.float32(gain) for name, tensor in random_tensors(config).items()}
    return quantize(config, tensors, precision)


def row(stepper: Stepper, prompt: str = "ROMEO:", max_chars: int = 30, seed: int = 7, **changes: Any) -> Row:
    """A row as the engine makes it."""
    stops = [CHARSET.encode(stop) for stop in changes.pop("stops", ())]
    automaton = with_stops(changes.pop("automaton", None), stops, len(CHARSET))
    request = Request(CHARSET.encode(prompt), max_chars, seed, automaton=automaton, **changes)
    return Row.of(request, stepper.initial_hidden(), len(CHARSET))


def changed(row: Row, **changes: Any) -> Row:
    """Return a row that was not advanced yet, with changes to its request that nothing has checked."""
    return replace(row, request=replace(row.request, **changes))


# Every kind of row. The contract of steppers holds for each kind and for any mix.
KINDS: list[dict[str, Any]] = [
    {},
    {"prompt": "", "max_chars": 11},
    {"prompt": "the lady of the house is not at home", "max_chars": 5},
    {"max_chars": 0},
    {"prompt": "", "max_chars": 0},
    {"sampling": SamplingSettings(temperature=0)},
    {"sampling": SamplingSettings(temperature=0.5)},
    {"sampling": SamplingSettings(top_k=3, top_p=0.9)},
    {"sampling": SamplingSettings(min_p=0.1, logit_bias=((4, 2.0),))},
    {"sampling": SamplingSettings(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.2)},
    {"sampling": SamplingSettings(allowed=(3, 9, 30))},
    {"sampling": SamplingSettings(allowed=(9, 0, 30, 12), temperature=0)},
    {"sampling": SamplingSettings(0.9, 3, 0.8, 0.01, 1.4, 0.5, 0.1, ((30, 2.0), (1, 9.0)), (0, 4, 9, 30))},
    {"num_logprobs": 0},
    {"num_logprobs": 3, "score_prompt": True},
    {"num_logprobs": 20, "score_prompt": True, "max_chars": 0},
    {"stops": ("ab", "e")},
    {"stops": ("I",), "sampling": SamplingSettings(temperature=2.0), "num_logprobs": 1},
    {"stops": ("ab", "e"), "min_chars": 12},
    {"stops": tuple(TINY_CHARSET), "min_chars": 7, "num_logprobs": 1},
    {"stops": tuple(TINY_CHARSET), "min_chars": 31},
    {"seed": -1, "position": 10**12},
    {"num_next": 5},
    {"prompt": "", "max_chars": 0, "num_next": 0},
    {"stops": ("e", "o"), "num_next": 100, "max_chars": 40},
    # With automata: alone and with every setting, with few characters left, with stop strings, and with an empty text.
    {"automaton": random_automaton(1, len(CHARSET))},
    {"automaton": random_automaton(2, len(CHARSET)), "sampling": SamplingSettings(temperature=0.7), "num_logprobs": 2},
    {"automaton": random_automaton(3, len(CHARSET)), "sampling": SamplingSettings(temperature=0), "num_next": 3},
    {"automaton": random_automaton(4, len(CHARSET)), "sampling": SamplingSettings(top_k=3, top_p=0.9, min_p=0.01)},
    {
        "automaton": random_automaton(5, len(CHARSET)),
        "sampling": SamplingSettings(1.2, repetition_penalty=1.5, presence_penalty=0.5),
    },
    {
        "automaton": random_automaton(6, len(CHARSET)),
        "stops": ("e", "ab", "o"),
        "num_logprobs": 1,
        "score_prompt": True,
    },
    {"automaton": random_automaton(7, len(CHARSET)), "max_chars": 9, "num_left": 12},
    {"automaton": EMPTY, "num_next": 4},
    {"automaton": EMPTY, "prompt": ""},
]


def with_checkpoints(stepper: Stepper, **kind: Any) -> Row:
    """Return a row of this kind that also stores checkpoints."""
    start = kind.get("position", 0)
    return row(stepper, checkpoint_positions=tuple(start + num_chars for num_chars in (1, 6, 7, 20, 1000)), **kind)


def run(stepper: Stepper, rows: list[Row], num_chars: int = 1000) -> list[StepResult]:
    """Advance rows to their ends, by `num_chars` characters a call; return the joined results of each row."""
    parts: list[list[StepResult]] = [[] for _ in rows]
    while any(row.finished is None for row in rows):
        for part, result in zip(parts, stepper.advance(rows, num_chars), strict=True):
            part.append(result)
    return [StepResult.join(part) for part in parts]


def everything(row: Row, result: StepResult) -> list[Any]:
    """Return all that can be observed of a row at its end, comparable to the bit."""
    seen: list[Any] = [row.finished, row.position, row.num_read, row.num_generated, row.hidden.tobytes()]
    seen += [hidden.tobytes() for hidden in row.checkpoints]
    for scores in (result.scores, result.prompt_scores):
        seen += [None] if scores is None else [x.tobytes() for x in (scores.chosen, scores.top_ids, scores.top)]
        seen += [None] if scores is None or scores.allowed is None else [scores.allowed.tobytes()]
    seen += [row.state, result.num_withheld]
    seen += [None] if row.next is None else [row.next.ids.tobytes(), row.next.logprobs.tobytes()]
    return [*seen, result.chars.tolist()]


def outcome(stepper: Stepper, rows: list[Row], num_chars: int = 1000) -> list[Any]:
    """Advance rows to their ends, and return everything that can be observed of them."""
    seen = [everything(*pair) for pair in zip(rows, run(stepper, rows, num_chars), strict=True)]
    counts = [None if row.history is None else row.history.num_generated.tolist() for row in rows]
    return [seen, counts, [row.state for row in rows]]
