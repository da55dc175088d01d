"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from flask import Response

from service.engine.automaton.stops import MAX_STOPS
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, NoChatTemplate, plural
from service.generation.completion import Completion, CompletionRequest
from service.generation.reader import with_biases, written_stops
from service.generation.score_reservation import ScoreReservation
from service.model.charset import Charset, UnknownChars
from service.model.chat_template import ChatMessage, ChatTemplate, Ending
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.shares import SharedBudget
from service.web.api.chat import schemas
from service.web.api.chat.answer import ChatAnswer
from service.web.api.chat.schemas import ChatBody, Message
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
        messages = [_chat_message(message) for message in body.messages]
        max_chars = _check(body, messages, self._limits)
        with ExitStack() as held:
            held.enter_context(self._admission.admit(is_stream=body.stream))
            # From here on the thread may wait: first for the model.
            model = self._models.get(body.model or self._default_model)
            template = self._template_of(model)
            request = _completion_request(model, template, body, messages, max_chars, self._limits)
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

    def _template_of(self, model: LoadedModel) -> ChatTemplate:
        template = model.chat or self._default_template
        ref = model.version.ref
        if template is None:
            raise NoChatTemplate(
                f"{ref} has no chat template, so it can't answer chats: the operator can give it one with `gru-serve "
                f"models chat {ref} play`, or all versions with GRU_SERVE_CHAT_TEMPLATE; /v1/completions needs none",
                param="model",
            )
        if unknown := template.unknown_to(model.charset):
            raise NoChatTemplate(
                f"{ref} has no chat template of its own, and doesn't know {unknown} of the server's: the operator can "
                f"give it one with `gru-serve models chat`; /v1/completions needs none",
                param="model",
            )
        return template


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


def _chat_message(message: Message) -> ChatMessage:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return ChatMessage("system" if message.role == "developer" else message.role, text, message.name)


def _check(body: ChatBody, messages: list[ChatMessage], limits: CompletionLimits) -> int:
    """Check what the schema can't express. Return the number of characters to generate."""
    num_chars = sum(len(message.content) for message in messages)
    if num_chars > limits.max_prompt_chars:
        raise InvalidValue(
            f"messages: at most {plural(limits.max_prompt_chars, 'character')} together, not {num_chars}",
            param="messages",
        )
    field = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_chars: int = getattr(body, field)
    if max_chars > limits.max_tokens:
        if field not in body.model_fields_set:
            max_chars = limits.max_tokens
        else:
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
    if body.continue_final_message:
        if "add_generation_prompt" in body.model_fields_set and body.add_generation_prompt:
            raise InvalidValue(
                "add_generation_prompt: begins a new answer, so it can't be true with continue_final_message",
                param="add_generation_prompt",
            )
        if messages[-1].role != "assistant":
            raise InvalidValue(
                "continue_final_message: the last message is not one of the assistant", param="continue_final_message"
            )
    return max_chars


def _completion_request(
    model: LoadedModel,
    template: ChatTemplate,
    body: ChatBody,
    messages: list[ChatMessage],
    max_chars: int,
    limits: CompletionLimits,
) -> CompletionRequest:
    unknown = body.unknown_chars
    ending: Ending = "unfinished" if body.continue_final_message else "answer" if body.add_generation_prompt else "turn"
    if unknown != "error":
        messages = [_with_known_name(message, model.charset, unknown) for message in messages]
    try:
        prompt = model.charset.encode(template.text_of(messages, ending), unknown)
    except InvalidValue as error:
        _encode_each(model.charset, template, messages, unknown)
        error.param = "messages"
        raise
    if len(prompt) > limits.max_prompt_chars:
        raise InvalidValue(
            f"messages: at most {plural(limits.max_prompt_chars, 'character')} as the chat template writes them, not "
            f"{len(prompt)}",
            param="messages",
        )
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


def _with_known_name(message: ChatMessage, charset: Charset, unknown: UnknownChars) -> ChatMessage:
    """Leave out a speaker's name of which `unknown` would leave no character: the template's is better than none."""
    kept: UnknownChars = "drop" if unknown == "drop" else "fold_drop"  # what can't be folded is refused with its place
    if message.name is None or len(charset.encode(message.name, kept)):
        return message
    return replace(message, name=None)


def _encode_each(charset: Charset, template: ChatTemplate, messages: list[ChatMessage], unknown: UnknownChars) -> None:
    """Raise the error of the first message whose own text can't be encoded, with its path and the positions in it."""
    for place, message in enumerate(messages):
        turn: str = getattr(template, message.role)
        for field, text in (("name", message.name), ("content", message.content)):
            if not text or f"{{{field}}}" not in turn:
                continue
            try:
                charset.encode(text, unknown)
            except InvalidValue as error:
                error.param = f"messages[{place}].{field}"
                raise
