"""Items of a model of lines: an empty prompt begins at the zero state, and a newline ends the item."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok
from tests.harness.models import NAMES, publish_names

ITEM: dict[str, Any] = {"prompt": "", "stop": "\n", "max_tokens": 200, "seed": 7}
NAME = re.compile(f"[{NAMES}][anoé]+")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    """An application with a model of names."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_names(store)
    with client_of(Settings(model_store=store.root, model="names")) as client:
        ok(client.post("/v1/completions", json=ITEM))  # starts the engine's thread
        yield client


def choices(client: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    """Return the choices of a completion, and check that each is one whole name."""
    found: list[dict[str, Any]] = ok(client.post("/v1/completions", json=ITEM | fields))["choices"]
    for choice in found:
        assert NAME.fullmatch(choice["text"]), choice
        assert choice["finish_reason"] == "stop"
    return found


def test_item__is_one_for_each_choice_and_seed(client: FlaskClient) -> None:
    many = choices(client, n=64, logprobs=0)
    assert len({choice["text"] for choice in many}) > 10
    assert {choice["text"][0] for choice in many} == set(NAMES)
    assert choices(client)[0]["text"] == many[0]["text"]
    assert [choice["text"] for choice in choices(client, prompt=["", ""], n=2)] == [c["text"] for c in many[:2]] * 2
    for choice in many:
        scores = choice["logprobs"]
        assert "".join(scores["tokens"]) == choice["text"]
        # The zero state predicts the first character: each of the capitals is equally likely.
        assert scores["token_logprobs"][0] == pytest.approx(-math.log(len(NAMES)), abs=0.01)
        assert scores["text_offset"] == list(range(len(choice["text"])))


def test_item__is_the_same_with_echo_logprobs_best_of_and_penalties(client: FlaskClient) -> None:
    plain = choices(client)[0]["text"]
    assert choices(client, echo=True)[0]["text"] == plain
    assert choices(client, echo=True, logprobs=3)[0]["logprobs"] == choices(client, logprobs=3)[0]["logprobs"]
    best = choices(client, best_of=8, n=2)
    assert {choice["text"] for choice in best} <= {choice["text"] for choice in choices(client, n=8)}
    for penalty in ({"repetition_penalty": 1.3}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}):
        assert choices(client, n=4, **penalty)
    assert choices(client, logit_bias={"A": 20})[0]["text"].startswith("A")


def test_item__is_the_same_streamed(client: FlaskClient) -> None:
    expected = [choice["text"] for choice in choices(client, n=3)]
    response = client.post("/v1/completions", json=ITEM | {"n": 3, "stream": True, "logprobs": 0})
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    parts = [json.loads(line)["choices"][0] for line in lines]
    for index, text in enumerate(expected):
        own = [part for part in parts if part["index"] == index]
        assert "".join(part["text"] for part in own) == text
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == ["stop"]


def test_empty_prompt__is_scored_as_a_text_without_characters(client: FlaskClient) -> None:
    body = {"prompt": ["", "An"], "max_tokens": 0, "echo": True, "logprobs": 1}
    empty, other = ok(client.post("/v1/completions", json=body))["choices"]
    assert (empty["text"], empty["logprobs"]["tokens"], empty["logprobs"]["token_logprobs"]) == ("", [], [])
    assert (other["text"], other["logprobs"]["token_logprobs"][0]) == ("An", None)


def test_empty_session__gives_the_item_of_an_empty_prompt(client: FlaskClient) -> None:
    expected = choices(client)[0]["text"]
    session = f"/v1/sessions/{ok(client.post('/v1/sessions', json={'seed': 7}), 201)['id']}"
    following = ok(client.post(f"{session}/feed", json={"text": "", "num_next": len(NAMES)}))["next"]
    assert {entry["char"] for entry in following} == set(NAMES)
    run = {"max_tokens": 200, "stop": "\n", "position": 0}
    answer = ok(client.post(f"{session}/generate", json=run))
    assert (answer["text"], answer["finish_reason"], answer["position"]) == (expected, "stop", len(expected))
    ok(client.post(f"{session}/rewind", json={"position": 0}))
    scores = ok(client.post(f"{session}/feed", json={"text": "Ana", "logprobs": 0}))["logprobs"]
    assert scores["token_logprobs"][0] == pytest.approx(-math.log(len(NAMES)), abs=0.01)
