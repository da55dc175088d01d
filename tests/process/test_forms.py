"""Texts of a given form over HTTP: every pattern and schema of the harness, against the real server."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from service.store.model_store import ModelStore
from tests.harness.forms import FORMS, Sample
from tests.harness.models import publish_tiny
from tests.harness.server import SERVE, Server, ask, serving
from tests.harness.sse import read_events

PROMPT = "ROMEO:"
# Every character of JSON, and a few letters beyond ASCII.
CHARSET = "\n" + "".join(map(chr, range(32, 127))) + "éß€漢"
SETTINGS = [
    {"temperature": 1.5},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0},
    {"top_k": 3, "repetition_penalty": 1.5, "logit_bias": {"a": 5, "}": -50, '"': 3}},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A model that knows the characters of every form, and answers chats."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store, "forms", chat="play", charset=CHARSET)
    return store


@pytest.fixture(scope="module")
def servers(store: ModelStore, redis_url: str) -> Iterator[list[Server]]:
    """Two replicas that share their sessions."""
    environment = {
        "GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "forms", "GRU_SERVE_ENGINE_THREADS": "1",
        "GRU_SERVE_SESSION_STORE": redis_url, "GRU_SERVE_MAX_TOKENS": "200000", "GRU_SERVE_SESSION_TEXT_CHARS": "300000",
    }  # fmt: skip
    with ExitStack() as stack:
        yield [stack.enter_context(serving(SERVE, environment)) for _ in range(2)]


@pytest.fixture(scope="module")
def server(servers: list[Server]) -> Server:
    return servers[0]


def choices(server: Server, **fields: object) -> list[dict[str, Any]]:
    """The choices of a completion."""
    status, answer = server.call("POST", "/v1/completions", {"prompt": PROMPT, "seed": 7} | fields)
    assert status == 200, answer
    found: list[dict[str, Any]] = answer["choices"]
    return found


def texts(server: Server, **fields: object) -> list[str]:
    return [choice["text"] for choice in choices(server, **fields)]


def streamed(server: Server, **fields: object) -> list[dict[str, Any]]:
    """The choices of a streamed completion, put together."""
    whole: dict[int, dict[str, Any]] = {}
    with closing(server.connect()) as connection:
        ask(connection, "POST", "/v1/completions", {"prompt": PROMPT, "seed": 7, "stream": True} | fields)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for block in response.read().decode().split("\n\n"):
            if not block.startswith("data: {"):
                continue
            for part in json.loads(block.removeprefix("data: "))["choices"]:
                there = whole.setdefault(part["index"], {"text": "", "finish_reason": None})
                assert there["finish_reason"] is None
                there["text"] += part["text"]
                there["finish_reason"] = part["finish_reason"]
    return [whole[index] for index in sorted(whole)]


def fewest(server: Server, fields: dict[str, Any]) -> int:
    """The fewest characters of a form, as the refusal of too small a `max_tokens` says."""
    status, answer = server.call("POST", "/v1/completions", {"prompt": "", "max_tokens": 1} | fields)
    if status == 200:
        return len(answer["choices"][0]["text"])
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "max_tokens", "out_of_range"), error
    found = re.search(r"at least (\d+) characters", error["message"])
    assert found is not None, error
    return int(found[1])


# Long forms, of which a run writes up to 12,000 characters.
LONG: dict[str, dict[str, Any]] = {
    "numbers": {"structured_outputs": {"regex": r"(\d{1,4}, )*\d"}},
    "json": {"structured_outputs": {"json": {"type": "array", "items": {"enum": ["a", "bcd", None, 17, [], {}]}}}},
    "lines and a stop string": {"guided_regex": r"([A-Z][a-z]+ [0-9]\n\n?)+", "stop": ["\n\n\n", "Zz"]},
    "object": {"response_format": {"type": "json_object"}, "temperature": 1.3},
}
MAX_CHARS = 12_000


def follow(
    servers: list[Server], session: str, fields: dict[str, Any], rng: random.Random
) -> tuple[str, dict[str, Any]]:
    """Stream a run of a session, resuming it at the other replica after a random part; return its text and its end."""
    text, position = "", len(PROMPT)
    path = f"/v1/sessions/{session}/generate"
    with ExitStack() as left_open:
        for turn in range(10_000):
            connection = servers[turn % 2].connect()
            if turn == 0:
                ask(connection, "POST", path, fields | {"max_tokens": MAX_CHARS, "stream": True, "position": position})
            else:
                ask(connection, "GET", f"{path}?after={position}")
            # Half of the connections are left while the server still writes; the other half are taken over.
            (left_open.callback if rng.random() < 0.5 else left_open.callback)(connection.close)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for event in read_events(response):
                if event.kind == "done":
                    return text, event.data
                assert event.kind == "text", event
                text, position = text + event.data["text"], event.id
                assert position == len(PROMPT) + len(text)
                if rng.random() < 0.4:
                    break
            if rng.random() < 0.5:
                connection.close()
    raise AssertionError("the run has no end")


@pytest.mark.parametrize("name", LONG)
def test_run__resumed_at_other_replicas_is_the_completion(servers: list[Server], name: str) -> None:
    whole = choices(servers[0], max_tokens=MAX_CHARS, **LONG[name])[0]
    assert servers[0].call("PUT", f"/v1/sessions/{name.split()[0]}", {"text": PROMPT, "seed": 7})[0] == 201
    text, end = follow(servers, name.split()[0], LONG[name], random.Random(3))
    assert (text, end["finish_reason"]) == (whole["text"], whole["finish_reason"])
