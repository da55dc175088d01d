"""From a prompt to its continuation: encode, step the network over the prompt, then draw and step in turn.

May not: know of HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from service.engine.sampling import SamplingSettings, draw, uniform
from service.engine.stop import StopFilter
from service.errors import Overloaded
from service.loaded import LoadedModel
from service.model.charset import Charset, Ids
from service.model.folded import FoldedGRU

__all__ = ["Completion", "Generation", "GenerationRequest", "Generator", "SamplingSettings"]

FinishReason = Literal["stop", "length"]
_PREFILL = 512  # characters of a prompt stepped in one go: bounds the memory, changes no bit


@dataclass(frozen=True)
class GenerationRequest:
    """What to continue, how far and how. `prompt` is (n,) int64 ids; `stop` strings are not empty."""

    prompt: Ids
    max_tokens: int
    sampling: SamplingSettings
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A continuation. `num_generated` counts every character drawn, those of a stop string too."""

    text: str
    finish_reason: FinishReason
    num_prompt: int
    num_generated: int


class Generation:
    """One continuation in the making: iterate over it for pieces of text, as soon as they may be shown."""

    def __init__(self, network: FoldedGRU, charset: Charset, request: GenerationRequest) -> None:
        self.network, self.charset, self.request = network, charset, request
        self.num_generated = 0
        self.finish_reason: FinishReason = "length"

    def __iter__(self) -> Iterator[str]:
        stop = StopFilter(self.request.stop)
        for char in self._characters():
            self.num_generated += 1
            if shown := stop.feed(char):
                yield shown
            if stop.stopped:
                self.finish_reason = "stop"
                return
        if held := stop.flush():
            yield held

    def _characters(self) -> Iterator[str]:
        network, request = self.network, self.request
        prompt, position = torch.from_numpy(request.prompt), 0  # characters consumed so far
        hidden = network.initial_hidden()  # (L, H); an empty prompt is continued from the zero state
        while position < len(prompt):
            part = prompt[position : position + _PREFILL]
            _, hidden = network.scan(part, hidden)
            position += len(part)
        for _ in range(request.max_tokens):
            logits = network.logits(hidden[-1:])[0].numpy()  # (V,)
            chosen = draw(logits, request.sampling, uniform(request.seed, position))
            yield self.charset.characters[chosen]
            _, hidden = network.scan(torch.tensor([chosen]), hidden)
            position += 1


class Generator:
    """Runs completions, a bounded number at a time; a bounded number waits; more are refused at once.

    max_running: completions stepped side by side, each on one core. max_waiting: how many may wait for a place.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._running = threading.Semaphore(max_running)
        self._max_waiting = max_waiting
        self._waiting = 0
        self._lock = threading.Lock()

    def complete(self, model: LoadedModel, request: GenerationRequest) -> Completion:
        """The whole continuation. Raises Overloaded."""
        with self._place():
            generation = Generation(model.network, model.charset, request)
            text = "".join(generation)
        return Completion(text, generation.finish_reason, len(request.prompt), generation.num_generated)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            with self._lock:
                if self._waiting >= self._max_waiting:
                    raise Overloaded("the server is busy and its queue is full: try again in a second")
                self._waiting += 1
            try:
                self._running.acquire()
            finally:
                with self._lock:
                    self._waiting -= 1
        try:
            yield
        finally:
            self._running.release()
