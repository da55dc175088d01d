"""POST /v1/completions."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import InvalidValue
from service.generation.completion import Completion, CompletionRequest
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.web.api import schemas
from service.web.api.completion_answer import CompletionAnswer
from service.web.api.schemas import ERRORS, MAX_CHOICES, CompletionBody
from service.web.api.sse import client_monitor, stream_response
from service.web.gate.access import client_key
from service.web.gate.admission import AdmissionLimit

_MAX_SCORES = 2_000_000  # log-probabilities in one answer; all are in memory until it is complete


@dataclass(frozen=True)
class CompletionLimits:
    """Limits of one request."""

    max_tokens: int  # characters that each continuation may have
    max_prompt_chars: int  # characters that each prompt may have
    max_texts: int  # prompts x continuations: as many texts as an engine accepts, running and queued


def completions_blueprint(
    models: LoadedModels, default_model: str, limits: CompletionLimits, admission: AdmissionLimit
) -> APIBlueprint:
    """The route of completions."""
    blueprint = APIBlueprint("completions", __name__, abp_tags=[Tag(name="completions")], abp_responses=ERRORS)

    @blueprint.post("/v1/completions", summary="Continue a text", responses={"200": schemas.CompletionAnswer})
    def create(body: CompletionBody) -> Response:
        """Read the prompt, character by character, then draw the characters that follow.

        With `stream` the answer is a stream of server-sent events. Each has the text that was generated since the
        previous one; the last is `[DONE]`.
        """
        _check(body, limits)
        streaming_client = client_key() if body.stream else None
        admission.acquire(streaming_client)
        try:  # from here on a thread may wait: first for the model
            model = models.get(body.model if body.model is not None else default_model)
            request = _completion_request(model, body, limits)
            completion = Completion(model, request)
        except BaseException:
            admission.release(streaming_client)
            raise

        def close() -> None:
            completion.cancel()
            admission.release(streaming_client)

        answer = CompletionAnswer(model, completion)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return stream_response(answer.events(client_monitor(), with_usage), close)
        try:
            return answer.whole(client_monitor())
        finally:
            close()

    return blueprint


def _check(body: CompletionBody, limits: CompletionLimits) -> None:
    """Check what the schema can't express: the configured limits, and fields that depend on each other."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    best_of = body.best_of if body.best_of is not None else body.n
    longest = max(map(len, prompts))
    if body.max_tokens > limits.max_tokens:
        raise InvalidValue(f"max_tokens: at most {limits.max_tokens} characters a request", param="max_tokens")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidValue("max_tokens: 0 generates nothing, so it needs echo", param="max_tokens")
    if longest > limits.max_prompt_chars:
        raise InvalidValue(f"prompt: at most {limits.max_prompt_chars} characters, not {longest}", param="prompt")
    if best_of < body.n:
        raise InvalidValue(f"best_of: must be at least n, which is {body.n}", param="best_of")
    if body.stream and best_of > body.n:
        raise InvalidValue(
            "best_of: can't exceed n with stream, because the best continuations are known only at the end",
            param="best_of",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options: only allowed with stream", param="stream_options")
    if len(prompts) * best_of > min(MAX_CHOICES, limits.max_texts):
        raise InvalidValue(
            f"n: {len(prompts)} prompts x {best_of} continuations exceed {min(MAX_CHOICES, limits.max_texts)} texts",
            param="n" if body.best_of is None else "best_of",
        )
    if body.logprobs is not None:
        num_scored = sum(map(len, prompts)) * body.echo * best_of + body.max_tokens * len(prompts) * best_of
        if num_scored * (1 + body.logprobs) > _MAX_SCORES:
            raise InvalidValue(
                f"logprobs: {num_scored} characters with {body.logprobs} alternatives each don't fit into one answer: "
                f"request at most {_MAX_SCORES // (1 + body.logprobs)} characters",
                param="logprobs",
            )


def _completion_request(model: LoadedModel, body: CompletionBody, limits: CompletionLimits) -> CompletionRequest:
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    try:
        encoded = tuple(model.charset.encode(prompt, body.unknown_chars) for prompt in prompts)
    except InvalidValue as error:
        error.param = "prompt"
        raise
    if max(map(len, encoded)) > limits.max_prompt_chars:  # folding can make a prompt longer
        raise InvalidValue(f"prompt: at most {limits.max_prompt_chars} characters after folding", param="prompt")
    return CompletionRequest(
        prompts=encoded,
        max_chars=body.max_tokens,
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        sampling=body.sampling_settings(lambda: model.charset),
        stop=body.stop_strings,
        n=body.n,
        best_of=body.best_of if body.best_of is not None else body.n,
        num_logprobs=body.logprobs,
        echo=body.echo,
    )
