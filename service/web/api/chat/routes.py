"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flask import Response

from service.arrays import Ids
from service.engine.automaton.stops import MAX_STOPS
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, plural
from service.generation.completion import Completion, CompletionRequest
from service.generation.reader import with_biases, written_stops
from service.generation.score_reservation import ScoreReservation
from service.model.chat_template import ChatTemplate
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.shares import SharedBudget
from service.web.api.chat import schemas
from service.web.api.chat.answer import ChatAnswer
from service.web.api.chat.prompts import encode_chat, ending_of, find_template, read_messages
from service.web.api.chat.schemas import ChatBody
from service.web.api.completions.routes import CompletionLimits
from service.web.api.completions.schemas import MAX_CHOICES, StreamOptions
from service.web.api.resource import Resource, blaming
from service.web.api.schemas import ERRORS
from service.web.api.sse import EventStream, client_monitor
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.generation import note_generation
from service.web.gate.route import Route

_NO_OPTIONS = StreamOptions()


class ChatRoutes(Resource):
    """The route of chats. A chat is a completion whose prompt the version's template writes."""

    name = "chat"
    errors = ERRORS

    def __init__(
        self,
        models: LoadedModels,
        default_model: str,
        default_template: ChatTemplate | None,
        limits: CompletionLimits,
        admission: AdmissionLimit,
        score_budget: SharedBudget,
    ) -> None:
        """default_template: of versions that have none."""
        self._models, self._default_model, self._default_template = models, default_model, default_template
        self._limits, self._admission, self._score_budget = limits, admission, score_budget

    @Route(
        "POST",
        "/v1/chat/completions",
        "Continue a chat",
        {"200": schemas.ChatCompletion},
        starts_work=True,
        counts_as_start=True,
        streams=True,
    )
    def create(self, body: ChatBody) -> Response:
        """Write the messages as one text, as the version's chat template says, and generate the answer that follows.

        With `stream` the answer is a stream of server-sent events; the last is `[DONE]`.
        """
        messages = read_messages(body.messages, self._limits.max_prompt_chars)
        max_chars = _check(body, self._limits)
        begins_answer = body.add_generation_prompt if "add_generation_prompt" in body.model_fields_set else None
        ending = ending_of(messages, begins_answer=begins_answer, continues_last=body.continue_final_message)
        with ExitStack() as held:
            held.enter_context(self._admission.admit(is_stream=body.stream))
            # From here on the thread may wait: first for the model.
            model = self._models.get(body.model or self._default_model)
            template = find_template(model, self._default_template)
            prompt = encode_chat(
                model.charset, template, messages, ending, body.unknown_chars, self._limits.max_prompt_chars
            )
            request = _completion_request(model, template, body, prompt, max_chars)
            scores = ScoreReservation(self._score_budget)
            held.callback(scores.release)
            scores.require(request.num_scores)
            client_has_left = client_monitor()
            with blaming(body.form_param), _as_sent(body):
                completion = Completion(model, request)
            held.callback(completion.cancel)
            note_generation(model.version.ref, [choice.handle for choice in completion.choices])
            answer = ChatAnswer(model, completion, template)
            if not body.stream:
                return answer.whole(client_has_left, held)
            return EventStream(answer.events(client_has_left, body.stream_options or _NO_OPTIONS), held, named=False)


@contextmanager
def _as_sent(body: ChatBody) -> Iterator[None]:
    """Name `max_tokens` as the client has sent it in an InvalidValue that is raised inside the block."""
    try:
        yield
    except InvalidValue as error:
        if error.param == "max_tokens" and body.max_completion_tokens is not None:
            error.param = "max_completion_tokens"
            error.message = error.message.replace("max_tokens", "max_completion_tokens")
        raise


def _check(body: ChatBody, limits: CompletionLimits) -> int:
    """Check what the schema can't express. Return the number of characters to generate."""
    field, max_chars = body.length_field, body.max_chars(limits.max_tokens)
    if max_chars > limits.max_tokens:
        raise InvalidValue(f"{field}: at most {plural(limits.max_tokens, 'character')} a request", param=field)
    if {"max_tokens", "max_completion_tokens"} <= body.model_fields_set and body.max_tokens != max_chars:
        raise InvalidValue("max_tokens: differs from max_completion_tokens; give one of them", param="max_tokens")
    if body.min_tokens > max_chars:
        raise InvalidValue(f"min_tokens: must be at most {field}, which is {max_chars}", param="min_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidValue("top_logprobs: only allowed with logprobs: true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options: only allowed with stream", param="stream_options")
    if body.n > min(MAX_CHOICES, limits.max_texts):
        raise InvalidValue(f"n: at most {plural(min(MAX_CHOICES, limits.max_texts), 'answer')}", param="n")
    return max_chars


def _completion_request(
    model: LoadedModel, template: ChatTemplate, body: ChatBody, prompt: Ids, max_chars: int
) -> CompletionRequest:
    unknown = body.unknown_chars
    stops = [*template.stop, *written_stops(model.charset, body.stop_strings, unknown, body.stop_token_ids)]
    if len(stops := list(dict.fromkeys(stops))) > MAX_STOPS:
        raise InvalidValue(
            f"stop_token_ids: at most {MAX_STOPS} stop strings and ids together with the {len(template.stop)} of the "
            "chat template",
            param="stop_token_ids",
        )
    return CompletionRequest(
        prompts=(prompt,),
        max_chars=max_chars,
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        sampling=with_biases(body.sampling_settings, model.charset, body.logit_bias, unknown, body.allowed_token_ids),
        stop=tuple(stops),
        includes_stop=body.include_stop_str_in_output,
        min_chars=body.min_tokens,
        form=body.form,
        n=body.n,
        best_of=body.n,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        cache_scope=CacheScope(current_owner(), body.cache_salt or ""),
    )
