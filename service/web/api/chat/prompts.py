"""Chats as the texts that a model reads: which template writes them, and the ids of what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from service.arrays import Ids
from service.errors import InvalidValue, NoChatTemplate, plural
from service.model.charset import Charset, UnknownChars
from service.model.chat_template import ChatMessage, ChatTemplate, Ending
from service.registry.loaded_models import LoadedModel
from service.web.api.chat.schemas import Message


def find_template(model: LoadedModel, default: ChatTemplate | None) -> ChatTemplate:
    """Return the template of a version, or else the server's. Raises NoChatTemplate if neither can write its chats."""
    template = model.chat or default
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


def read_messages(messages: Sequence[Message], max_chars: int) -> list[ChatMessage]:
    """Return the messages of a body. Raises InvalidValue if they have more characters than `max_chars`."""
    read = [_message(message) for message in messages]
    num_chars = sum(len(message.content) for message in read)
    if num_chars > max_chars:
        raise InvalidValue(
            f"messages: at most {plural(max_chars, 'character')} together, not {num_chars}", param="messages"
        )
    return read


def ending_of(messages: Sequence[ChatMessage], *, begins_answer: bool | None, continues_last: bool) -> Ending:
    """Return what the text of a chat ends with. Raises InvalidValue if the fields contradict each other.

    Args:
        messages: At least one.
        begins_answer: The field `add_generation_prompt`; None if it is not sent, which means true.
        continues_last: The field `continue_final_message`.
    """
    if not continues_last:
        return "turn" if begins_answer is False else "answer"
    if begins_answer:
        raise InvalidValue(
            "add_generation_prompt: begins a new answer, so it can't be true with continue_final_message",
            param="add_generation_prompt",
        )
    if messages[-1].role != "assistant":
        raise InvalidValue(
            "continue_final_message: the last message is not one of the assistant", param="continue_final_message"
        )
    return "unfinished"


def encode_chat(
    charset: Charset,
    template: ChatTemplate,
    messages: list[ChatMessage],
    ending: Ending,
    unknown: UnknownChars,
    max_chars: int,
) -> Ids:
    """Return the (n,) int64 ids of a chat as a template writes it, n <= max_chars.

    Raises InvalidValue, or UnknownCharacters, which names the message.
    """
    if unknown != "error":
        messages = [_with_known_name(message, charset, unknown) for message in messages]
    try:
        prompt = charset.encode(template.text_of(messages, ending), unknown)
    except InvalidValue as error:
        _encode_each(charset, template, messages, unknown)
        error.param = "messages"
        raise
    if len(prompt) > max_chars:
        raise InvalidValue(
            f"messages: at most {plural(max_chars, 'character')} as the chat template writes them, not {len(prompt)}",
            param="messages",
        )
    return prompt


def _message(message: Message) -> ChatMessage:
    return ChatMessage("system" if message.role == "developer" else message.role, message.text, message.name)


def _with_known_name(message: ChatMessage, charset: Charset, unknown: UnknownChars) -> ChatMessage:
    """Return the message, without its speaker's name if `unknown` leaves no character of that."""
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
