"""Texts as ids: /tokenize, /detokenize, /tokenizer_info and the files for Hugging Face's libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.model import hugging_face
from service.model.charset import Charset
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok, refused
from tests.harness.models import TINY_CHARSET, publish_tiny


def ids(text: str) -> list[int]:
    return [TINY_CHARSET.index(char) for char in text]


def test_tokenize__returns_the_ids_of_the_charset_in_vllms_shape(client: FlaskClient) -> None:
    # As lm-evaluation-harness sends it.
    answer = ok(client.post("/tokenize", json={"prompt": "ROMEO:", "add_special_tokens": False}))
    assert answer == {"count": 6, "max_model_len": 1500, "tokens": ids("ROMEO:"), "token_strs": None}
    # As vLLM's documentation does.
    body = {"model": "tiny@1", "prompt": "a\nb", "return_token_strs": True}
    assert ok(client.post("/tokenize", json=body))["token_strs"] == ["a", "\n", "b"]
    assert ok(client.post("/tokenize", json={"prompt": ""}))["tokens"] == []


def test_tokenize__reads_a_text_as_a_completion_does(client: FlaskClient) -> None:
    refused(client.post("/tokenize", json={"prompt": "café"}), 400, "unknown_characters", "prompt")
    folded = ok(client.post("/tokenize", json={"prompt": "café", "unknown_chars": "fold", "return_token_strs": True}))
    assert folded["token_strs"] == list("cafe")
    dropped = ok(client.post("/tokenize", json={"prompt": "cafe\u0301", "unknown_chars": "drop"}))
    assert dropped["tokens"] == ids("caf")
    refused(client.post("/tokenize", json={"prompt": "a" * 1001}), 400, "out_of_range", "prompt")
    refused(client.post("/tokenize", json={"prompt": "a", "model": "nope"}), 404, "model_not_found", "model")
    refused(client.post("/tokenize", json={"prompt": ["a"]}), 400, "wrong_type", "prompt")


def test_detokenize__is_the_inverse(client: FlaskClient) -> None:
    text = "O Romeo,\nRomeo!"
    tokens = ok(client.post("/tokenize", json={"prompt": text}))["tokens"]
    assert ok(client.post("/detokenize", json={"tokens": tokens})) == {"prompt": text}
    assert ok(client.post("/detokenize", json={"tokens": [], "model": "tiny"})) == {"prompt": ""}


@pytest.mark.parametrize("token", [-1, len(TINY_CHARSET), 2**63, -(2**70)])
def test_detokenize__names_the_id_that_no_character_has(client: FlaskClient, token: int) -> None:
    error = refused(client.post("/detokenize", json={"tokens": [1, 2, token, -5]}), 400, "out_of_range", "tokens[2]")
    assert str(len(TINY_CHARSET) - 1) in error["message"]
    refused(client.post("/detokenize", json={"tokens": [1, "a", token]}), 400, "wrong_type", "tokens[1]")
    assert len(ok(client.post("/detokenize", json={"tokens": [5] * 1000}))["prompt"]) == 1000
    refused(client.post("/detokenize", json={"tokens": [5] * 1001}), 400, "out_of_range", "tokens")


def test_tokenizer_info__has_what_lm_eval_looks_for(client: FlaskClient) -> None:
    info = ok(client.get("/tokenizer_info"))
    # lm-evaluation-harness asks for the ids of both, each of which has to be one character. It takes the id 0 of the
    # first for none, and then takes the second.
    for name in ("bos_token", "eos_token"):
        assert ok(client.post("/tokenize", json={"prompt": info[name]}))["tokens"] == ids("\n") == [0]
    assert (info["tokenizer_class"], info["vocab_size"]) == ("PreTrainedTokenizerFast", len(TINY_CHARSET))
    assert ok(client.get("/tokenizer_info?model=tiny@1")) == info
    refused(client.get("/tokenizer_info?model=nope"), 404, "model_not_found", "model")
    refused(client.get("/tokenizer_info?x=1"), 400, "unknown_field", "x")


def test_tokenizer_info__of_a_model_without_newline_names_none(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path), "dna", charset="ACGT")
    with client_of(Settings(model_store=tmp_path, model="dna")) as client:
        dna = ok(client.get("/v1/models/dna/tokenizer_config.json"))
        assert dna == ok(client.get("/tokenizer_info"))
        assert (dna["bos_token"], dna["eos_token"], dna["vocab_size"]) == (None, None, 4)


def test_tokenizer_files__are_those_of_the_charset(client: FlaskClient) -> None:
    for ref in ("tiny", "tiny@1", "tiny@latest"):
        assert ok(client.get(f"/v1/models/{ref}/tokenizer.json")) == hugging_face.tokenizer(Charset(TINY_CHARSET))
        assert ok(client.get(f"/v1/models/{ref}/tokenizer_config.json")) == ok(client.get("/tokenizer_info"))
    refused(client.get("/v1/models/nope/tokenizer.json"), 404, "model_not_found", "id")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    """A server with a model that answers chats, `tiny`, and one without a template, `plain`."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store, "tiny", chat="play")
    publish_tiny(store, "plain")
    with client_of(Settings(model_store=store.root, model="tiny", max_tokens=500, max_prompt_chars=1000)) as client:
        # A first request, because the engine's thread starts with its first work.
        client.post("/v1/completions", json={"prompt": "z", "max_tokens": 1})
        yield client


CHAT = [
    {"role": "system", "content": "A street"},
    {"role": "user", "content": [{"type": "text", "text": "Lord\u2019s there?"}]},
]


def test_tokenize__of_a_chat_has_the_ids_that_the_chat_reads(speaker: FlaskClient) -> None:
    body = {"messages": CHAT, "return_token_strs": True}  # as vLLM's documentation has it
    answer = ok(speaker.post("/tokenize", json=body))
    text = "A street\n\nROMEO:\nLord's there?\n\nJULIET:\n"
    assert answer == {"count": len(text), "max_model_len": 1500, "tokens": ids(text), "token_strs": list(text)}
    read = ok(speaker.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}))["usage"]["prompt_tokens"]
    assert read == answer["count"]
    neutral: dict[str, Any] = {
        "chat_template": None,
        "chat_template_kwargs": {},
        "mm_processor_kwargs": None,
        "tools": [],
    }
    assert ok(speaker.post("/tokenize", json=body | neutral | {"add_special_tokens": False})) == answer
    turn = ok(speaker.post("/tokenize", json=body | {"add_generation_prompt": False}))
    assert "".join(turn["token_strs"]) == "A street\n\nROMEO:\nLord's there?\n\n"
    begun = [*CHAT, {"role": "assistant", "name": "Nurse", "content": "Patience, "}]
    begun_body = {"messages": begun, "continue_final_message": True, "return_token_strs": True}
    unfinished = "".join(ok(speaker.post("/tokenize", json=begun_body | {"unknown_chars": "drop"}))["token_strs"])
    assert unfinished.endswith("there?\n\nurse:\natience, ")  # the tiny model has no N and no P


def test_tokenize__of_a_chat_refuses_what_the_chat_refuses(speaker: FlaskClient) -> None:
    def error(code: str, param: str, **body: Any) -> str:
        return str(refused(speaker.post("/tokenize", json=body), 400, code, param)["message"])

    assert "models chat plain@1" in error("no_chat_template", "model", messages=CHAT, model="plain")
    assert "§" in error(
        "unknown_characters", "messages[0].content", messages=[{"role": "user", "content": "§"}], unknown_chars="error"
    )
    error("out_of_range", "messages", messages=[{"role": "user", "content": "a" * 1001}])
    error("out_of_range", "messages", messages=[{"role": "user", "content": "a" * 1000}])  # with the names
    error("out_of_range", "messages", messages=[])
    error("out_of_range", "continue_final_message", messages=CHAT, continue_final_message=True)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    error("out_of_range", "add_generation_prompt", messages=[{"role": "assistant", "content": "a"}], **both)
    error("unsupported_value", "tools", messages=CHAT, tools=[{"type": "function"}])
    error("unsupported_value", "chat_template", messages=CHAT, chat_template="{{ x }}")
    error("out_of_range", "messages", messages=CHAT, prompt="a")
    error("out_of_range", "add_generation_prompt", prompt="a", add_generation_prompt=True)
    assert "messages" in error("out_of_range", "prompt", model="tiny")


def test_tokenize__of_a_chat_takes_the_servers_template(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path), "plain")
    with client_of(Settings(model_store=tmp_path, model="plain", chat_template="lines")) as client:
        answer = ok(client.post("/tokenize", json={"messages": CHAT, "return_token_strs": True}))
        assert "".join(answer["token_strs"]) == "A street\nLord's there?\n"
