"""Completions of prompts: submit the prompts to the engine, and yield the generated text in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from service.arrays import Float32, Ids
from service.engine.automaton.form import Form
from service.engine.handle import End, Handle, Update
from service.engine.pace import flush_interval
from service.engine.prefix_cache import NOBODY, CacheScope
from service.engine.request import Request
from service.engine.sampling import choice_seed
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.engine.scores import Scores, num_scores
from service.engine.stepper import FinishReason, StepResult
from service.generation.automata import automaton_of
from service.generation.portable_states import PortableStart
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel

__all__ = ["Choice", "Completion", "CompletionChunk", "CompletionRequest", "SamplingSettings"]

# The engine stores a state every 256 characters, and at most 32 of them, if it returns the state of a text that a stop
# string may end.
_CHECKPOINT_CHARS, _MAX_CHECKPOINTS = 256, 32


@dataclass(frozen=True)
class CompletionRequest:
    """Which prompts to continue, and how."""

    prompts: tuple[Ids, ...]  # (n,) int64 ids each; each prompt is continued as if it had been sent alone
    max_chars: int  # to generate for each continuation
    seed: int
    sampling: SamplingSettings = PLAIN
    # Strings that end a continuation, as `written_stops` returns them.
    stop: tuple[str, ...] = ()
    includes_stop: bool = False  # the stop string that ends a continuation is part of its text
    form: Form | None = None  # of each continuation, without the prompt; None for any
    min_chars: int = 0  # none of the first `min_chars` characters of a continuation completes a stop string
    n: int = 1  # continuations to return for each prompt
    # Continuations to generate for each prompt, >= n. The n with the highest mean log-probability are returned.
    best_of: int = 1
    first_choice: int = 0  # of each prompt: a request for choices 64 to 127 of many has 64
    # Return the log-probability of every character, and of this many likeliest characters at its place. None if no
    # log-probabilities are returned.
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None  # the same for the characters of the prompts, beside the text
    cache_scope: CacheScope = NOBODY  # whose states after prompts are used
    echo: bool = False  # the prompt is part of the returned text, with its log-probabilities if those are returned
    start: PortableStart | None = None  # each prompt continues the text of this state; None for the zero state
    returns_state: bool = False  # each `Choice` has the state after its text

    @property
    def num_scores(self) -> int:
        """The largest number of log-probabilities that are in memory for it at a time."""
        num_chars = self.max_chars * len(self.prompts) + (sum(map(len, self.prompts)) if self.scores_prompt else 0)
        among_allowed = 0 if self.form is None or self.num_top is None else self.max_chars * len(self.prompts)
        return num_scores(num_chars * self.best_of, self.num_top) + among_allowed * self.best_of

    @property
    def num_top(self) -> int | None:
        """How many likeliest characters the engine scores at each place. None if it scores nothing."""
        wanted = [count for count in (self.num_logprobs, self.num_prompt_logprobs) if count is not None]
        return max(wanted) if wanted else 0 if self.best_of > self.n else None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's characters need log-probabilities, so that every one must be stepped."""
        return (self.echo and self.num_logprobs is not None) or self.num_prompt_logprobs is not None


@dataclass(frozen=True)
class CompletionChunk:
    """A part of a continuation's text."""

    text: str
    # Of the text's characters. NaN for a first character, which nothing predicts. None if no scores are returned;
    # without characters there are none, and it is not None.
    scores: Scores | None = None
    num_echoed: int = 0  # characters at the beginning of the text that belong to the prompt


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
        self._withheld = ""  # generated, and not shown before it is certain that it doesn't belong to a stop string
        self._scores: list[Scores] = []  # of characters that were read or generated, and not yet returned
        # Of the prompt's characters, if they are returned beside the text. NaN for the first one.
        self.prompt_scores: list[Scores] = []
        self._num_scored = 0  # characters of the prompt
        self._num_echoed = 0 if request.echo else len(prompt)
        # (L, H) and the number of characters before it: the state after the returned text, if that is requested.
        self.state: tuple[Float32, int] | None = None  # None until the continuation is over

    @property
    def mean_logprob(self) -> float:
        """Of the characters generated so far, if they are scored."""
        return self._logprob / max(1, self.num_generated)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the continuation ended."""
        return "stop" if self.handle.end is not None and self.handle.end.reason == "stop" else "length"

    def read(self, flush_interval_s: float, timeout_s: float) -> CompletionChunk | None:
        """Return the next chunk, waiting as `Handle.read` does, or None if there is none yet.

        After the last chunk, `is_over`. Raises EngineFailed.
        """
        return self._echoed() or self._next(self.handle.read(flush_interval_s, timeout_s))

    def read_whole(self, timeout_s: float) -> CompletionChunk | None:
        """Return everything in one chunk, waiting as `Handle.read_whole` does, or None if it is not over yet.

        An echoed prompt may be a chunk of its own. Raises EngineFailed.
        """
        return self._echoed() or self._next(self.handle.read_whole(timeout_s))

    def _echoed(self) -> CompletionChunk | None:
        """Return the prompt if it is returned and needs no scores, the first time."""
        if self._num_echoed == len(self.prompt) or self._request.scores_prompt:
            return None
        return self._chunk(self._echo(len(self.prompt)), len(self.prompt))

    def _next(self, update: Update) -> CompletionChunk | None:
        num_echoed, end = self._num_echoed, update.end
        shown = self._process(update.result)
        if end is not None:
            self.is_over = True
            num_hidden = 0 if self._request.includes_stop else end.num_stop_chars
            shown += self._withheld[: len(self._withheld) - num_hidden]
            self._withheld = ""
            self._cache_states(end)
            if self._request.returns_state and end.reason != "cancelled":
                self.state = self._state_after(end)
        return self._chunk(shown, self._num_echoed - num_echoed) if shown or self.is_over else None

    def _process(self, part: StepResult) -> str:
        """Take over a result of the engine, and return the text that can be returned now."""
        shown = ""
        num_logprobs, num_prompt_logprobs = self._request.num_logprobs, self._request.num_prompt_logprobs
        if (scores := part.prompt_scores) is not None:
            if self._num_scored == 0 and self._request.start is None:
                chosen = scores.chosen.copy()  # other choices have the same array
                chosen[0] = np.nan  # nothing predicts the first character
                scores = replace(scores, chosen=chosen)
            self._num_scored += len(scores.chosen)
            if num_prompt_logprobs is not None:
                self.prompt_scores.append(scores.likeliest(num_prompt_logprobs))
            if self._request.echo:
                shown = self._echo(len(scores.chosen))
                if num_logprobs is not None:
                    self._scores.append(scores.likeliest(num_logprobs))
        text = self._model.charset.decode(part.chars)
        if (scores := part.scores) is not None:
            self._logprob += float(scores.chosen.sum(dtype=np.float64))
            if scores.allowed is None and self._request.form is not None:
                scores = replace(scores, allowed=scores.chosen)  # of a form that forbids nothing
            if num_logprobs is not None:
                self._scores.append(scores.likeliest(num_logprobs))
        self.num_generated += len(text)
        self.generated += text
        text = self._withheld + text
        num_shown = len(text) - (0 if self._request.includes_stop else part.num_withheld)
        self._withheld = text[num_shown:]
        return shown + text[:num_shown]

    def _echo(self, num_chars: int) -> str:
        start = self._num_echoed
        self._num_echoed = min(start + num_chars, len(self.prompt))
        return self._model.charset.decode(self.prompt[start : self._num_echoed])

    def _chunk(self, shown: str, num_echoed: int) -> CompletionChunk:
        if not self._scores:
            return CompletionChunk(shown, None if self._request.num_logprobs is None else Scores.none(), num_echoed)
        scores = Scores.join(self._scores)
        self._scores = [scores.slice(len(shown), None)]
        return CompletionChunk(shown, scores.slice(0, len(shown)), num_echoed)

    def _cache_states(self, end: End) -> None:
        if self._request.start is not None:
            return  # the cache knows states by their whole text
        prompt = self._model.charset.decode(self.prompt)
        if (hidden := end.checkpoints.get(len(prompt))) is not None:
            self._model.prefixes.put(self._request.cache_scope, prompt, hidden)
        if end.reason != "cancelled":
            self._model.prefixes.put(self._request.cache_scope, prompt + self.generated, end.hidden)

    def _state_after(self, end: End) -> tuple[Float32, int]:
        """Return the (L, H) state after the text, and its position. The text ends before a stop string that ended it.

        The engine's own state is the one after the stop string, so the characters before that are stepped again.
        """
        if not end.num_stop_chars or self._request.includes_stop:
            return end.hidden, end.position
        begun, position = self.handle.request, end.position - end.num_stop_chars
        states = {begun.position: begun.hidden} | end.checkpoints
        start = max(place for place in states if place <= position)
        ids = np.concatenate([begun.prompt, self._model.charset.exact(self.generated)])
        ids = ids[start - begun.position : position - begun.position]
        return step(self._model, ids, states[start], start, already_admitted=True)[0].hidden, position


class _Read(Protocol):
    """Reads from one of the open continuations."""

    def __call__(self, choice: Choice, *, is_first: bool) -> CompletionChunk | None: ...


class Completion:
    """All continuations of a request, submitted to the engine."""

    def __init__(self, model: LoadedModel, request: CompletionRequest) -> None:
        """Submit the request. After that, only a failing engine can end it early. Raises Overloaded, EngineFailed."""
        self.request = request
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

    def chunks(self, flush_interval_s: float, idle_s: float) -> Iterator[tuple[Choice, CompletionChunk] | None]:
        """Yield chunks of all continuations: the first of each at once, later ones every flush_interval_s.

        If the engine is busy, chunks are longer. Yields None when there was nothing for idle_s, so that the caller can
        check whether its client is still connected. Yields all best_of continuations; `chosen` then says which of them
        to return. Raises EngineFailed.
        """
        begun: set[int] = set()

        def read(choice: Choice, *, is_first: bool) -> CompletionChunk | None:
            interval_s = 0.0
            if flush_interval_s and is_first and choice.index in begun:
                interval_s = flush_interval(self._engine.crowd_of(choice.handle.request.client), flush_interval_s)
            chunk = choice.read(interval_s, idle_s if is_first else 0.0)
            if chunk is not None:
                begun.add(choice.index)
            return chunk

        return self._read_all(read)

    def wholes(self, idle_s: float) -> Iterator[tuple[Choice, CompletionChunk] | None]:
        """Yield each continuation when it is over. None, and `chosen`: see `chunks`. Raises EngineFailed."""
        return self._read_all(lambda choice, *, is_first: choice.read_whole(idle_s if is_first else 0.0))

    def _read_all(self, read: _Read) -> Iterator[tuple[Choice, CompletionChunk] | None]:
        while open_choices := [choice for choice in self.choices if not choice.is_over]:
            # The engine admits texts in their order and advances them together: waiting for the first one is enough.
            quiet = True
            for place, choice in enumerate(open_choices):
                chunk = read(choice, is_first=place == 0)
                if chunk is not None:
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
        origin = 0 if request.start is None else request.start.position
        start, hidden = 0, None if request.start is None else request.start.hidden
        if request.start is None and not request.scores_prompt:
            start, hidden = model.prefixes.longest(request.cache_scope, text)
        self.num_cached += start
        checkpoints = [origin + len(prompt)] if start < len(prompt) else []
        if request.returns_state and request.stop and not request.includes_stop:
            # So that few characters are stepped again when a stop string has ended the text.
            every = max(_CHECKPOINT_CHARS, -(-request.max_chars // _MAX_CHECKPOINTS))
            end = origin + len(prompt) + request.max_chars
            checkpoints += range(origin + len(prompt) + every, end + 1, every)
        automaton = automaton_of(model.charset, request.form, request.sampling.allowed, request.stop)
        unread = prompt[start:]  # one array for all choices, so the engine reads it once
        return [
            Request(
                prompt=unread,
                max_chars=request.max_chars,
                seed=choice_seed(request.seed, request.first_choice + index),
                sampling=request.sampling,
                automaton=automaton,
                min_chars=request.min_chars,
                num_logprobs=request.num_top,
                score_prompt=request.scores_prompt,
                hidden=hidden,
                position=origin + start,
                history_prompt=prompt,
                checkpoint_positions=tuple(checkpoints),
            )
            for index in range(request.best_of)
        ]
