"""POST /v1/completions."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass

from flask import Response

from service.arrays import Ids
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, plural
from service.generation.completion import Completion, CompletionRequest
from service.generation.portable_states import PortableStart, PortableStates
from service.generation.reader import ids_of, with_biases, written_stops
from service.generation.score_reservation import ScoreReservation
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.shares import SharedBudget
from service.web.api.completions import schemas
from service.web.api.completions.answer import CompletionAnswer
from service.web.api.completions.beam import BeamSearch, check_beam
from service.web.api.completions.schemas import MAX_CHOICES, CompletionBody, StreamOptions
from service.web.api.resource import Resource, blaming
from service.web.api.responses import json_response
from service.web.api.schemas import ERRORS
from service.web.api.sse import EventStream, client_monitor
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.generation import note_generation
from service.web.gate.route import Route

_NO_OPTIONS = StreamOptions()


@dataclass(frozen=True)
class CompletionLimits:
    """Limits of one request."""

    max_tokens: int  # characters that each continuation may have
    max_prompt_chars: int  # characters that each prompt may have
    max_texts: int  # prompts x continuations: as many texts as an engine accepts, running and queued


class CompletionRoutes(Resource):
    """The route of completions."""

    name = "completions"
    errors = ERRORS

    def __init__(
        self,
        models: LoadedModels,
        default_model: str,
        limits: CompletionLimits,
        admission: AdmissionLimit,
        score_budget: SharedBudget,
        states: PortableStates,
    ) -> None:
        self._models, self._default_model, self._limits, self._admission = models, default_model, limits, admission
        self._score_budget, self._states = score_budget, states

    @Route(
        "POST",
        "/v1/completions",
        "Continue a text",
        {"200": schemas.CompletionAnswer},
        starts_work=True,
        counts_as_start=True,
        streams=True,
    )
    def create(self, body: CompletionBody) -> Response:
        """Read the prompt, character by character, then draw the characters that follow.

        With `stream` the answer is a stream of server-sent events. Each has the text that was generated since the
        previous one; the last is `[DONE]`.
        """
        _check(body, self._limits)
        with ExitStack() as held:
            held.enter_context(self._admission.admit(is_stream=body.stream))
            # From here on the thread may wait: first for the model.
            start = None
            if body.state is not None:
                start = self._states.open(body.state, body.model)
            model = start.model if start is not None else self._models.get(body.model or self._default_model)
            if body.beam is not None:
                return self._likeliest(model, start, body, held)
            request = _completion_request(model, body, self._limits, start)
            scores = ScoreReservation(self._score_budget)
            held.callback(scores.release)
            scores.require(request.num_scores)
            client_has_left = client_monitor()
            with blaming(body.form_param):
                completion = Completion(model, request)
            held.callback(completion.cancel)
            note_generation(model.version.ref, [choice.handle for choice in completion.choices])
            answer = CompletionAnswer(model, completion, self._states, with_ids=body.return_token_ids)
            if not body.stream:
                return answer.whole(client_has_left, held)
            return EventStream(answer.events(client_has_left, body.stream_options or _NO_OPTIONS), held, named=False)

    def _likeliest(
        self, model: LoadedModel, start: PortableStart | None, body: CompletionBody, held: ExitStack
    ) -> Response:
        """Answer a request that wants the likeliest continuations."""
        prompts = _encoded_prompts(model.charset, body, self._limits.max_prompt_chars)
        stops = written_stops(model.charset, body.stop_strings, body.unknown_chars, body.stop_token_ids)
        reservation = ScoreReservation(self._score_budget, "max_tokens", "request fewer characters")
        held.callback(reservation.release)
        scope = CacheScope(current_owner(), body.cache_salt or "")
        search = BeamSearch(model, start, stops, scope, reservation, self._score_budget.max_per_client)
        with blaming(body.form_param):
            return json_response(search.pieces(body, prompts), held)


def _check(body: CompletionBody, limits: CompletionLimits) -> None:
    """Check what the schema can't express: the configured limits, and fields that depend on each other."""
    prompts = body.prompts
    best_of = body.beam or (body.best_of if body.best_of is not None else body.n)
    if body.max_tokens > limits.max_tokens:
        raise InvalidValue(
            f"max_tokens: at most {plural(limits.max_tokens, 'character')} a request", param="max_tokens"
        )
    if body.max_tokens == 0 and body.beam is None and not body.echo and not body.return_state:
        raise InvalidValue("max_tokens: 0 generates nothing, so it needs echo or return_state", param="max_tokens")
    for place, prompt in enumerate(prompts):
        if len(prompt) > limits.max_prompt_chars:
            path = _path_of(body, place)
            raise InvalidValue(
                f"{path}: at most {plural(limits.max_prompt_chars, 'character')}, not {len(prompt)}", param=path
            )
    if body.beam is not None:
        check_beam(body)
    if best_of < body.n:
        raise InvalidValue(f"best_of: must be at least n, which is {body.n}", param="best_of")
    if body.stream and best_of > body.n:
        raise InvalidValue(
            "best_of: can't exceed n with stream, because the best continuations are known only at the end",
            param="best_of",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidValue("prompt_logprobs: not with stream: send the request without it", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options: only allowed with stream", param="stream_options")
    if len(prompts) * best_of > min(MAX_CHOICES, limits.max_texts):
        field = "beam" if body.beam is not None else "n" if body.best_of is None else "best_of"
        most = min(MAX_CHOICES, limits.max_texts)
        raise InvalidValue(
            f"{field}: {plural(len(prompts), 'prompt')} x {plural(best_of, 'continuation')} exceed "
            f"{plural(most, 'text')}",
            param=field,
        )


def _path_of(body: CompletionBody, place: int) -> str:
    """Return the path of a prompt: `prompt`, or `prompt[3]` in a list of prompts."""
    is_list = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    return f"prompt[{place}]" if is_list else "prompt"


def _encoded_prompts(charset: Charset, body: CompletionBody, max_chars: int) -> tuple[Ids, ...]:
    """Return (n,) int64 ids of each prompt, n <= max_chars. Raises UnknownCharacters, InvalidValue."""
    encoded = []
    for place, prompt in enumerate(body.prompts):
        path = _path_of(body, place)
        if isinstance(prompt, str):
            try:
                ids = charset.encode(prompt, body.unknown_chars)
            except InvalidValue as error:
                error.param = path
                raise
            if len(ids) > max_chars:  # folding can make a prompt longer
                raise InvalidValue(f"{path}: at most {plural(max_chars, 'character')} after folding", param=path)
        else:
            ids = ids_of(charset, prompt, path)
        encoded.append(ids)
    return tuple(encoded)


def _completion_request(
    model: LoadedModel, body: CompletionBody, limits: CompletionLimits, start: PortableStart | None
) -> CompletionRequest:
    return CompletionRequest(
        prompts=_encoded_prompts(model.charset, body, limits.max_prompt_chars),
        max_chars=body.max_tokens,
        seed=body.seed if body.seed is not None else start.seed if start is not None else secrets.randbits(63),
        sampling=with_biases(
            body.sampling_settings, model.charset, body.logit_bias, body.unknown_chars, body.allowed_token_ids
        ),
        stop=written_stops(model.charset, body.stop_strings, body.unknown_chars, body.stop_token_ids),
        includes_stop=body.include_stop_str_in_output,
        min_chars=body.min_tokens,
        form=body.form,
        n=body.n,
        best_of=body.best_of if body.best_of is not None else body.n,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
        echo=body.echo,
        start=start,
        returns_state=body.return_state,
        cache_scope=CacheScope(current_owner(), body.cache_salt or ""),
    )
