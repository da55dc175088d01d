"""Texts of a given form over HTTP: every pattern and schema of the harness, against the real server."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, closing
from typing import Any

import jsonschema
import pytest

from service.client import AsyncClient, Client, InvalidRequest, Message, ResponseFormat, StructuredOutputs
from service.store.model_store import ModelStore
from tests.harness.forms import CHARSET, PATTERNS, SCHEMAS
from tests.harness.models import publish_tiny
from tests.harness.server import SERVE, Server, ask, serving
from tests.harness.sse import read_events

PROMPT = "ROMEO:"
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.5},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0},
    {"top_k": 3, "repetition_penalty": 1.5, "logit_bias": {"a": 5, "}": -50, '"': 3}},
]

PERSON: ResponseFormat = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMAS["person"]}}


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
        "GRU_SERVE_SESSION_STORE": redis_url, "GRU_SERVE_MAX_TOKENS": "200000",
        "GRU_SERVE_SESSION_TEXT_CHARS": "300000",
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


FORMS: dict[str, dict[str, Any]] = {
    **{name: {"structured_outputs": {"regex": pattern}} for name, pattern in PATTERNS.items()},
    **{
        name: {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
        for name, schema in SCHEMAS.items()
    },
    "any object": {"response_format": {"type": "json_object"}},
    "choices": {"structured_outputs": {"choice": ["", "a", "ab", "abc", "Zürich", "日本", "a\n\nb", *"xyz"]}},
}


def has_form(name: str, text: str) -> bool:
    """Whether a text is of a form, according to the libraries that define it."""
    if name in PATTERNS:
        return re.fullmatch(PATTERNS[name], text) is not None
    if name == "choices":
        return text in FORMS[name]["structured_outputs"]["choice"]
    value = json.loads(text)
    if name == "any object":
        return isinstance(value, dict)
    schema = SCHEMAS[name]
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return bool(validator(schema, format_checker=validator.FORMAT_CHECKER).is_valid(value))


@pytest.mark.parametrize("name", FORMS)
def test_texts__are_of_their_form_whole_and_streamed_and_in_sessions(servers: list[Server], name: str) -> None:
    """With several seeds and settings, and with as few characters as suffice."""
    server, other = servers
    fields, rng = FORMS[name], random.Random(name)
    least = fewest(server, fields)
    assert 0 <= least < 300
    seen: set[str] = set()
    for place, more in enumerate((0, 1, 7, 60, 400)):
        sent: dict[str, Any] = {"max_tokens": max(1, least + more), "seed": rng.randrange(2**60)} | SETTINGS[
            place % len(SETTINGS)
        ]
        whole = choices(server, n=4, **fields, **sent)
        for choice in whole:
            assert has_form(name, choice["text"]), choice
            assert len(choice["text"]) == sent["max_tokens"] or choice["finish_reason"] == "stop", choice
            assert len(choice["text"]) <= sent["max_tokens"]
        outcomes = [{key: choice[key] for key in ("text", "finish_reason")} for choice in whole]
        assert streamed(server, n=4, **fields, **sent) == outcomes
        seen.update(choice["text"] for choice in whole)
        # Beside other texts, and in a session that the other replica has created.
        together = choices(server, prompt=["JULIET:", PROMPT, ""], **fields, **sent)
        assert together[1]["text"] == whole[0]["text"]
        session = f"{list(FORMS).index(name)}-{place}"
        assert other.call("PUT", f"/v1/sessions/{session}", {"text": PROMPT, "seed": sent["seed"]})[0] == 201
        run = {"max_tokens": sent["max_tokens"], "position": len(PROMPT)} | fields | SETTINGS[place % len(SETTINGS)]
        for replica in (server, other):  # the second one repeats the request
            status, answer = replica.call("POST", f"/v1/sessions/{session}/generate", run)
            assert status == 200, answer
            assert {key: answer[key] for key in ("text", "finish_reason")} == outcomes[0]
    assert len(seen) > 1 or name == "constant"
    if least > 1:
        status, answer = server.call("POST", "/v1/completions", {"prompt": "", "max_tokens": least - 1} | fields)
        assert (status, answer["error"]["param"]) == (400, "max_tokens")
        assert f"at least {least} characters" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["dialogue", "list of records", "any object", "choices"])
def test_chat__has_a_form_whatever_strings_end_its_answers(server: Server, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "Who goes there?"}], "max_tokens": 200, "n": 8} | FORMS[name]
    for temperature in (1.0, 2.0):
        status, answer = server.call("POST", "/v1/chat/completions", body | {"temperature": temperature, "seed": 3})
        assert status == 200, answer
        for choice in answer["choices"]:
            assert has_form(name, choice["message"]["content"]), choice


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
            left_open.callback(connection.close)
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
                connection.close()  # the run is left; the others are taken over
    raise AssertionError("the run has no end")


@pytest.mark.parametrize("name", LONG)
def test_run__resumed_at_other_replicas_is_the_completion(servers: list[Server], name: str) -> None:
    whole = choices(servers[0], max_tokens=MAX_CHARS, **LONG[name])[0]
    assert servers[0].call("PUT", f"/v1/sessions/{name.split()[0]}", {"text": PROMPT, "seed": 7})[0] == 201
    text, end = follow(servers, name.split()[0], LONG[name], random.Random(3))
    assert (text, end["finish_reason"]) == (whole["text"], whole["finish_reason"])


def test_clients__send_forms_and_get_the_same_texts(server: Server) -> None:
    """Whole and streamed completions, chats, runs of sessions and suggestions, with and without asyncio."""
    url, code, schema = f"http://127.0.0.1:{server.port}", r"[A-Z]{2}\d{3,9}", SCHEMAS["person"]
    outputs: StructuredOutputs = {"regex": code}
    question: list[Message] = [{"role": "user", "content": "Who?"}]

    async def awaited() -> list[str]:
        async with AsyncClient(url) as client:
            whole = await client.complete(PROMPT, seed=7, structured_outputs=outputs)
            async with aclosing(client.stream(PROMPT, seed=7, structured_outputs=outputs)) as pieces:
                text = "".join([piece.text async for piece in pieces])
            chat = await client.chat(question, max_tokens=200, seed=7, response_format=PERSON)
            session = await client.create(PROMPT, seed=7)
            async with aclosing(session.generate(structured_outputs=outputs)) as parts:
                run = "".join([part async for part in parts])
            found = await session.suggest(2, structured_outputs={"choice": ["yes", "no", "maybe"]})
            return [whole.text, text, chat.text, run, *(one.text for one in found.texts)]

    with Client(url) as client:
        whole = client.complete(PROMPT, seed=7, structured_outputs=outputs)
        text = "".join(piece.text for piece in client.stream(PROMPT, seed=7, structured_outputs=outputs))
        chat = client.chat(question, max_tokens=200, seed=7, response_format=PERSON)
        session = client.create(PROMPT, seed=7)
        run = "".join(session.generate(structured_outputs=outputs))
        found = session.suggest(2, structured_outputs={"choice": ["yes", "no", "maybe"]})
        with pytest.raises(InvalidRequest) as refused:
            "".join(session.generate(4, structured_outputs=outputs))
    assert re.fullmatch(code, whole.text)
    assert whole.text == text == run
    jsonschema.validate(json.loads(chat.text), schema)
    assert {one.text for one in found.texts} < {"yes", "no", "maybe"}
    assert (refused.value.param, " 5 characters" in str(refused.value)) == ("max_tokens", True)
    assert asyncio.run(awaited()) == [whole.text, text, chat.text, run, *(one.text for one in found.texts)]
