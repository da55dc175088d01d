"""Chats and embeddings of the real process, read by the real `openai` client."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from service.errors import InvalidSettings
from service.generation.reader import step
from service.model.chat_template import PRESETS
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.application import client_of, ok
from tests.harness.application import refused as refusal
from tests.harness.models import TINY_CHARSET, loaded_model, publish_tiny
from tests.harness.server import SERVE, Server, ask, serving

PLAY = PRESETS["play"]
ASKED: dict[str, object] = {"role": "user", "content": "Are you there?"}
TEXT = {"type": "text", "text": "Are you there?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
UNSUPPORTED, UNKNOWN = "unsupported_value", "unknown_field"
CHAT = {"model": "tiny", "messages": [ASKED], "max_tokens": 60, "seed": 7}
PROMPT = "ROMEO:\nAre you there?\n\nJULIET:\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """`tiny` and `deep` answer chats; `plain` has no template."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store, chat="play")
    publish_tiny(store, "deep", chat="lines", num_layers=3)
    publish_tiny(store, "plain")
    publish_tiny(store, "wide", chat="play", charset=TINY_CHARSET + "".join(map(chr, range(0x4E00, 0x4E00 + 200))))
    return store


@pytest.fixture(scope="module")
def server(store: ModelStore) -> Iterator[Server]:
    environment = {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "tiny"}
    environment |= {"GRU_SERVE_MAX_PROMPT_CHARS": "3000", "GRU_SERVE_MAX_TOKENS": "2000"}
    with serving(SERVE, environment) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(server: Server, **changes: object) -> dict[str, Any]:
    status, answer = server.call("POST", "/v1/chat/completions", CHAT | changes)
    assert status == 200, answer
    return answer


def said(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def refused(server: Server, path: str, body: dict[str, object]) -> tuple[str, str]:
    """Return code and param of a refusal."""
    status, answer = server.call("POST", path, body)
    assert status == 400, answer
    return answer["error"]["code"], answer["error"]["param"]


# Chats


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"temperature": 0.5, "top_p": 0.9, "max_tokens": 300},
        {"stop": ["a", "b"], "temperature": 1.5},
        {"logit_bias": {"e": 5}, "presence_penalty": 0.5, "frequency_penalty": 0.5, "top_k": 10},
        {"temperature": 0, "max_tokens": 200},
        {"min_tokens": 50, "stop_token_ids": [22, 23], "include_stop_str_in_output": True},
        {"allowed_token_ids": [*range(20, 40)], "max_tokens": 30},
    ],
)
def test_chat__is_the_completion_of_the_text_that_the_template_writes(server: Server, fields: dict[str, Any]) -> None:
    answer = chat(server, **fields)
    stop = [*PLAY.stop, *fields.get("stop", [])]
    body = {"model": "tiny", "prompt": PROMPT, "seed": 7, "max_tokens": 60} | fields | {"stop": stop}
    status, plain = server.call("POST", "/v1/completions", body)
    assert status == 200, plain
    assert said(answer) == [choice["text"] for choice in plain["choices"]]
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    assert reasons == [choice["finish_reason"] for choice in plain["choices"]]
    assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["system_fingerprint"].startswith(plain["system_fingerprint"] + "_")


def test_chat__has_openais_shape(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, user="me", n=2)  # type: ignore[call-overload]
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny@1")
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream__has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = CHAT | {"n": 2, "max_tokens": 800, "temperature": 0.8}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *texts, last = chunks
    for choice in whole.choices:
        parts = [part for chunk in texts for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].system_fingerprint == whole.system_fingerprint
    assert (last.choices, all(chunk.usage is None for chunk in texts)) == ([], True)
    assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})


def test_stream__has_the_usage_so_far_in_every_event_on_request(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    settings: dict[str, Any] = CHAT | {"max_tokens": 2000, "stream": True, "stream_options": options}
    usages = [chunk.usage for chunk in client.chat.completions.create(**settings)]
    counts = [usage.completion_tokens for usage in usages if usage]
    assert len(counts) == len(usages) > 1
    assert counts == sorted(counts)


def test_stream__ends_with_done(server: Server) -> None:
    connection = server.connect()
    try:
        ask(connection, "POST", "/v1/chat/completions", CHAT | {"stream": True})
        lines = connection.getresponse().read().decode().split("\n\n")
    finally:
        connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(lines[0].removeprefix("data: "))


def test_logprobs__are_those_of_the_completion_in_the_shape_of_chats(client: openai.OpenAI, server: Server) -> None:
    settings: dict[str, Any] = CHAT | {"logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**settings).choices[0]
    body = {"model": "tiny", "prompt": PROMPT, "seed": 7, "max_tokens": 60, "stop": PLAY.stop, "logprobs": 3}
    plain = server.call("POST", "/v1/completions", body)[1]["choices"][0]
    assert choice.message.content
    assert choice.logprobs
    assert choice.logprobs.content
    scored = choice.logprobs.content
    assert "".join(one.token for one in scored) == choice.message.content == plain["text"]
    assert [one.logprob for one in scored] == plain["logprobs"]["token_logprobs"]
    assert all(one.bytes == list(one.token.encode()) for one in scored)
    for one, top in zip(scored, plain["logprobs"]["top_logprobs"], strict=True):
        assert len(one.top_logprobs) == 3
        assert {other.token: other.logprob for other in one.top_logprobs} | {one.token: one.logprob} == top
    streamed = client.chat.completions.create(**settings, stream=True)
    parts = [part.choices[0].logprobs for part in streamed]
    assert list(itertools.chain.from_iterable(part.content or [] for part in parts if part)) == scored
    plainly = client.chat.completions.create(**CHAT, logprobs=True).choices[0].logprobs  # type: ignore[call-overload]
    assert all(one.top_logprobs == [] for one in plainly.content)
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None  # type: ignore[call-overload]


def test_messages__of_every_form_are_written_by_the_template(server: Server) -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "street."}]},
        {"role": "user", "content": "Who?", "name": "TITUS"},
        {"role": "assistant", "content": "I.", "refusal": None, "name": "LUCIUS"},
        ASKED,
    ]
    prompt = "Be brief.\n\nA street.\n\nTITUS:\nWho?\n\nLUCIUS:\nI.\n\nROMEO:\nAre you there?\n\nLUCIUS:\n"
    body = {"model": "tiny", "prompt": prompt, "seed": 7, "max_tokens": 60, "stop": PLAY.stop}
    found = server.call("POST", "/v1/completions", body | {"unknown_chars": "fold_drop"})[1]
    answer = chat(server, messages=messages)
    assert said(answer) == [found["choices"][0]["text"]]
    assert answer["usage"]["prompt_tokens"] == found["usage"]["prompt_tokens"]


def test_messages__the_next_turn_reads_only_what_is_new(server: Server) -> None:
    first = chat(server, max_tokens=2000, logit_bias={"\n": 3})
    assert first["choices"][0]["finish_reason"] == "stop"
    history = [ASKED, {"role": "assistant", "content": said(first)[0]}]
    second = chat(server, messages=[*history, {"role": "user", "content": "What?"}])["usage"]
    read_before = first["usage"]["total_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] == read_before
    assert second["prompt_tokens"] == read_before + len("ROMEO:\nWhat?\n\nJULIET:\n")


def test_messages__may_be_1024_with_all_that_an_answer_has(server: Server) -> None:
    message: dict[str, object] = {"role": "assistant", "content": "I", "name": "I", "refusal": None, "annotations": []}
    messages = [message | {"tool_calls": None, "audio": None}] * 1023 + [dict(ASKED)]
    answer = chat(server, model="deep", messages=messages, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 1023 * len("I\n") + len("Are you there?\n")
    assert refused(server, "/v1/chat/completions", CHAT | {"messages": [ASKED] * 1025}) == ("out_of_range", "messages")


def test_messages__an_unfinished_answer_is_continued(server: Server) -> None:
    whole = said(chat(server, temperature=0.8, max_tokens=40))[0]
    messages = [ASKED, {"role": "assistant", "content": whole}]
    on = chat(server, messages=messages, continue_final_message=True, add_generation_prompt=False, max_tokens=30)
    body = {"model": "tiny", "prompt": PROMPT + whole, "seed": 7, "max_tokens": 30, "stop": PLAY.stop}
    assert said(on) == [server.call("POST", "/v1/completions", body)[1]["choices"][0]["text"]]
    assert said(chat(server, messages=messages, continue_final_message=True, max_tokens=30)) == said(on)
    free = chat(server, messages=[ASKED], add_generation_prompt=False)
    assert free["usage"]["prompt_tokens"] == len("ROMEO:\nAre you there?\n\n")


def test_unknown_characters__are_folded_or_left_out_by_default(server: Server) -> None:
    plain = chat(server, messages=[{"role": "user", "content": "Who's there, Romeo?"}])
    sent = [{"role": "user", "content": "🎭Who’s there, Roméo漢?"}]
    assert said(chat(server, messages=sent, stop=["🎭"])) == said(plain) != []
    named = chat(server, messages=[{"role": "user", "content": "Who's there, Romeo?", "name": "漢"}])
    assert said(named) == said(plain)


@pytest.mark.parametrize(
    ("unknown", "name"),
    [("fold", "漢"), ("drop", "漢"), ("drop", "é"), ("drop", "\N{LINE SEPARATOR}"), ("fold_drop", "漢")],
)
def test_name__of_which_no_character_is_left_is_replaced_by_the_templates(
    server: Server, unknown: str, name: str
) -> None:
    for role in ("user", "assistant"):
        plain, named = ({"role": role, "content": "Who?"} | more for more in ({}, {"name": name}))
        answers = [chat(server, messages=[ASKED, one], unknown_chars=unknown) for one in (plain, named)]
        assert said(answers[0]) == said(answers[1])
        assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("message", "unknown", "path", "position"),
    [
        ({"content": "Who’s there?"}, "error", "content", 3),
        ({"content": [TEXT, {"type": "text", "text": " é"}]}, "error", "content", len("Are you there? ")),
        ({"content": "Who?", "name": "Bö"}, "error", "name", 1),
        ({"content": "Who?", "name": "B漢"}, "fold", "name", 1),
    ],
)
def test_unknown_character__is_named_by_its_message_and_its_position_there(
    server: Server, message: dict[str, object], unknown: str, path: str, position: int
) -> None:
    messages = [ASKED, {"role": "user"} | message]
    body = CHAT | {"messages": messages, "unknown_chars": unknown}
    assert refused(server, "/v1/chat/completions", body) == ("unknown_characters", f"messages[1].{path}")
    error = server.call("POST", "/v1/chat/completions", body)[1]["error"]
    assert f") at {position}" in error["message"]


def test_max_tokens__has_two_names_and_a_default_within_the_limit(server: Server) -> None:
    never = {"logit_bias": {"\n": -100}}
    plain = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    status, answer = server.call("POST", "/v1/chat/completions", plain | never)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1024)
    status, answer = server.call("POST", "/v1/chat/completions", plain | never | {"max_completion_tokens": 30})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 30)
    assert chat(server, **never, max_completion_tokens=60)["usage"]["completion_tokens"] == 60
    path = "/v1/chat/completions"
    long = {"max_completion_tokens": 1500, "min_tokens": 1200}
    status, answer = server.call("POST", path, plain | long | {"logit_bias": {"\n": 5}})
    assert (status, answer["usage"]["completion_tokens"] >= 1200) == (200, True)
    assert refused(server, path, CHAT | {"max_completion_tokens": 61}) == ("out_of_range", "max_tokens")
    assert refused(server, path, plain | {"max_completion_tokens": 2001})[1] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"messages": []}, "out_of_range", "messages"),
        ({"messages": [ASKED] * 300}, "out_of_range", "messages"),
        ({"messages": [{"role": "user", "content": "a" * 3001}]}, "out_of_range", "messages"),
        ({"top_logprobs": 2}, "out_of_range", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "out_of_range", "stream_options"),
        ({"n": 129}, "out_of_range", "n"),
        ({"continue_final_message": True}, "out_of_range", "continue_final_message"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "out_of_range",
            "add_generation_prompt",
        ),
        ({"model": "plain"}, "no_chat_template", "model"),
        ({"logprobs": True, "top_logprobs": 21}, "out_of_range", "top_logprobs"),
        (
            {"messages": [ASKED, ASKED, {"role": "user", "content": [IMAGE]}]},
            UNSUPPORTED,
            "messages[2].content[0].type",
        ),
        (
            {"messages": [ASKED, {"role": "user", "content": [TEXT, TEXT | {"x": 1}]}]},
            UNKNOWN,
            "messages[1].content[1].x",
        ),
        ({"messages": [ASKED, {"role": "tool", "content": "4"}]}, UNSUPPORTED, "messages[1].role"),
        ({"messages": [{"role": "users", "content": "4"}]}, "out_of_range", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "missing_field", "messages[0].content"),
        ({"messages": [ASKED | {"name": "a\nb"}]}, "out_of_range", "messages[0].name"),
        ({"messages": [ASKED | {"contents": "a"}]}, UNKNOWN, "messages[0].contents"),
        ({"messages": [ASKED | {"tool_calls": [{"id": "1"}]}]}, UNSUPPORTED, "messages[0].tool_calls"),
        ({"messages": "Hello"}, "wrong_type", "messages"),
        ({"tools": [{"type": "function"}]}, UNSUPPORTED, "tools"),
        ({"tool_choice": "required"}, UNSUPPORTED, "tool_choice"),
        ({"functions": [{"name": "f"}]}, UNSUPPORTED, "functions"),
        ({"response_format": {"type": "xml"}}, "out_of_range", "response_format.type"),
        ({"modalities": ["text", "audio"]}, UNSUPPORTED, "modalities"),
        ({"audio": {"voice": "alloy"}}, UNSUPPORTED, "audio"),
        ({"chat_template": "{{ messages }}"}, UNSUPPORTED, "chat_template"),
        ({"logprobs": 5}, "wrong_type", "logprobs"),
        ({"prompt": "ROMEO:"}, UNKNOWN, "prompt"),
        ({"min_tokens": 61}, "out_of_range", "min_tokens"),
        (
            {"model": "wide", "stop": ["a", "b", "c", "d"], "stop_token_ids": [*range(60, 188)]},
            "out_of_range",
            "stop_token_ids",
        ),
        ({"return_token_ids": True}, UNSUPPORTED, "return_token_ids"),
    ],
)
def test_chat__refuses_what_it_cant_answer(server: Server, changes: dict[str, object], code: str, param: str) -> None:
    assert refused(server, "/v1/chat/completions", CHAT | changes) == (code, param)


# Bodies as clients send them, besides messages and model.
CLIENTS: dict[str, dict[str, Any]] = {
    "langchain": {"n": 1, "temperature": 1.0, "stream": False, "max_completion_tokens": 60, "tools": [], "stop": None}
    | {"parallel_tool_calls": False, "tool_choice": "none", "logprobs": False},
    "open webui": {"stream": False, "metadata": {"chat": "1"}, "user": "me", "seed": 7, "tool_choice": "auto"},
    "litellm": {"functions": [], "function_call": "none", "response_format": {"type": "text"}},
    "vercel": {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "reasoning_effort": "low"},
    "lm-eval": {"stop": ["\n\n"], "seed": 7.0, "max_tokens": 60},
    "vllm bench": {"ignore_eos": True, "repetition_penalty": 1.0, "stream_options": None, "chat_template_kwargs": {}},
    "openai": {"store": False, "modalities": ["text"], "service_tier": "auto", "prediction": None, "audio": None},
    "llm": {"stream": False, "verbosity": "medium", "logit_bias": {}},
}  # fmt: skip


@pytest.mark.parametrize("sent", CLIENTS.values(), ids=CLIENTS)
def test_clients__are_answered_as_without_their_extra_fields(server: Server, sent: dict[str, Any]) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens" or "max_completion_tokens" not in sent}
    status, answer = server.call("POST", "/v1/chat/completions", body | sent)
    assert status == 200, answer
    assert said(answer) == said(chat(server))


def test_messages__of_an_answer_may_be_sent_back_as_they_are(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    for message in (first.choices[0].message, first.choices[0].message.model_dump()):
        second = client.chat.completions.create(**CHAT | {"messages": [ASKED, message, ASKED]})  # type: ignore[call-overload]
        assert second.choices[0].message.role == "assistant"


def test_version_without_a_template__says_how_to_give_it_one(server: Server) -> None:
    status, answer = server.call("POST", "/v1/chat/completions", CHAT | {"model": "plain"})
    assert status == 400
    assert "gru-serve models chat plain@1 play" in answer["error"]["message"]


# Embeddings


def embeddings(server: Server, **body: object) -> list[Any]:
    status, answer = server.call("POST", "/v1/embeddings", {"model": "tiny"} | body)
    assert status == 200, answer
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


def as_floats(vectors: list[Any]) -> Any:
    return np.array(vectors, np.float32)


@pytest.mark.parametrize("model", ["tiny", "deep"])
def test_embeddings__are_the_normalised_states_of_the_top_layer(server: Server, store: ModelStore, model: str) -> None:
    text = "Are you there? " * 20  # longer than one segment
    last, mean = (as_floats(embeddings(server, model=model, input=text, pooling=how))[0] for how in ("last", "mean"))
    with loaded_model(store, model) as loaded:
        ids = loaded.charset.encode(text)
        positions = tuple(range(1, len(ids) + 1))
        end, _ = step(loaded, ids, checkpoint_positions=positions)
        states = np.stack([end.checkpoints[position][-1] for position in positions]).astype(np.float64)
    for found, state in ((last, states[-1]), (mean, states.mean(0))):
        assert np.allclose(found, state / np.linalg.norm(state), atol=1e-7)
        assert np.isclose(np.linalg.norm(found.astype(np.float64)), 1, atol=1e-6)
    assert not np.array_equal(last, mean)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings__of_a_batch_are_those_of_each_text_alone(server: Server, pooling: str) -> None:
    texts = ["Are you there?", "a", *(f"I go {'on and ' * number}{chr(97 + number)}" for number in range(26))]
    together = as_floats(embeddings(server, input=texts, pooling=pooling))
    alone = as_floats([embeddings(server, input=text, pooling=pooling, cache_salt="x")[0] for text in texts[:6]])
    assert np.array_equal(together[:6], alone)
    assert np.array_equal(as_floats(embeddings(server, input=texts[::-1], pooling=pooling))[::-1], together)
    assert len(np.unique(together, axis=0)) == len(texts)


def test_embeddings__in_base64_have_the_same_bits(server: Server, client: openai.OpenAI) -> None:
    texts = ["Are you there?", "I."]
    numbers = as_floats(embeddings(server, input=texts))
    coded = [
        np.frombuffer(base64.b64decode(one), "<f4") for one in embeddings(server, input=texts, encoding_format="base64")
    ]
    assert np.array_equal(np.stack(coded), numbers)
    answer = client.embeddings.create(model="tiny", input=texts, dimensions=16, user="me")
    assert np.array_equal(as_floats([one.embedding for one in answer.data]), numbers)
    assert (answer.model, answer.object, answer.usage.prompt_tokens) == ("tiny@1", "list", 16)
    listed = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert np.array_equal(as_floats([one.embedding for one in listed.data]), numbers)


def test_embeddings__read_ids_and_fold_by_default(server: Server, store: ModelStore) -> None:
    with loaded_model(store) as loaded:
        ids = loaded.charset.encode("Are you").tolist()
    plain = as_floats(embeddings(server, input="Are you"))
    assert np.array_equal(as_floats(embeddings(server, input=ids)), plain)
    assert np.array_equal(as_floats(embeddings(server, input=[ids, ids[:3]]))[:1], plain)
    assert np.array_equal(as_floats(embeddings(server, input="Aré yóu漢")), plain)


def test_embeddings__of_two_thousand_texts_are_one_request(server: Server) -> None:
    for text in ("Who?", [1], [1, 2, 3]):
        vectors = embeddings(server, input=[text] * 2048, encoding_format="base64", user="me")
        assert len(vectors) == 2048
        assert len(set(vectors)) == 1


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": ""}, "out_of_range", "input"),
        ({"input": ["a", ""]}, "out_of_range", "input[1]"),
        ({"input": ["漢"]}, "out_of_range", "input[0]"),
        ({"input": "é漢", "unknown_chars": "error"}, "unknown_characters", "input"),
        ({"input": ["a", "a" * 3001]}, "out_of_range", "input[1]"),
        ({"input": [15339, 856]}, "out_of_range", "input[0]"),
        ({"input": [10**9]}, "out_of_range", "input[0]"),
        ({"input": 5}, "wrong_type", "input"),
        ({"input": [[1], [1, -1]]}, "out_of_range", "input[1][1]"),
        ({"input": "a", "dimensions": 8}, "out_of_range", "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "out_of_range", "encoding_format"),
        ({"input": ["a"] * 2049}, "out_of_range", "input"),
        ({"input": ["a", 5]}, "wrong_type", "input[1]"),
        ({"input": [1, "a"]}, "wrong_type", "input[1]"),
        ({"input": []}, "out_of_range", "input"),
        ({"inputs": "a", "input": "a"}, "unknown_field", "inputs"),
        ({"input": "a", "model": "no"}, "model_not_found", "model"),
    ],
)
def test_embeddings__refuse_what_they_cant_read(
    server: Server, changes: dict[str, object], code: str, param: str
) -> None:
    status, answer = server.call("POST", "/v1/embeddings", {"model": "tiny"} | changes)
    assert (status in (400, 404), answer["error"]["code"], answer["error"]["param"]) == (True, code, param), answer


# Settings


def test_chat_template__of_the_server_serves_versions_that_have_none(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "signs", charset="ab\n")
    publish_tiny(store, "lines", chat="lines")
    settings = Settings(model_store=tmp_path, model="tiny", chat_template="play", log_level="error")
    with client_of(settings) as client:
        found = {
            name: client.post("/v1/chat/completions", json=CHAT | {"model": name})
            for name in ("tiny", "signs", "lines")
        }
        prompts = {"tiny": PROMPT, "lines": "Are you there?\n"}
        for name, prompt in prompts.items():
            assert ok(found[name])["usage"]["prompt_tokens"] == len(prompt)
        error = refusal(found["signs"], 400, "no_chat_template", "model")
        assert "':' (U+003A)" in error["message"]


def test_chat_template__that_cant_be_read_stops_the_start(tmp_path: Path, tiny_store: ModelStore) -> None:
    (tmp_path / "chat.json").write_text("{}")
    for word, reason in (("paly", "there is no file 'paly'"), (str(tmp_path / "chat.json"), r"chat\.json: user")):
        settings = Settings(model_store=tiny_store.root, model="tiny", chat_template=word, log_level="error")
        with pytest.raises(InvalidSettings, match=f"GRU_SERVE_CHAT_TEMPLATE: .*{reason}"):
            create_app(settings)


def test_embeddings__share_the_memory_for_numbers(tiny_store: ModelStore) -> None:
    """Of 1,000 numbers one client may have 500 at a time: 31 vectors of 16 units."""
    settings = Settings(model_store=tiny_store.root, model="tiny", max_scores=1000, log_level="error")
    with client_of(settings) as client:
        for _ in range(3):  # what an answer has reserved is given back
            assert len(ok(client.post("/v1/embeddings", json={"input": ["a"] * 31}))["data"]) == 31
        refusal(client.post("/v1/embeddings", json={"input": ["a"] * 32}), 400, "out_of_range", "input")
