"""Texts as ids: /tokenize, /detokenize, /tokenizer_info and the files for Hugging Face's libraries."""

from __future__ import annotations

from pathlib import Path

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
