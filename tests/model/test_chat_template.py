"""Chat templates: how messages become a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.errors import InvalidArtifact
from service.model.charset import Charset
from service.model.chat_template import MAX_CHAT_BYTES, PRESETS, ChatMessage, ChatTemplate, find_template

PLAY = PRESETS["play"]
CHAT = [
    ChatMessage("system", "Verona. A street."),
    ChatMessage("user", "Who goes there?"),
    ChatMessage("assistant", "A friend."),
    ChatMessage("user", "What friend?", name="TYBALT"),
]


def test_text_of__writes_a_play_up_to_the_answer() -> None:
    assert PLAY.text_of(CHAT) == (
        "Verona. A street.\n\nROMEO:\nWho goes there?\n\nJULIET:\nA friend.\n\nTYBALT:\nWhat friend?\n\nJULIET:\n"
    )


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("dialogue", "Be brief.\nUser: Hello.\nAssistant: Hi.\nUser: Who?\nAssistant: "),
        ("lines", "Be brief.\nHello.\nHi.\nWho?\n"),
    ],
)
def test_text_of__writes_lines(preset: str, text: str) -> None:
    roles = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Who?")]
    assert PRESETS[preset].text_of([ChatMessage(role, content) for role, content in roles]) == text  # type: ignore[arg-type]


def test_text_of__the_assistant_keeps_the_name_that_it_had_last() -> None:
    named = [*CHAT[:2], ChatMessage("assistant", "A friend.", name="NURSE"), ChatMessage("user", "Whose?")]
    assert PLAY.text_of(named).endswith("NURSE:\nA friend.\n\nROMEO:\nWhose?\n\nNURSE:\n")


def test_text_of__ends_with_an_unfinished_message_or_with_a_turn() -> None:
    assert PLAY.text_of(CHAT[1:3], "unfinished") == "ROMEO:\nWho goes there?\n\nJULIET:\nA friend."
    assert PLAY.text_of(CHAT[1:3], "turn") == "ROMEO:\nWho goes there?\n\nJULIET:\nA friend.\n\n"


def test_text_of__a_conversation_begins_with_the_text_of_the_one_before() -> None:
    answer = "A friend."
    before = PLAY.text_of(CHAT[:2]) + answer + PLAY.stop[0]
    assert PLAY.text_of([*CHAT[:2], ChatMessage("assistant", answer), ChatMessage("user", "Whose?")]).startswith(before)


def test_text_of__placeholders_of_a_message_stay_as_they_are() -> None:
    assert PLAY.text_of([ChatMessage("user", "{name} {content} {0}", name="{content}")], "turn") == (
        "{content}:\n{name} {content} {0}\n\n"
    )


def test_text_of__an_empty_system_turn_leaves_instructions_out() -> None:
    silent = ChatTemplate(user="{content}\n", assistant="{content}\n", stop=["\n"])
    assert silent.text_of([ChatMessage("system", "Be kind."), ChatMessage("user", "Hi.")]) == "Hi.\n"


def test_unknown_to__names_a_character_that_the_model_lacks() -> None:
    known = "\n:ROMEJULIT"
    assert PLAY.unknown_to(Charset(known)) is None
    assert PLAY.unknown_to(Charset(known.replace(":", ""))) == "':' (U+003A)"
    assert PLAY.unknown_to(Charset(known.replace("J", ""))) == "'J' (U+004A)"
    assert PRESETS["lines"].unknown_to(Charset("\n")) is None  # it writes no names


def test_find_template__reads_presets_and_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"user": "> {content}\n", "assistant": "{content}\n", "stop": ["\n"]}))
    assert find_template("play") is PLAY
    assert find_template(str(path)).text_of([ChatMessage("user", "Hi.")]) == "> Hi.\n"
    path.write_text(PLAY.to_json())
    assert find_template(str(path)) == PLAY


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"user": "{content}"}', b" " * (MAX_CHAT_BYTES + 1)])
def test_find_template__says_which_file_is_wrong(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(InvalidArtifact, match=r"chat\.json"):
        find_template(str(path))


def test_find_template__lists_the_presets_for_a_word_that_is_none() -> None:
    with pytest.raises(InvalidArtifact, match="'paly'; templates without a file: play, dialogue, lines"):
        find_template("paly")
