"""Fields that clients of other servers send, and that have no effect here: which values are accepted, and why.

Every field of a request is one of three kinds:

- honoured: a field of a schema without a mark;
- accepted because the service does so anyway: marked `Anyway`, any value of its type;
- accepted at its neutral value: marked `Only`, these values. Any other value would need something that the service
  doesn't have, so it is refused with what to do instead.

Everything else is refused by its path, with the nearest known name. So a client that sends more than it needs works
unchanged, and a typo is never ignored. docs/api.md has the same table, and a test compares them.

Descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from service.web.api.schemas import Body

Name = Annotated[str, Field(max_length=256)]


@dataclass(frozen=True, eq=False)
class Anyway:
    """Marks a field that is accepted with any value of its type, because the value changes nothing."""

    why: str

    @property
    def accepted(self) -> str:
        """The accepted values, as the documentation shows them."""
        return "any"

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(core) | {"description": f"accepted, and has no effect: {self.why}"}


@dataclass(frozen=True, eq=False, init=False)
class Only:
    """Marks a field that is accepted with these values, which change nothing; without values, only as `null`."""

    why: str
    values: tuple[object, ...]

    def __init__(self, why: str, *values: object) -> None:
        object.__setattr__(self, "why", why)
        object.__setattr__(self, "values", values)

    @property
    def accepted(self) -> str:
        """The accepted values, as the documentation shows them."""
        return " or ".join(f"`{json.dumps(value)}`" for value in self.values or (None,))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        description = f"has no effect, and other values are refused: {self.why}"
        return handler(core) | {"enum": [*self.values, None], "description": description}

    def _check(self, value: object) -> object:
        if value not in self.values:
            values = self.accepted.replace("`", "")
            raise PydanticCustomError(
                "unsupported_value", "only {values} is accepted: {why}", {"values": values, "why": self.why}
            )
        return value


# Names that other servers, and other routes, use for what a field here does: for the error that refuses them.
OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens", "max_length": "max_tokens", "n_predict": "max_tokens", "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens", "min_length": "min_tokens",
    "stop_sequences": "stop", "stopping_strings": "stop", "stop_strings": "stop",
    "bias": "logit_bias", "random_seed": "seed", "num_return_sequences": "n", "best_n": "best_of",
    "repeat_penalty": "repetition_penalty", "rep_pen": "repetition_penalty",
    "top_logprobs": "logprobs", "n_probs": "logprobs", "do_sample": "temperature", "inputs": "prompt", "text": "prompt",
    "prompt_token_ids": "prompt", "input_ids": "prompt",
    "guided_json_object": "response_format", "json_mode": "response_format", "json_schema": "response_format",
    "regex": "structured_outputs", "choice": "structured_outputs", "ebnf": "structured_outputs",
}  # fmt: skip

_NO_SPECIAL = "there are no special tokens: every token is a character of the text"
_SAMPLERS = "this way to draw does not exist here: use `temperature`, `top_k`, `top_p` and `min_p`"
_TELLS_NOTHING = "it describes the request to other services"
NO_GRAMMAR = "there are no grammars: use `structured_outputs` with `regex`, `json` or `choice`"
NO_TAGS = "the models call no tools, so no tag begins a form: the whole text has it"
NO_WHITESPACE = "the white space of JSON is bounded, and its form is fixed"


class ClientFields(Body):
    """Fields that clients of OpenAI, vLLM, llama.cpp and others send to every route that generates text."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    # Of drawing
    ignore_eos: Annotated[
        bool | None, Anyway("no character ends a text by itself: `stop`, `stop_token_ids` and `max_tokens` do")
    ] = None
    skip_special_tokens: Annotated[bool | None, Anyway(_NO_SPECIAL)] = None
    spaces_between_special_tokens: Annotated[bool | None, Anyway(_NO_SPECIAL)] = None
    use_beam_search: Annotated[
        bool | None, Only("`POST /v1/completions` has `beam`, which finds the likeliest texts", False)
    ] = None
    length_penalty: Annotated[float | None, Only("texts are compared by their whole log-probability", 1)] = None
    early_stopping: Annotated[bool | None, Only("a search ends when nothing can be likelier", False)] = None
    bad_words: Annotated[
        Annotated[list[Name], Field(max_length=1024)] | None,
        Only("a model of characters can't leave out words: `logit_bias` leaves out characters", []),
    ] = None
    typical_p: Annotated[float | None, Only(_SAMPLERS, 1)] = None
    tfs_z: Annotated[float | None, Only(_SAMPLERS, 1)] = None
    top_a: Annotated[float | None, Only(_SAMPLERS, 0)] = None
    mirostat: Annotated[int | None, Only(_SAMPLERS, 0)] = None
    dynatemp_range: Annotated[float | None, Only(_SAMPLERS, 0)] = None
    xtc_probability: Annotated[float | None, Only(_SAMPLERS, 0)] = None
    dry_multiplier: Annotated[float | None, Only("use `frequency_penalty` or `repetition_penalty`", 0)] = None
    repetition_detection: Annotated[Any, Only("use `frequency_penalty` or `repetition_penalty`")] = None
    thinking_token_budget: Annotated[int | None, Only("the models don't think before they write", -1)] = None
    watermarking: Annotated[bool | None, Only("texts are not marked", False)] = None
    logits_processors: Annotated[Any, Only("a request can't bring code: use `logit_bias`")] = None
    vllm_xargs: Annotated[dict[str, Any] | None, Only("there are no extensions", {})] = None
    # Of the form
    grammar: Annotated[Any, Only(NO_GRAMMAR, "")] = None
    guided_grammar: Annotated[Any, Only(NO_GRAMMAR)] = None
    structural_tag: Annotated[Any, Only(NO_TAGS)] = None
    guided_whitespace_pattern: Annotated[Any, Only(NO_WHITESPACE)] = None
    guided_decoding_backend: Annotated[Name | None, Anyway("there is one")] = None
    # Of reading the prompt
    add_special_tokens: Annotated[bool | None, Anyway(_NO_SPECIAL)] = None
    truncate_prompt_tokens: Annotated[
        int | None, Only("a prompt of any accepted length is read whole: send the part that counts", -1)
    ] = None
    truncation_side: Annotated[Name | None, Anyway("prompts are not truncated")] = None
    prompt_embeds: Annotated[Any, Only("the models read characters: send `prompt`")] = None
    cache_prompt: Annotated[bool | None, Anyway("cached states change nothing but the time")] = None
    kv_transfer_params: Annotated[Any, Only("a state is small, and is not moved between servers")] = None
    ec_transfer_params: Annotated[Any, Only("a state is small, and is not moved between servers")] = None
    # Of the answer
    logprob_token_ids: Annotated[Any, Only("use `logprobs`, which returns the likeliest characters")] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Only("`return_token_ids` returns the ids of a text's characters", False)
    ] = None
    stream_interval: Annotated[int | None, Anyway("characters are sent as soon as they can be")] = None
    # Of the request
    user: Annotated[Name | None, Anyway(_TELLS_NOTHING)] = None
    safety_identifier: Annotated[Name | None, Anyway(_TELLS_NOTHING)] = None
    metadata: Annotated[dict[str, Any] | None, Anyway(_TELLS_NOTHING)] = None
    prompt_cache_key: Annotated[Name | None, Anyway("all prompts of a key share its cache")] = None
    store: Annotated[bool | None, Anyway("answers are not stored")] = None
    priority: Annotated[int | None, Anyway("clients share the engine equally")] = None
    service_tier: Annotated[Name | None, Anyway("there is one")] = None
    request_id: Annotated[Name | None, Anyway("the header `X-Request-Id` names a request")] = None
    session_id: Annotated[Name | None, Anyway("sessions have routes of their own")] = None


def mark_of(field: FieldInfo) -> Anyway | Only | None:
    """Return the mark of a field that has no effect; None for one that is honoured."""
    return next((mark for mark in field.metadata if isinstance(mark, Anyway | Only)), None)
