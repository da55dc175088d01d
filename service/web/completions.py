"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time

from flask import Response
from flask_openapi import APIBlueprint, Tag

from service.errors import InvalidValue
from service.generation import GenerationRequest, Generator, SamplingSettings
from service.loaded import LoadedModel, LoadedModels
from service.web.schemas import ERRORS, Choice, CompletionAnswer, CompletionBody, Usage


def completions_blueprint(
    models: LoadedModels, generator: Generator, default_model: str, max_tokens: int, max_prompt_chars: int
) -> APIBlueprint:
    """The resource, over these parts and within these limits."""
    blueprint = APIBlueprint("completions", __name__, abp_tags=[Tag(name="completions")], abp_responses=ERRORS)

    @blueprint.post("/v1/completions", summary="Continue a text", responses={"200": CompletionAnswer})
    def create(body: CompletionBody) -> Response:
        """Step the network over the prompt, character by character, then draw the characters that follow."""
        _check_limits(body, max_tokens, max_prompt_chars)
        model = models.get(body.model if body.model is not None else default_model)
        request = _request(model, body)
        if len(request.prompt) > max_prompt_chars:  # folding may have made it longer
            raise InvalidValue(f"prompt: at most {max_prompt_chars} characters after folding", param="prompt")
        completion = generator.complete(model, request)
        answer = CompletionAnswer(
            id=f"cmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model.version.ref,
            system_fingerprint=model.fingerprint,
            choices=[Choice(index=0, text=completion.text, finish_reason=completion.finish_reason)],
            usage=Usage(
                prompt_tokens=completion.num_prompt,
                completion_tokens=completion.num_generated,
                total_tokens=completion.num_prompt + completion.num_generated,
            ),
        )
        return Response(answer.model_dump_json(), mimetype="application/json")

    return blueprint


def _check_limits(body: CompletionBody, max_tokens: int, max_prompt_chars: int) -> None:
    if body.max_tokens > max_tokens:
        raise InvalidValue(f"max_tokens: at most {max_tokens} characters a request", param="max_tokens")
    if len(body.prompt) > max_prompt_chars:
        raise InvalidValue(f"prompt: at most {max_prompt_chars} characters, not {len(body.prompt)}", param="prompt")


def _request(model: LoadedModel, body: CompletionBody) -> GenerationRequest:
    try:
        prompt = model.charset.encode(body.prompt, body.unknown_chars)
    except InvalidValue as error:
        error.param = "prompt"
        raise
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return GenerationRequest(
        prompt=prompt,
        max_tokens=body.max_tokens,
        sampling=SamplingSettings(body.temperature, body.top_k, body.top_p),
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        stop=stop,
    )
