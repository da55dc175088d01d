"""POST /v1/completions: answers in OpenAI's shape, and errors that name the bad field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi import OpenAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.handle import Handle
from service.errors import EngineFailed
from service.generation.portable_states import PortableStates
from service.registry.loaded_models import LoadedModels
from service.sessions.portable import StateSealer
from service.settings import Settings
from service.shares import SharedBudget
from service.store.model_store import ModelStore
from service.web.api.completions.routes import CompletionLimits, CompletionRoutes
from service.web.api.completions.schemas import CompletionAnswer, CompletionBody
from service.web.gate.admission import AdmissionLimit
from service.web.gate.error_responses import register_error_handlers
from tests.harness.application import client_of, ok, refused
from tests.harness.models import TINY_CHARSET, engine_settings, publish_tiny

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 20, "seed": 7}


def complete(client: FlaskClient, **changes: Any) -> Any:
    """The answer to `GOOD` with some fields changed."""
    return ok(client.post("/v1/completions", json=GOOD | changes))


def test_completion__has_openais_shape(client: FlaskClient) -> None:
    answer = complete(client)
    text = answer["choices"][0]["text"]
    assert len(text) == 20
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "text_completion",
        "model": "tiny@1",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 20,
            "total_tokens": 26,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_seed__determines_the_text(client: FlaskClient) -> None:
    texts = [complete(client, seed=seed)["choices"][0]["text"] for seed in (7, 7, -7, 2**63 - 1, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 5


def test_model__gives_the_same_text_under_each_of_its_names(client: FlaskClient) -> None:
    texts = {complete(client, model=ref)["choices"][0]["text"] for ref in ("tiny", "tiny@1", "tiny@latest", None)}
    assert len(texts) == 1


def test_stop__ends_the_text_and_is_not_part_of_it(client: FlaskClient) -> None:
    whole = complete(client, max_tokens=100)["choices"][0]["text"]
    for stop in (whole[30:32], [whole[30:32]], ["zzzz", whole[30:32]]):
        answer = complete(client, max_tokens=100, stop=stop)
        choice = answer["choices"][0]
        assert choice["text"] == whole[: whole.index(whole[30:32])]
        assert choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(choice["text"]) + 2


def test_sampling_settings__that_leave_one_character_are_greedy(client: FlaskClient) -> None:
    greedy = {complete(client, seed=seed, temperature=0)["choices"][0]["text"] for seed in range(3)}
    also = {complete(client, seed=1, **how)["choices"][0]["text"] for how in ({"top_k": 1}, {"top_p": 1e-9})}
    assert len(greedy) == 1
    assert greedy == also


def test_unknown_chars__are_refused_dropped_or_folded(client: FlaskClient) -> None:
    response = client.post("/v1/completions", json=GOOD | {"prompt": "Romé→"})
    error = response.get_json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("unknown_characters", "prompt")
    assert "'é' (U+00E9) at 3" in error["message"]
    dropped = complete(client, prompt="Romé→", unknown_chars="drop")
    assert dropped["usage"]["prompt_tokens"] == 3
    folded = complete(client, prompt="Romé", unknown_chars="fold")
    assert folded["choices"] == complete(client, prompt="Rome")["choices"]


def test_null__is_the_same_as_a_missing_field(client: FlaskClient) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "top_k", "stop", "user", "n", "stream", "unknown_chars", "model"))
    assert complete(client, **nulls)["choices"] == complete(client)["choices"]
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_openais_fields__with_neutral_values_are_accepted(client: FlaskClient) -> None:
    nothing: dict[str, Any] = {"best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0}
    nothing |= {"logit_bias": {}, "stream_options": None, "suffix": None, "n": 1, "stream": False, "user": "me"}
    assert complete(client, **nothing)["choices"] == complete(client)["choices"]


def test_prompt__that_folding_makes_too_long_is_refused(client: FlaskClient) -> None:
    response = client.post("/v1/completions", json=GOOD | {"prompt": "\u2168" * 900, "unknown_chars": "fold"})
    error = response.get_json()["error"]
    assert response.status_code == 400  # folding makes two characters, ix, of the Roman numeral nine
    assert (error["code"], error["param"]) == ("out_of_range", "prompt")
    assert "after folding" in error["message"]
    assert complete(client, prompt="\u2168" * 500, unknown_chars="fold")["usage"]["prompt_tokens"] == 1000


def events(client: FlaskClient, **changes: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked to have the shape of an answer. The final [DONE] is checked and left out."""
    response = client.post("/v1/completions", json=GOOD | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    assert response.content_type == "text/event-stream; charset=utf-8"
    assert response.headers["X-Accel-Buffering"] == "no"
    *parts, end = response.text.split("\n\n")
    assert end == ""
    assert all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
    for chunk in chunks:
        CompletionAnswer.model_validate({"usage": None} | chunk)
    return chunks


def test_stream__is_the_answer_in_parts(client: FlaskClient) -> None:
    whole = complete(client, max_tokens=300)
    parts = events(client, max_tokens=300)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len({part["id"] for part in parts}) == 1
    assert all("usage" not in part for part in parts)


def test_stream__reports_its_usage_if_requested(client: FlaskClient) -> None:
    parts = events(client, stream_options={"include_usage": True})
    assert [part["usage"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 20
    assert events(client, stream_options={"include_usage": False})[-1]["choices"] != []


def test_stream__has_the_log_probabilities_of_the_whole_answer(client: FlaskClient) -> None:
    how = {"echo": True, "logprobs": 2, "n": 2, "max_tokens": 60, "stop": ["e", "the"]}
    whole = complete(client, **how)
    for index, choice in enumerate(whole["choices"]):
        parts = [part["choices"][0] for part in events(client, **how) if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        scored = [part["logprobs"] for part in parts if part["logprobs"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in scored for value in part[name] or []] == choice["logprobs"][name]


def test_stream__ends_with_the_error_that_stopped_it(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineFailed("the engine has failed")

    for name in ("read", "read_whole"):
        monkeypatch.setattr(Handle, name, fail)
    text = client.post("/v1/completions", json=GOOD | {"stream": True}).text
    assert text.startswith("event: error\ndata: {")
    assert "retry" not in text  # only a session's stream can be resumed
    assert json.loads(text.split("data: ")[1])["error"]["code"] == "engine_failed"
    assert "[DONE]" not in text
    response = client.post("/v1/completions", json=GOOD)
    assert response.status_code == 503
    assert response.headers["Retry-After"]


def test_logprobs__have_openais_shape(client: FlaskClient) -> None:
    choice = complete(client, echo=True, logprobs=2)["choices"][0]
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == choice["text"]
    assert scores["text_offset"] == list(range(26))
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert all(value < 0 for value in scores["token_logprobs"][1:])
    for char, value, top in zip(
        *(scores[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[char] == value
        assert 2 <= len(top) <= 3
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None
    own = complete(client, logprobs=2)["choices"][0]["logprobs"]
    assert own["token_logprobs"] == scores["token_logprobs"][6:]
    assert own["text_offset"] == list(range(20))


def test_logprobs__do_not_depend_on_sampling_settings(client: FlaskClient) -> None:
    greedy = complete(client, temperature=0, logprobs=1, logit_bias={"e": -3.0})["choices"][0]
    scored = complete(client, prompt="ROMEO:" + greedy["text"], echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert scored["text"] == "ROMEO:" + greedy["text"]
    assert scored["logprobs"]["token_logprobs"][6:] == greedy["logprobs"]["token_logprobs"]


def test_choices__are_numbered_prompt_by_prompt(client: FlaskClient) -> None:
    answer = complete(client, prompt=["ROMEO:", "I"], n=2, best_of=3, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in answer["choices"]] == ["R", "R", "I", "I"]
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["usage"]["completion_tokens"] == 6 * 20
    two = complete(client, prompt=["ROMEO:", "I"])["choices"]
    assert [choice["text"] for choice in two] == [
        complete(client, prompt=p)["choices"][0]["text"] for p in ("ROMEO:", "I")
    ]


def test_cached_prompt__is_not_stepped_again(client: FlaskClient) -> None:
    answers = [complete(client, prompt="CAFTIERL") for _ in range(2)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] < cached[1] == 8
    assert answers[0]["choices"] == answers[1]["choices"]


def test_logit_bias__forces_a_character(client: FlaskClient) -> None:
    forced = complete(client, logit_bias={"e": 100.0, "I": -100.0})["choices"][0]["text"]
    assert forced == "e" * 20


@pytest.mark.parametrize("form", ["\u00e9", "e\u0301"])
def test_logit_bias__accepts_a_character_in_any_unicode_form(tmp_path: Path, form: str) -> None:
    publish_tiny(ModelStore(tmp_path), charset=TINY_CHARSET + "\u00e9")
    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:
        assert complete(client, logit_bias={form: 100.0})["choices"][0]["text"] == "\u00e9" * 20


def test_completion__above_the_admission_limit_is_refused(tiny_store: ModelStore) -> None:
    models = LoadedModels(tiny_store, 1, engine_settings())
    app = OpenAPI(__name__)
    register_error_handlers(app)
    limits = CompletionLimits(max_tokens=100, max_prompt_chars=100, max_texts=100)
    states = PortableStates(models, StateSealer(["k" * 16]))
    CompletionRoutes(models, "tiny", limits, AdmissionLimit(1), SharedBudget(1000), states).register(app)
    client = app.test_client()
    stream = client.post("/v1/completions", json={"prompt": "a", "stream": True}, buffered=False)
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 429
    stream.close()  # before any event was read
    for _ in range(3):
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        whole = client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert whole.text.endswith("[DONE]\n\n")
        whole.close()
        assert client.post("/v1/completions", json={"prompt": "a", "n": 128, "best_of": 1}).status_code == 400
    models.close()


def test_prompt__may_be_empty(client: FlaskClient) -> None:
    assert complete(client, prompt="")["usage"]["total_tokens"] == 20


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "out_of_range"),
    ({"max_tokens": 0, "logprobs": 1}, "max_tokens", "out_of_range"),
    ({"max_tokens": -1}, "max_tokens", "out_of_range"),
    ({"max_tokens": 10**9}, "max_tokens", "out_of_range"),
    ({"max_tokens": 501}, "max_tokens", "out_of_range"),
    ({"max_tokens": "x"}, "max_tokens", "wrong_type"),
    ({"max_tokens": "20"}, "max_tokens", "wrong_type"),
    ({"max_tokens": 20.5}, "max_tokens", "wrong_type"),
    ({"max_tokens": True}, "max_tokens", "wrong_type"),
    ({"temperature": float("nan")}, "temperature", "out_of_range"),
    ({"temperature": float("inf")}, "temperature", "out_of_range"),
    ({"temperature": -0.1}, "temperature", "out_of_range"),
    ({"temperature": "hot"}, "temperature", "wrong_type"),
    ({"top_k": -2}, "top_k", "out_of_range"),
    ({"top_p": -0.1}, "top_p", "out_of_range"),
    ({"top_p": 1.1}, "top_p", "out_of_range"),
    ({"seed": 2**63}, "seed", "out_of_range"),
    ({"seed": 10**4000}, "seed", "out_of_range"),
    ({"seed": 1.5}, "seed", "wrong_type"),
    ({"stop": ""}, "stop", "out_of_range"),
    ({"stop": [""]}, "stop[0]", "out_of_range"),
    ({"stop": ["a"] * 5}, "stop", "out_of_range"),
    ({"stop": "x" * 1000}, "stop", "out_of_range"),
    ({"stop": 5}, "stop", "wrong_type"),
    ({"prompt": None}, "prompt", "missing_field"),
    ({"extra": None}, "extra", "unknown_field"),
    ({"prompt": []}, "prompt", "out_of_range"),
    ({"prompt": ["a"] * 129}, "prompt", "out_of_range"),
    ({"prompt": ["a", "a" * 1001]}, "prompt[1]", "out_of_range"),
    ({"prompt": ["a", "é"]}, "prompt[1]", "unknown_characters"),
    ({"prompt": "a" * 1001}, "prompt", "out_of_range"),
    ({"prompt": "\ud800"}, "prompt", "unknown_characters"),
    ({"model": 3}, "model", "wrong_type"),
    ({"unknown_chars": "guess"}, "unknown_chars", "out_of_range"),
    ({"suffix": "end"}, "suffix", "unsupported_value"),
    ({"logit_bias": {"ab": 1}}, "logit_bias", "out_of_range"),
    ({"logit_bias": {"§": 1}}, "logit_bias", "unknown_characters"),
    ({"logit_bias": {"": 1}}, "logit_bias", "out_of_range"),
    ({"logit_bias": {"a": 101}}, "logit_bias", "out_of_range"),
    ({"logit_bias": {"a": "1"}}, "logit_bias", "wrong_type"),
    ({"logit_bias": [1]}, "logit_bias", "wrong_type"),
    ({"logprobs": -1}, "logprobs", "out_of_range"),
    ({"logprobs": 21}, "logprobs", "out_of_range"),
    ({"logprobs": True}, "logprobs", "wrong_type"),
    ({"echo": 1}, "echo", "wrong_type"),
    ({"n": 0}, "n", "out_of_range"),
    ({"n": 129}, "n", "out_of_range"),
    ({"n": 65, "prompt": ["a", "b"]}, "n", "out_of_range"),
    ({"best_of": 65, "prompt": ["a", "b"]}, "best_of", "out_of_range"),
    ({"n": 3, "best_of": 2}, "best_of", "out_of_range"),
    ({"best_of": 2, "stream": True}, "best_of", "out_of_range"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "out_of_range"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_field"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "unsupported_value",
    ),
    ({"presence_penalty": 2.1}, "presence_penalty", "out_of_range"),
    ({"repetition_penalty": 0}, "repetition_penalty", "out_of_range"),
    ({"min_p": -0.1}, "min_p", "out_of_range"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty", "out_of_range"),
    ({"n": True}, "n", "wrong_type"),
    ({"n": 1.5}, "n", "wrong_type"),
    ({"stream": 0}, "stream", "wrong_type"),
    ({"prompt_": "a"}, "prompt_", "unknown_field"),
]


@pytest.mark.parametrize(("changes", "param", "code"), BAD, ids=lambda value: str(value)[:30])
def test_bad_field__is_refused_and_named(client: FlaskClient, changes: dict[str, Any], param: str, code: str) -> None:
    response = client.post("/v1/completions", data=json.dumps(GOOD | changes), content_type="application/json")
    error = response.get_json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500


def test_missing_prompt__is_refused_and_named(client: FlaskClient) -> None:
    response = client.post("/v1/completions", json={"model": "tiny"})
    assert response.status_code == 400
    assert response.get_json()["error"]["code"] == "missing_field"
    assert response.get_json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("model", ["nope", "tiny@9", "tiny@stable", "../tiny", "@", "tiny@1@1"])
def test_unknown_model__is_not_found(client: FlaskClient, model: str) -> None:
    response = client.post("/v1/completions", json=GOOD | {"model": model})
    error = response.get_json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [b"", b"prompt", b"{", b'{"prompt": "a"', b"[]", b"null", b'"{}"', b"3", b"\xff\xfe\x00", b"[" * 60_000,
     b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b"{'prompt': 'a'}"],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
def test_body__that_is_not_a_json_object_is_refused(client: FlaskClient, body: bytes) -> None:
    response = client.post("/v1/completions", data=body, content_type="application/json")
    assert response.status_code == 400
    assert response.get_json()["error"]["code"] == "invalid_json"


def test_body__nested_too_deeply_is_refused_at_any_depth(client: FlaskClient) -> None:
    for depth in range(900, 1010, 1):
        body = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        response = client.post("/v1/completions", data=body, content_type="application/json")
        assert response.status_code == 400, depth


def test_body__may_be_nested_to_a_depth_that_does_not_depend_on_the_interpreter(client: FlaskClient) -> None:
    """Also in fields that nobody reads."""

    def send(value: str) -> Any:
        body = f'{{"prompt": "a", "max_tokens": 1, "metadata": {{"a": {value}}}}}'
        return client.post("/v1/completions", data=body, content_type="application/json")

    ok(send("[" * 126 + "]" * 126))  # in two objects
    ok(send('{"a":[' * 63 + "]}" * 63))
    ok(send('"' + "[" * 1000 + '"'))
    ok(send("[" + ",".join(["[[]]"] * 200) + "]"))
    for value in ("[" * 127 + "]" * 127, '{"a":' * 200 + "1" + "}" * 200, "[" * 5000 + "]" * 5000, "[" * 5000):
        assert "128" in refused(send(value), 400, "invalid_json")["message"]
    for value in ("[" * 100 + "]" * 200, "]" * 300 + "[" * 300):
        refused(send(value), 400, "invalid_json")


FLOODS = {
    "fields": b'{"prompt": "a", ' + b",".join(b'"f%d": 1' % i for i in range(5000)) + b"}",
    "entries of logit_bias": b'{"prompt": "a", "logit_bias": {'
    + b",".join(b'"%d": ""' % i for i in range(5000))
    + b"}}",
    "nested fields": b'{"prompt": "a", "stream_options": {' + b",".join(b'"%d": 1' % i for i in range(5000)) + b"}}",
    "lists": b'{"prompt": [' + b",".join([b"[]"] * 5000) + b"]}",
    "objects": b'{"prompt": [' + b",".join([b"{}"] * 5000) + b"]}",
    "strings without commas": b'{"prompt": "' + b"," * 5000 + b'"' + b'""' * 9000,
    "values after an open string": b'{"prompt": [' + b"1," * 5000 + b'"',
}


@pytest.mark.parametrize("body", FLOODS.values(), ids=FLOODS)
def test_body__with_more_values_than_any_request_needs_is_refused_unparsed(
    client: FlaskClient, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte of unknown fields took 60 MiB and a third of a second, in which every stream waited."""
    parsed: list[object] = []
    monkeypatch.setattr("service.web.gate.body_json.MAX_VALUES", 4096)  # so that the bodies are small
    monkeypatch.setattr("service.web.gate.body_json.json.loads", lambda *_, **__: parsed.append(1))
    response = client.post("/v1/completions", data=body, content_type="application/json")
    monkeypatch.undo()
    assert (response.status_code, response.get_json()["error"]["code"]) == (400, "invalid_json")
    assert "4,096 values" in response.get_json()["error"]["message"]
    assert not parsed


def test_body__may_have_any_number_of_brackets_and_commas_in_its_strings(client: FlaskClient) -> None:
    for text in ('[{,"' * 5000, "\\" * 5001 + '",[{' * 2000, '\\"' * 3000):
        response = client.post("/v1/completions", json=GOOD | {"prompt": "a", "user": text[:256], "model": text})
        assert response.get_json()["error"]["param"] == "model", (
            response.text
        )  # it was parsed, and the model is too long


def test_body__may_have_as_many_texts_of_ids_as_a_route_takes(client: FlaskClient) -> None:
    """Each text counted twice: its bracket, and the comma after it."""
    texts = [[1], [1, 2]] * 1024
    response = client.post("/v1/embeddings", json={"input": texts, "dimensions": None, "user": "a"})
    assert response.status_code == 200, response.text
    assert len(json.loads(response.data)["data"]) == 2048


def test_body__with_two_fields_of_one_name_is_refused(client: FlaskClient) -> None:
    """One of them would be ignored, and parsers don't agree which one."""
    for body in (
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "max_tokens": 99999, "max_tokens": 1}',
        b'{"prompt": "a", "logit_bias": {"a": 1, "\\u0061": 2}}',
    ):
        response = client.post("/v1/completions", data=body, content_type="application/json")
        assert (response.status_code, response.get_json()["error"]["code"]) == (400, "invalid_json")
        assert "two fields of one name" in response.get_json()["error"]["message"]
    body = b'{"prompt": "a", "metadata": {"x": [{"of mine": 1, "y": 2, "of mine": 1}]}}'
    response = client.post("/v1/completions", data=body, content_type="application/json")
    assert "of mine" in refused(response, 400, "invalid_json")["message"]  # also in fields without an effect


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", '{"prompt": "a", "metadata": {"a": [1, {"b": %s}]}}', "metadata.a[1].b"),
        ("completions", '{"prompt": "a", "logit_bias": {"a": %s}}', "logit_bias.a"),
        ("completions", '{"prompt": "a", "max_tokens": %s}', "max_tokens"),
        ("completions", '{"prompt": ["a", %s]}', "prompt[1]"),
        ("completions", '{"prompt": "a", "nobody knows": [[%s]]}', "nobody knows[0][0]"),
        (
            "completions",
            '{"prompt": "a", "structured_outputs": {"json": {"const": %s}}}',
            "structured_outputs.json.const",
        ),
        ("chat/completions", '{"messages": [{"role": "user", "content": "a"}], "prediction": %s}', "prediction"),
        ("embeddings", '{"input": "a", "metadata": {"a": %s}}', "metadata.a"),
        ("sessions", '{"ttl_s": %s}', "ttl_s"),
    ],
)
def test_body__with_a_number_that_json_does_not_have_is_refused_by_its_path(
    client: FlaskClient, path: str, body: str, param: str
) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400 + ".5"):
        response = client.post(f"/v1/{path}", data=body % number, content_type="application/json")
        assert "finite" in refused(response, 400, "out_of_range", param)["message"]


def test_body__that_is_such_a_number_is_no_object(client: FlaskClient) -> None:
    for body in ("NaN", "[NaN]", "1e999"):
        response = client.post("/v1/completions", data=body, content_type="application/json")
        assert "object" in refused(response, 400, "invalid_json")["message"]


def test_body__with_a_number_of_thousands_of_digits_is_refused_in_words_for_clients(client: FlaskClient) -> None:
    response = client.post("/v1/completions", data=b'{"seed": %s}' % (b"9" * 6000), content_type="application/json")
    assert (response.status_code, response.get_json()["error"]["code"]) == (400, "invalid_json")
    message = response.get_json()["error"]["message"]
    assert "a number has more digits" in message
    assert "sys." not in message


def test_body__is_utf_8_with_or_without_a_byte_order_mark(client: FlaskClient) -> None:
    body = json.dumps(GOOD)
    for coding, status in (("utf-8", 200), ("utf-8-sig", 200), ("utf-16", 400), ("utf-16-le", 400), ("utf-32", 400)):
        response = client.post("/v1/completions", data=body.encode(coding), content_type="application/json")
        assert response.status_code == status, coding
        assert status == 200 or response.get_json()["error"]["code"] == "invalid_json"


def test_unknown_route__is_refused_before_its_body_is_checked(client: FlaskClient) -> None:
    assert client.post("/nope", data="x").status_code == 404
    assert client.post("/healthz", data="x").status_code == 405


def test_body__larger_than_the_limit_is_refused(client: FlaskClient) -> None:
    for body in (b"x" * 10_000_000, json.dumps(GOOD | {"prompt": "a" * 65_536}).encode()):
        response = client.post("/v1/completions", data=body, content_type="application/json")
        assert response.status_code == 413
        assert response.get_json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_content_type__other_than_json_is_refused(client: FlaskClient, kind: str) -> None:
    response = client.post("/v1/completions", data=json.dumps(GOOD), content_type=kind)
    assert response.status_code == 415
    assert response.get_json()["error"]["code"] == "unsupported_media_type"


def test_content_type__may_have_a_charset(client: FlaskClient) -> None:
    response = client.post("/v1/completions", data=json.dumps(GOOD), content_type="application/json; charset=utf-8")
    assert response.status_code == 200


def test_body__compressed_is_refused(client: FlaskClient) -> None:
    response = client.post("/v1/completions", json=GOOD, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert client.post("/v1/completions", json=GOOD, headers={"Content-Encoding": "identity"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*CompletionBody.model_fields, "x"])


@settings(max_examples=300)
@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_arbitrary_json__is_answered_or_refused_but_never_fails(client: FlaskClient, changes: dict[str, Any]) -> None:
    response = client.post("/v1/completions", data=json.dumps(GOOD | changes), content_type="application/json")
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert set(response.get_json()["error"]) == {"message", "type", "param", "code"}
