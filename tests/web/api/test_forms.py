"""The fields that give a text a form: which are accepted, on every route, and what is refused before the first byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok, refused

DAY = {"regex": "(Mon|Tues)day"}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
IN_OPENAIS_WORDS = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
# Fields, each with one form.
FORMS: dict[str, Any] = {
    "structured_outputs.choice": {"structured_outputs": {"choice": ["ab", "ba"]}},
    "structured_outputs.regex": {"structured_outputs": {"regex": "[ab]{2}"}},
    "structured_outputs.json": {"structured_outputs": {"json": SCHEMA}},
    "structured_outputs.json_object": {"structured_outputs": {"json_object": True}},
    "response_format": {"response_format": {"type": "json_object"}},
    "response_format.json_schema.schema": {"response_format": IN_OPENAIS_WORDS},
    "guided_choice": {"guided_choice": ["ab", "ba"]},
    "guided_regex": {"guided_regex": "[ab]{2}"},
    "guided_json": {"guided_json": json.dumps(SCHEMA)},
}


@pytest.fixture(scope="module")
def client(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of an application whose models answer chats."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny", chat_template="play", max_tokens=500)) as client:
        client.post("/v1/completions", json={"prompt": "z", "max_tokens": 1})  # the engine's thread starts
        yield client


@pytest.fixture(params=["completions", "chat", "session"])
def route(request: pytest.FixtureRequest, client: FlaskClient) -> tuple[str, dict[str, Any]]:
    """A route that takes forms, and the fields that it needs."""
    if request.param == "completions":
        return "/v1/completions", {"prompt": "ROMEO:", "max_tokens": 40}
    if request.param == "chat":
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}
    session = ok(client.post("/v1/sessions", json={"text": "ROMEO:", "seed": 7}), 201)["id"]
    return f"/v1/sessions/{session}/generate", {"max_tokens": 40}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both fields; where both are objects, the fields of both."""
    both = one | other
    for name in one.keys() & other.keys():
        both[name] = one[name] | other[name]
    return both


PAIRS = [
    (one, other)
    for place, one in enumerate(FORMS)
    for other in [*FORMS][place + 1 :]
    if not (one == "response_format" and other.startswith("response_format"))  # one field, with one type
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_forms__are_refused_and_both_are_named(client: FlaskClient, first: str, second: str) -> None:
    body = {"prompt": "ROMEO:"} | merged(FORMS[first], FORMS[second])
    error = refused(client.post("/v1/completions", json=body), 400, "out_of_range", second)
    assert f"beside {first}: " in error["message"]
    assert error["message"].startswith(f"{second}: ")


@pytest.mark.parametrize(
    ("sent", "code", "param", "words"),
    [
        ({"structured_outputs": {}}, "out_of_range", "structured_outputs", "send one of"),
        ({"structured_outputs": {"json_object": False}}, "out_of_range", "structured_outputs", "send one of"),
        ({"structured_outputs": {"choice": []}}, "out_of_range", "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": ["a"] * 10_001}}, "out_of_range", "structured_outputs.choice", "10000"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "wrong_type", "structured_outputs.choice[1]", "string"),
        ({"structured_outputs": {"choices": ["a"]}}, "unknown_field", "structured_outputs.choices", "mean choice?"),
        ({"structured_outputs": {"pattern": "a"}}, "unknown_field", "structured_outputs.pattern", "mean regex?"),
        ({"structured_outputs": {"json_schema": {}}}, "unknown_field", "structured_outputs.json_schema", "mean json?"),
        ({"structured_outputs": {"rgex": "a"}}, "unknown_field", "structured_outputs.rgex", "mean regex?"),
        ({"structured_outputs": {"regex": 5}}, "wrong_type", "structured_outputs.regex", "string"),
        ({"structured_outputs": ["a"]}, "wrong_type", "structured_outputs", "object"),
        ({"structured_outputs": {"json": [1]}}, "wrong_type", "structured_outputs.json", "an object or a valid string"),
        ({"structured_outputs": {"json": "[1]"}}, "out_of_range", "structured_outputs.json", "JSON object"),
        ({"structured_outputs": {"json": "{'a'}"}}, "out_of_range", "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": '{"a":1,"a":2}'}}, "out_of_range", "structured_outputs.json", "two fields"),
        ({"structured_outputs": {"json": "[" * 9_000}}, "out_of_range", "structured_outputs.json", "too deeply"),
        ({"guided_json": '{"enum":[' + '"a",' * 11_000 + "1]}"}, "out_of_range", "guided_json", "10,240 values"),
        ({"structured_outputs": {"json": '{"maximum": NaN}'}}, "out_of_range", "structured_outputs.json", "NaN"),
        ({"structured_outputs": {"json": '{"maximum": 1e999}'}}, "out_of_range", "structured_outputs.json", "NaN"),
        ({"structured_outputs": {"json": {"const": "\ud800"}}}, "out_of_range", "structured_outputs.json", "surrogate"),
        ({"structured_outputs": {"choice": ["\ud800"]}}, "out_of_range", "structured_outputs.choice", "surrogate"),
        (
            {"structured_outputs": {"grammar": "root ::= 'a'"}},
            "unsupported_value",
            "structured_outputs.grammar",
            "use `structured_outputs` with `regex`",
        ),
        (
            {"structured_outputs": {"regex": "a", "structural_tag": "{}"}},
            "unsupported_value",
            "structured_outputs.structural_tag",
            "no tools",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "[ ]?"}},
            "unsupported_value",
            "structured_outputs.whitespace_pattern",
            "white space",
        ),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "unsupported_value",
            "structured_outputs.disable_any_whitespace",
            "white space",
        ),
        ({"response_format": {"type": "xml"}}, "out_of_range", "response_format.type", "'json_object'"),
        ({"response_format": {}}, "missing_field", "response_format.type", "required"),
        ({"response_format": {"type": "json_schema"}}, "out_of_range", "response_format.json_schema", "needed"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "out_of_range",
            "response_format.json_schema",
            "only allowed",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "missing_field",
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
            "wrong_type",
            "response_format.json_schema.schema",
            "an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strct": True}}},
            "unknown_field",
            "response_format.json_schema.strct",
            "mean strict?",
        ),
        ({"guided_grammar": "a"}, "unsupported_value", "guided_grammar", "grammars"),
        ({"guided_whitespace_pattern": " "}, "unsupported_value", "guided_whitespace_pattern", "white space"),
        ({"json_schema": {}}, "unknown_field", "json_schema", "mean response_format?"),
        ({"structured_outputs": DAY, "min_tokens": 3}, "out_of_range", "min_tokens", "structured_outputs.regex"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_form__is_refused_by_its_path_on_every_route(
    client: FlaskClient, route: tuple[str, dict[str, Any]], sent: dict[str, Any], code: str, param: str, words: str
) -> None:
    path, fields = route
    error = refused(client.post(path, json=fields | sent), 400, code, param)
    assert words in error["message"]


def test_no_form__in_the_words_of_every_client_changes_nothing(
    client: FlaskClient, route: tuple[str, dict[str, Any]]
) -> None:
    path, fields = route
    none: dict[str, Any] = dict.fromkeys(["structured_outputs", "guided_choice", "guided_regex", "guided_json"])
    none |= {"response_format": {"type": "text", "json_schema": None}, "grammar": "", "guided_decoding_backend": "x"}
    if "/sessions/" in path:
        fields |= {"position": 6}  # the same run again
    fields |= {"seed": 7}
    texts = []
    for body in (fields, fields | none):
        answer = ok(client.post(path, json=body))
        texts.append(answer["text"] if "text" in answer else json.dumps(answer["choices"]))
    assert texts[0] == texts[1]
