"""The answer to a completion with `beam`: the likeliest continuations of each prompt."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.arrays import Ids
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, plural
from service.generation.automata import automaton_of, require_chars
from service.generation.branches import state_after
from service.generation.candidates import Origin
from service.generation.n_best import NBest, Wanted, affordable_steps, ends_at, most_scores, n_best
from service.generation.portable_states import PortableStart
from service.generation.score_reservation import ScoreReservation
from service.registry.loaded_models import LoadedModel
from service.web.api.completions.schemas import CompletionBody
from service.web.api.json_pieces import dumps
from service.web.api.schemas import PromptTokensDetails, Usage
from service.web.api.sse import client_monitor

MAX_BEAM_TOKENS = 1024

# What a search can't take into account, with the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "stream": (False,), "echo": (False,), "logprobs": (None,), "prompt_logprobs": (None,), "return_token_ids": (False,),
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
        self.reservation.wait_for(most_scores(self.model, wanted), client_monitor())
        found, num_cached = [], 0
        for prompt in prompts:
            origin, cached = self._origin(prompt)
            num_cached += cached
            found.append(n_best(self.model, origin, wanted, client_has_left=client_monitor()))
        num_prompt, num_stepped = sum(map(len, prompts)), sum(one.num_stepped for one in found)
        usage = Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_stepped,
            total_tokens=num_prompt + num_stepped,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )
        return self._pieces(body, wanted, found, usage)

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

    def _pieces(self, body: CompletionBody, wanted: Wanted, found: Sequence[NBest], usage: Usage) -> Iterator[str]:
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model.version.ref,
            "system_fingerprint": self.model.fingerprint,
        }
        yield dumps(head)[:-1] + ',"choices":['
        texts = [(one, best.is_exact) for best in found for one in best.texts]
        for index, (one, is_exact) in enumerate(texts):
            state = wanted.form.walk(0, one.ids)
            num_stop_chars = int(wanted.form.stop_chars[state])
            is_stopped = num_stop_chars > 0 or wanted.form.ends(state, wanted.max_chars - len(one.ids))
            choice = {
                "index": index,
                "text": self.model.charset.decode(
                    one.ids if body.include_stop_str_in_output else one.ids[: len(one.ids) - num_stop_chars]
                ),
                "logprobs": None,
                "finish_reason": "stop" if is_stopped else "length",
                "logprob": round(one.logprob, 7),
                "exact": is_exact,
            }
            yield ("," if index else "") + dumps(choice)
        yield f'],"usage":{usage.model_dump_json()}}}'
