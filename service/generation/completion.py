"""From prompts to their continuations: encode, submit to the engine, yield text as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from service.arrays import Ids
from service.engine.pace import flush_interval
from service.engine.request import End, Handle, Request
from service.engine.sampling import PLAIN, SamplingSettings, choice_seed
from service.engine.scores import Scores
from service.engine.stepper import FinishReason, StepResult
from service.engine.stop import StopFilter
from service.generation.reading import stop_ids
from service.registry.loaded_models import LoadedModel

__all__ = ["Choice", "Completion", "CompletionRequest", "Piece", "SamplingSettings"]


@dataclass(frozen=True)
class CompletionRequest:
    """What to continue, how far, how often and how.

    prompts: (n,) int64 ids each; each is continued as if it had been sent alone. best_of >= n continuations of each are
    made, and the n with the highest mean log-probability kept, the best first. num_logprobs: report the log-probability
    of every character, and of so many likeliest; None: not. echo: the prompt is part of the text, with its
    log-probabilities if they are asked for.
    """

    prompts: tuple[Ids, ...]
    max_chars: int
    seed: int
    sampling: SamplingSettings = PLAIN
    stop: tuple[str, ...] = ()
    n: int = 1
    best_of: int = 1
    num_logprobs: int | None = None
    echo: bool = False

    @property
    def scores_prompt(self) -> bool:
        """The prompt's characters need log-probabilities: every one has to be stepped."""
        return self.echo and self.num_logprobs is not None


@dataclass(frozen=True)
class Piece:
    """Part of a continuation. scores: of its characters, NaN where nothing predicts one; None if not asked for."""

    text: str
    scores: Scores | None = None


class Choice:
    """One continuation in the making. index: its place in the answer; num_generated: characters drawn so far."""

    def __init__(self, index: int, model: LoadedModel, request: CompletionRequest, prompt: Ids, handle: Handle) -> None:
        self.index, self.prompt, self.handle = index, prompt, handle
        self.num_generated = 0
        self.mean_logprob = 0.0  # of the characters generated so far, if they are scored
        self.generated = ""
        self.is_over = False
        self._model, self._request = model, request
        self._stop_filter = StopFilter(request.stop)
        self._scores: list[Scores] = []  # of characters that were read or generated and not yet shown
        self._num_echoed = 0 if request.echo else len(prompt)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return "stop" if self.handle.end is not None and self.handle.end.reason == "stop" else "length"

    def read(self, flush_interval_s: float | None, timeout_s: float | None) -> Piece | None:
        """The next piece, waited for as by `Handle.read`; None: nothing yet. With the last one, it `is_over`."""
        if self._num_echoed < len(self.prompt) and not self._request.scores_prompt:
            return self._piece(self._echo(len(self.prompt)))
        parts = [self.handle.read(flush_interval_s, timeout_s)]
        end = self.handle.end
        if end is not None:
            parts.append(self.handle.read(0.0))  # what came in between these two lines
        shown = "".join(self._take_in(part) for part in parts if part is not None)
        if end is not None:
            self.is_over = True
            shown += self._stop_filter.end(stopped=end.reason == "stop")
            self._remember(end)
        return self._piece(shown) if shown or self.is_over else None

    def _take_in(self, part: StepResult) -> str:
        """What may be shown of what the engine did."""
        shown = ""
        if part.prompt_scores is not None:
            if self._num_echoed == 0:
                part.prompt_scores.chosen[0] = np.nan  # nothing predicts the first character
            self._scores.append(part.prompt_scores)
            shown = self._echo(len(part.prompt_scores.chosen))
        text = self._model.charset.decode(part.chars)
        if part.scores is not None:
            total = self.mean_logprob * self.num_generated + float(part.scores.chosen.sum())
            self.mean_logprob = total / (self.num_generated + len(text))
            if self._request.num_logprobs is not None:
                self._scores.append(part.scores)
        self.num_generated += len(text)
        self.generated += text
        return shown + self._stop_filter.feed(text)

    def _echo(self, num_chars: int) -> str:
        start = self._num_echoed
        self._num_echoed = min(start + num_chars, len(self.prompt))
        return self._model.charset.decode(self.prompt[start : self._num_echoed])

    def _piece(self, shown: str) -> Piece:
        if not self._scores:
            return Piece(shown)
        scores = Scores.join(self._scores)
        self._scores = [scores.slice(len(shown), None)]
        return Piece(shown, scores.slice(0, len(shown)))

    def _remember(self, end: End) -> None:
        prompt = self._model.charset.decode(self.prompt)
        for position, hidden in end.checkpoints.items():
            self._model.prefixes.put(prompt[:position], hidden)
        if end.reason != "cancelled":
            self._model.prefixes.put(prompt + self.generated, end.hidden)


class Completion:
    """All continuations of a request. Nothing is left to refuse when it is there: its texts are in the engine.

    num_prompt, num_cached: characters of the prompts, and how many of them were known and not stepped again.
    """

    def __init__(self, model: LoadedModel, request: CompletionRequest) -> None:
        """Raises Overloaded, EngineFailed."""
        self.request = request
        self._engine = model.engine
        self.num_prompt = sum(len(prompt) for prompt in request.prompts)
        self.num_cached = 0
        texts = [text for prompt in request.prompts for text in self._texts(model, prompt)]
        handles = model.engine.submit(texts)
        self.choices = [
            Choice(index, model, request, request.prompts[index // request.best_of], handle)
            for index, handle in enumerate(handles)
        ]

    @property
    def num_generated(self) -> int:
        """Characters drawn so far, also those that are not shown."""
        return sum(choice.num_generated for choice in self.choices)

    def pieces(self, flush_interval_s: float | None, idle_s: float) -> Iterator[tuple[Choice, Piece] | None]:
        """Pieces of all continuations as they come: the first of each at once, later ones gathered for flush_interval_s.

        A busy engine's texts are gathered for longer. flush_interval_s None: each in one piece, when it is over. None comes out
        when there was nothing for idle_s: a chance to look whether anybody still listens. Not to be used with best_of >
        n. Raises EngineFailed.
        """
        begun: set[int] = set()
        while open_choices := [choice for choice in self.choices if not choice.is_over]:
            # The engine admits texts in their order and advances all alike: to wait for the first is to wait for all.
            quiet = True
            for place, choice in enumerate(open_choices):
                gather = flush_interval_s
                if gather is not None:
                    later = gather and place == 0 and choice.index in begun
                    gather = flush_interval(self._engine.num_open, gather) if later else 0.0
                piece = choice.read(gather, idle_s if place == 0 else 0.0)
                if piece is not None:
                    begun.add(choice.index)
                    yield choice, piece
                quiet = quiet and piece is None and not choice.is_over
            if quiet:
                yield None

    def chosen(self) -> list[tuple[Choice, ...]]:
        """For each prompt its n continuations, when all are over."""
        size = self.request.best_of
        groups = [self.choices[start : start + size] for start in range(0, len(self.choices), size)]
        if size > self.request.n:
            groups = [sorted(group, key=lambda choice: -choice.mean_logprob)[: self.request.n] for group in groups]
        return [tuple(group) for group in groups]

    def cancel(self) -> None:
        """Stop what still runs. Harmless at any time."""
        for choice in self.choices:
            choice.handle.cancel()

    def _texts(self, model: LoadedModel, prompt: Ids) -> list[Request]:
        request = self.request
        text = model.charset.decode(prompt)
        start, hidden = (0, None) if request.scores_prompt else model.prefixes.longest(text)
        self.num_cached += start
        if request.best_of > 1 and not request.scores_prompt and start < len(prompt):
            # Read the prompt once, not best_of times.
            handle = model.engine.submit([Request(prompt[start:], 0, 0, hidden=hidden, position=start)])[0]
            hidden, start = handle.wait().hidden, len(prompt)
            model.prefixes.put(text, hidden)
        scored = request.num_logprobs is not None or request.best_of > request.n
        return [
            Request(
                prompt=prompt[start:],
                max_chars=request.max_chars,
                seed=choice_seed(request.seed, index),
                sampling=request.sampling,
                stops=stop_ids(model.charset, request.stop),
                num_logprobs=(request.num_logprobs or 0) if scored else None,
                score_prompt=request.scores_prompt,
                hidden=hidden,
                position=start,
                history_prompt=prompt,
                checkpoint_positions=(len(prompt),) if start < len(prompt) else (),
            )
            for index in range(request.best_of)
        ]
