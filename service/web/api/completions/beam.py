"""The answer to a completion with `beam`: the likeliest continuations of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from service.arrays import Ids
from service.engine.prefix_cache import CacheScope
from service.engine.scores import Scores, num_scores
from service.engine.short_text import ShortText
from service.errors import InvalidValue, plural
from service.generation.automata import automaton_of, require_chars
from service.generation.branches import Branches, state_after
from service.generation.candidates import Origin
from service.generation.n_best import Found, NBest, Wanted, affordable_steps, ends_at, most_scores, n_best
from service.generation.portable_states import PortableStart
from service.generation.score_reservation import ScoreReservation
from service.registry.loaded_models import LoadedModel
from service.web.api.completions.answer import answer_head
from service.web.api.completions.schemas import CompletionBody
from service.web.api.json_pieces import dumps, logprobs_pieces
from service.web.api.schemas import Usage
from service.web.api.sse import client_monitor

MAX_BEAM_TOKENS = 1024

# What a search can't take into account, with the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "stream": (False,), "echo": (False,), "prompt_logprobs": (None,), "return_token_ids": (False,),
    "return_state": (False,), "best_of": (None,), "seed": (None,), "min_tokens": (0,), "temperature": (0.0, 1.0),
    "top_k": (0, -1), "top_p": (1.0,), "min_p": (0.0,), "repetition_penalty": (1.0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "logit_bias": ({},), "allowed_token_ids": (None,),
}  # fmt: skip


def check_beam(body: CompletionBody) -> None:
    """Raise InvalidValue if a request with `beam` has a field that a search for the likeliest can't honour."""
    if body.n not in (1, body.beam):
        raise InvalidValue(f"n: leave it out with beam, which returns {plural(body.beam or 0, 'text')}", param="n")
    if not 0 < body.max_tokens <= MAX_BEAM_TOKENS:
        raise InvalidValue(f"max_tokens: 1 to {MAX_BEAM_TOKENS} characters with beam", param="max_tokens")
    for field, values in _NEUTRAL.items():
        if getattr(body, field) not in values:
            raise InvalidValue(
                f"{field}: not with beam, which returns the likeliest texts and draws none: leave it out", param=field
            )


@dataclass(frozen=True)
class BeamSearch:
    """A search for the likeliest continuations of the prompts of one request."""

    model: LoadedModel
    start: PortableStart | None  # each prompt continues the text of this state; None for the zero state
    stops: tuple[str, ...]  # strings that end a text, as the model writes them
    scope: CacheScope
    reservation: ScoreReservation
    max_scores: int  # log-probabilities that one client may have in memory

    def pieces(self, body: CompletionBody, prompts: Sequence[Ids]) -> Iterator[str]:
        """Search; return the answer as pieces of JSON.

        Raises InvalidValue, TooManyScores, Overloaded, EngineFailed, ClientGone before the first piece.
        """
        wanted = self._wanted(body)
        # All at once: searches that reserved more and more while they hold some could all wait for each other.
        num_chars = len(prompts) * wanted.n * wanted.max_chars
        self.reservation.wait_for(
            most_scores(self.model, wanted) + num_scores(num_chars, body.logprobs), client_monitor()
        )
        found: list[_Likely] = []
        num_cached = num_stepped = 0
        for prompt in prompts:
            origin, cached = self._origin(prompt)
            best = n_best(self.model, origin, wanted, client_has_left=client_monitor())
            branches = Branches(self.model, client_monitor())
            found += [
                _Likely(one, scores, best.is_exact)
                for one, scores in zip(best.texts, self._scored(branches, origin, best, body.logprobs), strict=True)
            ]
            num_cached += cached
            num_stepped += best.num_stepped + branches.num_stepped
        return self._pieces(body, wanted, found, Usage.of(sum(map(len, prompts)), num_stepped, num_cached))

    def _scored(
        self, branches: Branches, origin: Origin, best: NBest, num_logprobs: int | None
    ) -> Sequence[Scores | None]:
        """Return the scores of the characters of each text; None for each if none are requested."""
        if num_logprobs is None:
            return [None] * len(best.texts)
        texts = [np.array(one.ids, np.int64) for one in best.texts]
        grown = branches.grow(
            [ShortText(origin.hidden, origin.position, ids, num_logprobs=num_logprobs) for ids in texts]
        )
        return [one.scores for one in grown]

    def _wanted(self, body: CompletionBody) -> Wanted:
        charset = self.model.charset
        form = automaton_of(charset, body.form, None, self.stops) or ends_at([False] * len(charset))
        require_chars(form, body.max_tokens)
        steps = affordable_steps(self.model, body.max_tokens, self.max_scores)
        return Wanted(body.beam or 1, body.max_tokens, form, "forced", steps)

    def _origin(self, prompt: Ids) -> tuple[Origin, int]:
        """Return the state after a prompt, and how many of its characters the prefix cache saved."""
        if self.start is not None:
            return Origin.after(self.model, self.start, prompt, client_monitor()), 0
        hidden, num_cached = state_after(self.model, self.scope, prompt, client_monitor())
        return Origin(hidden, len(prompt)), num_cached

    def _pieces(self, body: CompletionBody, wanted: Wanted, found: Sequence[_Likely], usage: Usage) -> Iterator[str]:
        yield dumps(answer_head(self.model, "cmpl"))[:-1] + ',"choices":['
        for index, likely in enumerate(found):
            ids = likely.text.ids
            state = wanted.form.walk(0, ids)
            num_stop_chars = int(wanted.form.stop_chars[state])
            is_stopped = num_stop_chars > 0 or wanted.form.ends(state, wanted.max_chars - len(ids))
            text = self.model.charset.decode(
                ids if body.include_stop_str_in_output else ids[: len(ids) - num_stop_chars]
            )
            yield f'{"," if index else ""}{{"index":{index},"text":{dumps(text)},"logprobs":'
            yield from logprobs_pieces(text, likely.scores, self.model.charset, 0)
            end = {
                "finish_reason": "stop" if is_stopped else "length",
                "logprob": round(likely.text.logprob, 7),
                "exact": likely.is_exact,
            }
            yield "," + dumps(end)[1:]
        yield f'],"usage":{usage.model_dump_json()}}}'


@dataclass(frozen=True)
class _Likely:
    """One of the texts that are returned."""

    text: Found
    scores: Scores | None  # of its characters, a stop string at its end included
    is_exact: bool  # see NBest
