"""Completions of prompts: submit the prompts to the engine, and yield the generated text in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from service.arrays import Ids
from service.engine.pace import flush_interval
from service.engine.prefix_cache import NOBODY, CacheScope
from service.engine.request import End, Handle, Request
from service.engine.sampling import choice_seed
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.scores import Scores, num_scores
from service.engine.stepper import FinishReason, StepResult
from service.engine.stop import StopFilter
from service.generation.reader import all_of, stop_ids
from service.registry.loaded_models import LoadedModel

__all__ = ["Choice", "Completion", "CompletionChunk", "CompletionRequest", "SamplingSettings"]


@dataclass(frozen=True)
class CompletionRequest:
    """Which prompts to continue, and how."""

    prompts: tuple[Ids, ...]  # (n,) int64 ids each; each prompt is continued as if it had been sent alone
    max_chars: int  # to generate for each continuation
    seed: int
    sampling: SamplingSettings = PLAIN
    # Strings that end a continuation, as `written_stops` returns them; they are not part of its text.
    stop: tuple[str, ...] = ()
    n: int = 1  # continuations to return for each prompt
    # Continuations to generate for each prompt, >= n. The n with the highest mean log-probability are returned.
    best_of: int = 1
    first_choice: int = 0  # of each prompt: a request for choices 64 to 127 of many has 64
    # Return the log-probability of every character, and of this many likeliest characters at its place. None if no
    # log-probabilities are returned.
    num_logprobs: int | None = None
    cache_scope: CacheScope = NOBODY  # whose states after prompts are used
    echo: bool = False  # the prompt is part of the returned text, with its log-probabilities if those are returned

    @property
    def num_scores(self) -> int:
        """The largest number of log-probabilities that are in memory for it at a time."""
        num_chars = self.max_chars * len(self.prompts) + (sum(map(len, self.prompts)) if self.scores_prompt else 0)
        num_top = 0 if self.num_logprobs is None and self.best_of > self.n else self.num_logprobs
        return num_scores(num_chars * self.best_of, num_top)

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's characters need log-probabilities, so that every one must be stepped."""
        return self.echo and self.num_logprobs is not None


@dataclass(frozen=True)
class CompletionChunk:
    """A part of a continuation's text."""

    text: str
    # Of the text's characters. NaN for a first character, which nothing predicts. None if no scores are returned.
    scores: Scores | None = None


class Choice:
    """One continuation of one prompt while it is generated."""

    def __init__(self, index: int, model: LoadedModel, request: CompletionRequest, prompt: Ids, handle: Handle) -> None:
        self.index = index  # among all continuations of the request; those of one prompt follow one another
        self.prompt, self.handle = prompt, handle
        self.num_generated = 0  # characters
        self._logprob = 0.0  # of the text generated so far, if it is scored: the sum over its characters, in float64
        self.generated = ""
        self.is_over = False
        self._model, self._request = model, request
        self._stop_filter = StopFilter(request.stop)
        self._scores: list[Scores] = []  # of characters that were read or generated, and not yet returned
        self._num_echoed = 0 if request.echo else len(prompt)

    @property
    def mean_logprob(self) -> float:
        """Of the characters generated so far, if they are scored."""
        return self._logprob / max(1, self.num_generated)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the continuation ended."""
        return "stop" if self.handle.end is not None and self.handle.end.reason == "stop" else "length"

    def read(self, flush_interval_s: float | None, timeout_s: float | None) -> CompletionChunk | None:
        """Return the next chunk, waiting as `Handle.read` does, or None if there is none yet.

        After the last chunk, `is_over`. Raises EngineFailed.
        """
        if self._num_echoed < len(self.prompt) and not self._request.scores_prompt:
            return self._chunk(self._echo(len(self.prompt)))
        parts = [self.handle.read(flush_interval_s, timeout_s)]
        end = self.handle.end
        if end is not None:
            parts.append(self.handle.read(0.0))  # characters that arrived between these two lines
        shown = "".join(self._process(part) for part in parts if part is not None)
        if end is not None:
            self.is_over = True
            shown += self._stop_filter.end(stopped=end.reason == "stop")
            self._cache_states(end)
        return self._chunk(shown) if shown or self.is_over else None

    def _process(self, part: StepResult) -> str:
        """Take over a result of the engine, and return the text that can be returned now."""
        shown = ""
        if part.prompt_scores is not None:
            if self._num_echoed == 0:
                part.prompt_scores.chosen[0] = np.nan  # nothing predicts the first character
            self._scores.append(part.prompt_scores)
            shown = self._echo(len(part.prompt_scores.chosen))
        text = self._model.charset.decode(part.chars)
        if part.scores is not None:
            self._logprob += float(part.scores.chosen.sum(dtype=np.float64))
            if self._request.num_logprobs is not None:
                self._scores.append(part.scores)
        self.num_generated += len(text)
        self.generated += text
        return shown + self._stop_filter.feed(text)

    def _echo(self, num_chars: int) -> str:
        start = self._num_echoed
        self._num_echoed = min(start + num_chars, len(self.prompt))
        return self._model.charset.decode(self.prompt[start : self._num_echoed])

    def _chunk(self, shown: str) -> CompletionChunk:
        if not self._scores:
            return CompletionChunk(shown)
        scores = Scores.join(self._scores)
        self._scores = [scores.slice(len(shown), None)]
        return CompletionChunk(shown, scores.slice(0, len(shown)))

    def _cache_states(self, end: End) -> None:
        prompt = self._model.charset.decode(self.prompt)
        for position, hidden in end.checkpoints.items():
            self._model.prefixes.put(self._request.cache_scope, prompt[:position], hidden)
        if end.reason != "cancelled":
            self._model.prefixes.put(self._request.cache_scope, prompt + self.generated, end.hidden)


class Completion:
    """All continuations of a request, submitted to the engine."""

    def __init__(
        self, model: LoadedModel, request: CompletionRequest, client_has_left: Callable[[], bool] | None = None
    ) -> None:
        """Submit the request. After that, only a failing engine can end it early.

        This waits until a prompt with several continuations is read. If `client_has_left()` returns true meanwhile,
        nothing more is read. Raises Overloaded, EngineFailed, ClientGone.
        """
        self.request = request
        self._client_has_left = client_has_left
        self._engine = model.engine
        self.num_prompt = sum(len(prompt) for prompt in request.prompts)  # characters of all prompts
        self.num_cached = 0  # those of them that the prefix cache saved from being stepped
        requests = [text for prompt in request.prompts for text in self._requests(model, prompt)]
        handles = model.engine.submit(requests)
        self.choices = [
            Choice(index, model, request, request.prompts[index // request.best_of], handle)
            for index, handle in enumerate(handles)
        ]

    @property
    def num_generated(self) -> int:
        """Number of characters generated so far, including those that are not returned."""
        return sum(choice.num_generated for choice in self.choices)

    def chunks(self, flush_interval_s: float | None, idle_s: float) -> Iterator[tuple[Choice, CompletionChunk] | None]:
        """Yield chunks of all continuations: the first of each at once, later ones every flush_interval_s.

        If the engine is busy, chunks are longer. If flush_interval_s is None, each continuation is one chunk, when it
        is over. Yields None when there was nothing for idle_s, so that the caller can check whether its client is still
        connected. Yields all best_of continuations; `chosen` then says which of them to return. Raises EngineFailed.
        """
        begun: set[int] = set()
        while open_choices := [choice for choice in self.choices if not choice.is_over]:
            # The engine admits texts in their order and advances them together: waiting for the first one is enough.
            quiet = True
            for place, choice in enumerate(open_choices):
                gather = flush_interval_s
                if gather is not None:
                    later = gather and place == 0 and choice.index in begun
                    gather = (
                        flush_interval(self._engine.crowd_of(choice.handle.request.client), gather) if later else 0.0
                    )
                chunk = choice.read(gather, idle_s if place == 0 else 0.0)
                if chunk is not None:
                    begun.add(choice.index)
                    yield choice, chunk
                quiet = quiet and chunk is None and not choice.is_over
            if quiet:
                yield None

    def chosen(self) -> list[tuple[Choice, ...]]:
        """Return the n continuations of each prompt, the best first if there are more. Valid when all are over."""
        size = self.request.best_of
        groups = [self.choices[start : start + size] for start in range(0, len(self.choices), size)]
        if size > self.request.n:
            groups = [sorted(group, key=lambda choice: -choice.mean_logprob)[: self.request.n] for group in groups]
        return [tuple(group) for group in groups]

    def cancel(self) -> None:
        """Stop the continuations that are not over. Can be called at any time."""
        for choice in self.choices:
            choice.handle.cancel()

    def _requests(self, model: LoadedModel, prompt: Ids) -> list[Request]:
        request = self.request
        text = model.charset.decode(prompt)
        start, hidden = (0, None) if request.scores_prompt else model.prefixes.longest(request.cache_scope, text)
        self.num_cached += start
        if request.best_of > 1 and not request.scores_prompt and start < len(prompt):
            # Read the prompt once, not best_of times.
            handle = model.engine.submit([Request(prompt[start:], 0, 0, hidden=hidden, position=start)])[0]
            all_of(handle, self._client_has_left)
            hidden, start = handle.wait().hidden, len(prompt)
            model.prefixes.put(request.cache_scope, text, hidden)
        scored = request.num_logprobs is not None or request.best_of > request.n
        return [
            Request(
                prompt=prompt[start:],
                max_chars=request.max_chars,
                seed=choice_seed(request.seed, request.first_choice + index),
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
