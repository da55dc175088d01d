"""A version's chat template: how the messages of a chat are written as one text, and which strings end an answer.

A template is data: strings in which two placeholders are replaced. It can't contain code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import InvalidArtifact
from service.model.charset import Charset, describe
from service.model.manifest import describe_first_error, read_regular_file

MAX_CHAT_BYTES = 64 * 1024
MAX_NAME_CHARS = 64
MAX_TEMPLATE_STOPS = 4
_MAX_TURN_CHARS = 2000
_NAME, _CONTENT = "{name}", "{content}"
_PLACEHOLDER = re.compile(r"\{(?:name|content)\}")

Role = Literal["system", "user", "assistant"]
# What the text ends with: the beginning of a new answer, the unfinished last message, or the end of the last message.
Ending = Literal["answer", "unfinished", "turn"]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


@dataclass(frozen=True)
class ChatMessage:
    """One message of a chat."""

    role: Role
    content: str
    name: str | None = None  # of the speaker, instead of the one that the template has for the role


class Names(BaseModel):
    """Names of speakers whose messages give none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    user: Name = "User"
    assistant: Name = "Assistant"


class ChatTemplate(BaseModel):
    """The content of `chat.json`. In the text of a turn, `{content}` and `{name}` stand for what a message has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    user: str = Field(max_length=_MAX_TURN_CHARS)  # a message of the user, with `{content}` once
    # The same for the model's own messages. What precedes `{content}` begins an answer.
    assistant: str = Field(max_length=_MAX_TURN_CHARS)
    system: str = Field("", max_length=_MAX_TURN_CHARS)  # the same for instructions; empty leaves them out
    names: Names = Names()
    # Strings that end an answer, and are not part of it.
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(min_length=1, max_length=MAX_TEMPLATE_STOPS)

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        for role in ("user", "assistant", "system"):
            turn: str = getattr(self, role)
            if turn.count(_CONTENT) != 1 and not (role == "system" and not turn):
                raise ValueError(f"{role}: the text of a turn has {_CONTENT} once")
        if _NAME in self.system:
            raise ValueError(f"system: instructions have no speaker, so {_NAME} is not possible here")
        return self

    def text_of(self, messages: Sequence[ChatMessage], ending: Ending = "answer") -> str:
        """Return the messages as one text.

        The answer is spoken by the name that the last message of the assistant has, or else by that of the template.
        For the ending `unfinished`, the last message has to be one of the assistant.
        """
        parts = []
        for place, message in enumerate(messages):
            is_unfinished = ending == "unfinished" and place == len(messages) - 1
            turn = self._beginning + _CONTENT if is_unfinished else str(getattr(self, message.role))
            parts.append(_filled(turn, message.name or self._name_of(message.role), message.content))
        if ending == "answer":
            names = [message.name for message in messages if message.role == "assistant" and message.name]
            parts.append(_filled(self._beginning, names[-1] if names else self.names.assistant, ""))
        return "".join(parts)

    def unknown_to(self, charset: Charset) -> str | None:
        """Describe a character of the template that a model can't read or write; None if there is none."""
        named = [getattr(self.names, role) for role in ("user", "assistant") if _NAME in getattr(self, role)]
        turns = [_PLACEHOLDER.sub("", turn) for turn in (self.user, self.assistant, self.system)]
        return next((describe(char) for char in "".join([*turns, *named, *self.stop]) if char not in charset), None)

    def to_json(self) -> str:
        """Return the form in which it is stored."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the stored form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def _beginning(self) -> str:
        return self.assistant.partition(_CONTENT)[0]

    def _name_of(self, role: Role) -> str:
        return self.names.user if role == "user" else self.names.assistant


# A play, as in Shakespeare's: the speaker's name, a colon, the lines of the speech, a blank line. Instructions are a
# passage at the beginning that nobody speaks.
_PLAY = ChatTemplate(
    system="{content}\n\n",
    user="{name}:\n{content}\n\n",
    assistant="{name}:\n{content}\n\n",
    names=Names(user="ROMEO", assistant="JULIET"),
    stop=["\n\n"],
)
# One line for each message, which begins with the speaker's name.
_DIALOGUE = ChatTemplate(system="{content}\n", user="{name}: {content}\n", assistant="{name}: {content}\n", stop=["\n"])
# One line for each message, and no names.
_LINES = ChatTemplate(system="{content}\n", user="{content}\n", assistant="{content}\n", stop=["\n"])
PRESETS = {"play": _PLAY, "dialogue": _DIALOGUE, "lines": _LINES}


def parse_template(data: bytes, path: Path) -> ChatTemplate:
    """Return the template that a file holds. Raises InvalidArtifact, which names the file."""
    try:
        return ChatTemplate.model_validate_json(data)
    except ValidationError as error:
        raise InvalidArtifact(f"{path}: {describe_first_error(error).removeprefix('Value error, ')}") from error


def find_template(preset_or_path: str) -> ChatTemplate:
    """Return a preset by its name, or else the template in a file of this path. Raises InvalidArtifact."""
    if preset_or_path in PRESETS:
        return PRESETS[preset_or_path]
    path = Path(preset_or_path)
    if not path.exists():
        presets = ", ".join(PRESETS)
        raise InvalidArtifact(f"there is no file {preset_or_path[:200]!r}; templates without a file: {presets}")
    return parse_template(read_regular_file(path, MAX_CHAT_BYTES), path)


def _filled(turn: str, name: str, content: str) -> str:
    """Replace the placeholders of a turn. Those in the content are left as they are."""
    return _PLACEHOLDER.sub(lambda found: name if found[0] == _NAME else content, turn)
