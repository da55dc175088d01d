"""The fields that give a text a form: which are accepted, on every route, and what is refused before the first byte."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.api.completions.schemas import CompletionAnswer
from tests.harness.application import client_of, ok, refused
from tests.harness.models import publish_tiny

CHARSET = "\n" + "".join(map(chr, range(32, 127)))
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
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    """A client of an application whose model can write JSON and answers chats."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store, chat="play", charset=CHARSET)
    with client_of(Settings(model_store=store.root, model="tiny", max_tokens=500)) as client:
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
        ({"structured_outputs": {"json": '{"maximum": 1e999}'}}, "out_of_range", "structured_outputs.json", "finite"),
        (
            {"guided_json": '{"maximum": -' + "9" * 6000 + "}"},
            "out_of_range",
            "guided_json",
            "a number has more digits",
        ),
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


KEYWORDS = [
    "type", "properties", "required", "items", "minItems", "maxItems", "minLength", "maxLength", "pattern", "enum",
    "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "additionalProperties", "minimum", "maximum", "format",
]  # fmt: skip

# What a form does


def complete(client: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a completion of "ROMEO:"."""
    answer = ok(client.post("/v1/completions", json={"prompt": "ROMEO:", "seed": 7} | fields))
    CompletionAnswer.model_validate(answer)
    generated = sum(len(choice["text"]) for choice in answer["choices"])
    if not {"echo", "stop", "best_of"} & fields.keys():
        assert answer["usage"]["completion_tokens"] == generated
    found: list[dict[str, Any]] = answer["choices"]
    return found


def outcomes(client: FlaskClient, **fields: Any) -> list[tuple[str, str]]:
    """Text and `finish_reason` of each choice, which the same request gives as a stream, too."""
    whole = [(choice["text"], choice["finish_reason"]) for choice in complete(client, **fields)]
    response = client.post("/v1/completions", json={"prompt": "ROMEO:", "seed": 7, "stream": True} | fields)
    assert response.status_code == 200, response.text
    chunks = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
    parts = [[one for chunk in chunks for one in chunk["choices"] if one["index"] == at] for at in range(len(whole))]
    assert [("".join(one["text"] for one in part), part[-1]["finish_reason"]) for part in parts] == whole
    return whole


def run(client: FlaskClient, **fields: Any) -> tuple[str, str]:
    """Text and `finish_reason` of a run of a new session with the same text and seed."""
    session = ok(client.post("/v1/sessions", json={"text": "ROMEO:", "seed": 7}), 201)["id"]
    answer = ok(client.post(f"/v1/sessions/{session}/generate", json=fields))
    assert ok(client.get(f"/v1/sessions/{session}/text"))["text"] == "ROMEO:" + answer["text"]
    return answer["text"], answer["finish_reason"]


CHECKS: dict[str, Callable[[str], object]] = {
    "choice": lambda text: text in ("ab", "ba"),
    "regex": lambda text: re.fullmatch("[ab]{2}", text),
    "json": lambda text: isinstance(json.loads(text)["a"], bool) and len(json.loads(text)) >= 1,
    "json_object": lambda text: isinstance(json.loads(text), dict),
}


@pytest.mark.parametrize("name", FORMS)
def test_form__is_that_of_every_text_on_every_route(client: FlaskClient, name: str) -> None:
    fields = FORMS[name] | {"max_tokens": 60}
    kind = name.rpartition(".")[2].removeprefix("guided_").replace("schema", "json")
    check = CHECKS["json_object" if kind == "response_format" else kind]
    found = outcomes(client, n=8, temperature=1.5, **fields)
    assert all(check(text) for text, _ in found), found
    assert len(set(found)) > 1
    assert {reason for _, reason in found} == {"stop"}
    (plain,) = outcomes(client, **fields)
    assert run(client, **fields) == plain
    messages = [{"role": "user", "content": "Hi"}]
    for choice in ok(client.post("/v1/chat/completions", json={"messages": messages, "n": 4} | fields))["choices"]:
        assert check(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"


def test_form__that_may_go_on_is_written_up_to_max_tokens(client: FlaskClient) -> None:
    for max_tokens in (1, 2, 30):
        ((text, reason),) = outcomes(client, structured_outputs={"regex": r"\d+"}, max_tokens=max_tokens)
        assert re.fullmatch(f"[0-9]{{{max_tokens}}}", text)
        assert reason == "length"
    for max_tokens in range(3, 12):
        found = outcomes(client, structured_outputs={"regex": r"(\d\d,)*\d\d;"}, max_tokens=max_tokens, n=5)
        assert all(re.fullmatch(r"(\d\d,)*\d\d;", text) and reason == "stop" for text, reason in found)


def test_form__of_the_empty_text_ends_before_the_first_character(client: FlaskClient) -> None:
    for form in ({"regex": ""}, {"choice": [""]}):
        assert outcomes(client, structured_outputs=form, n=2) == [("", "stop")] * 2
        assert outcomes(client, structured_outputs=form, echo=True) == [("ROMEO:", "stop")]
        assert run(client, structured_outputs=form, max_tokens=5) == ("", "stop")
        scored = complete(client, structured_outputs=form, logprobs=2)[0]
        assert scored["logprobs"]["tokens"] == scored["logprobs"]["allowed_logprobs"] == []


def test_max_tokens__that_no_text_of_the_form_fits_into_is_refused_with_the_fewest(
    client: FlaskClient, route: tuple[str, dict[str, Any]]
) -> None:
    path, fields = route
    body = fields | {"structured_outputs": {"regex": "[a-z]{31}(b|cd)?"}}
    error = refused(client.post(path, json=body | {"max_tokens": 30}), 400, "out_of_range", "max_tokens")
    assert "at least 31 characters" in error["message"]
    ok(client.post(path, json=body | {"max_tokens": 31}))
    if "messages" in fields:
        body = {name: value for name, value in body.items() if name != "max_tokens"} | {"max_completion_tokens": 30}
        refused(client.post(path, json=body), 400, "out_of_range", "max_completion_tokens")
    else:  # the default is too small as well
        body = {name: value for name, value in body.items() if name != "max_tokens"}
        error = refused(client.post(path, json=body | {"stream": True}), 400, "out_of_range", "max_tokens")
        assert "at least 31 characters" in error["message"]
        assert "16" in error["message"]


def test_stop_strings__end_a_text_only_where_its_form_is_complete(client: FlaskClient) -> None:
    pattern = "([ab]{3};)+"
    fields: dict[str, Any] = {"structured_outputs": {"regex": pattern}, "stop": ["a", "b;a"], "max_tokens": 80}
    for (text, reason), (with_stop, same) in zip(
        outcomes(client, n=8, **fields), outcomes(client, n=8, include_stop_str_in_output=True, **fields), strict=True
    ):
        assert re.fullmatch(pattern, text)
        assert reason == same
        assert with_stop in ([text + "a", text + "b;a"] if reason == "stop" else [text])
    reasons = {reason for _, reason in outcomes(client, n=8, **fields)}
    assert "stop" in reasons
    first = outcomes(client, **fields)[0]
    assert run(client, **fields) == first


def test_stop_strings__of_a_chat_leave_its_form_whole(client: FlaskClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 7}
    form = {"structured_outputs": {"regex": "(a|b)\n\n[ab]\n\n(yes|no)"}}
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json=body | form | {"stream": stream})
        if stream:
            events = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
            text = "".join(event["choices"][0]["delta"]["content"] for event in events)
            reason = events[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = ok(response)["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert re.fullmatch(form["structured_outputs"]["regex"], text)
        assert reason == "stop"


def test_allowed_token_ids__leave_texts_of_the_form_that_consist_of_them(client: FlaskClient) -> None:
    ids = [CHARSET.index(char) for char in "abc"]
    form = {"structured_outputs": {"regex": "[a-z]{6}|X"}, "allowed_token_ids": ids}
    assert all(re.fullmatch("[abc]{6}", text) for text, _ in outcomes(client, n=6, **form))
    assert re.fullmatch("[abc]{6}", run(client, **form)[0])
    refused(
        client.post("/v1/completions", json={"prompt": ""} | form | {"max_tokens": 5}),
        400,
        "out_of_range",
        "max_tokens",
    )  # the text of one character is left out
    other = form | {"structured_outputs": {"choice": ["x", "yz"]}}
    response = client.post("/v1/completions", json={"prompt": ""} | other)
    message = refused(response, 400, "out_of_range", "allowed_token_ids")["message"]
    assert message.startswith("allowed_token_ids: no text of the form consists of these characters alone: they lack")
    ok(client.put("/v1/sessions/allowed", json={"text": "a"}), 201)
    response = client.post("/v1/sessions/allowed/generate", json=other)
    refused(response, 400, "out_of_range", "allowed_token_ids")


def test_max_tokens__of_a_form_of_one_character_has_its_noun_in_the_singular(client: FlaskClient) -> None:
    body = {"prompt": "a", "max_tokens": 0, "echo": True, "structured_outputs": {"regex": "[ab]"}}
    message = refused(client.post("/v1/completions", json=body), 400, "out_of_range", "max_tokens")["message"]
    assert "at least 1 character, more than the 0 that it may have" in message


BAD_FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "pattern": ({"structured_outputs": {"regex": "a(b"}}, "out_of_range", "structured_outputs.regex"),
    "look-ahead": ({"guided_regex": "a(?=b)b"}, "out_of_range", "guided_regex"),
    "states": ({"structured_outputs": {"regex": "([ab]*a[ab]{30}){40}"}}, "out_of_range", "structured_outputs.regex"),
    "unknown characters": ({"structured_outputs": {"choice": ["\u6f22"]}}, "unknown_characters",
                           "structured_outputs.choice"),
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}},
               "out_of_range", "response_format.json_schema.schema"),
    "keyword": ({"guided_json": {"$dynamicRef": "#a"}}, "out_of_range", "guided_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FORMS)
def test_form__that_cant_be_compiled_is_refused_by_its_path_before_the_first_byte(
    client: FlaskClient, route: tuple[str, dict[str, Any]], name: str
) -> None:
    (path, fields), (sent, code, param) = route, BAD_FORMS[name]
    for stream in (False, True):
        refused(client.post(path, json=fields | sent | {"stream": stream}), 400, code, param)
    if "/sessions/" in path:  # nothing was begun, and nothing is leased
        ok(client.post(path, json=fields | {"position": 6}))


def test_log_probabilities__are_of_the_model_and_of_what_the_form_allowed(client: FlaskClient) -> None:
    """Compared with the whole distribution at each place, which a session's feed returns."""
    form = {"structured_outputs": {"regex": "[abc]x|[cde]{2}"}}
    for choice in complete(client, logprobs=3, n=4, echo=True, **form):
        found, text = choice["logprobs"], choice["text"].removeprefix("ROMEO:")
        assert found["tokens"] == list(choice["text"])
        assert found["allowed_logprobs"][:6] == [None] * 6
        session = ok(client.post("/v1/sessions", json={"text": "ROMEO:"}), 201)["id"]
        for place, char in enumerate(text):
            fed = ok(client.post(f"/v1/sessions/{session}/feed", json={"text": text[place - 1 : place]}))
            model = {one["char"]: one["logprob"] for one in fed["next"]}
            following = {"a": "x", "b": "x", "c": "xcde", "d": "cde", "e": "cde"}
            allowed = "abcde" if place == 0 else following[text[0]]
            own = model[char] - math.log(sum(math.exp(model[one]) for one in allowed))
            assert found["token_logprobs"][6 + place] == pytest.approx(model[char], abs=1e-6)
            assert found["allowed_logprobs"][6 + place] == pytest.approx(own, abs=1e-5)
    plain = complete(client, logprobs=3)[0]["logprobs"]
    assert "allowed_logprobs" not in plain


def test_log_probabilities__of_chats_and_streams_are_the_same(client: FlaskClient) -> None:
    form = {"structured_outputs": {"choice": ["yes", "yea", "no"]}, "max_tokens": 10, "seed": 7}
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1} | form
    whole = ok(client.post("/v1/chat/completions", json=body))["choices"][0]["logprobs"]["content"]
    response = client.post("/v1/chat/completions", json=body | {"stream": True})
    events = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
    assert [one for event in events for one in event["choices"][0]["logprobs"]["content"]] == whole
    prompt = "ROMEO:\nHi\n\nJULIET:\n"
    scored = complete(client, prompt=prompt, stop="\n\n", logprobs=1, **form)[0]["logprobs"]
    assert [one["allowed_logprob"] for one in whole] == scored["allowed_logprobs"]
    assert [one["logprob"] for one in whole] == scored["token_logprobs"]
    assert all("allowed_logprob" not in one for each in whole for one in each["top_logprobs"])
    streamed = client.post(
        "/v1/completions", json={"prompt": prompt, "logprobs": 1, "stop": "\n\n", "stream": True} | form
    )
    chunks = [json.loads(part.removeprefix("data: ")) for part in streamed.text.split("\n\n")[:-2]]
    assert [one for chunk in chunks for one in chunk["choices"][0]["logprobs"]["allowed_logprobs"]] == (
        scored["allowed_logprobs"]
    )
    del body["logprobs"], body["top_logprobs"], body["structured_outputs"]
    plain = ok(client.post("/v1/chat/completions", json=body | {"logprobs": True}))["choices"][0]["logprobs"]
    assert "allowed_logprob" not in plain["content"][0]


def test_best_of__chooses_the_likeliest_texts_of_the_form(client: FlaskClient) -> None:
    form = {"structured_outputs": {"regex": "[a-z]{3,9}"}, "max_tokens": 12, "logprobs": 0}
    means = sorted(
        (math.fsum(one["logprobs"]["token_logprobs"]) / len(one["text"]), one["text"])
        for one in complete(client, n=9, **form)
    )
    found = [one["text"] for one in complete(client, n=2, best_of=9, **form)]
    assert found == [text for _, text in means[:-3:-1]]


def test_settings__apply_to_what_the_form_allows(client: FlaskClient) -> None:
    form = {"structured_outputs": {"regex": "[a-e]{40}"}, "max_tokens": 40}
    assert outcomes(client, logit_bias={"c": 100, "z": 100}, **form) == [("c" * 40, "stop")]
    greedy = {text for seed in range(3) for text, _ in outcomes(client, seed=seed, temperature=0, **form)}
    assert len(greedy) == 1
    assert outcomes(client, top_k=1, seed=5, **form)[0][0] in greedy
    ((text, _),) = outcomes(client, presence_penalty=2, frequency_penalty=2, **form)
    assert max(map(text.count, "abcde")) <= 10


def test_state__after_a_text_of_a_form_is_a_sessions(client: FlaskClient) -> None:
    form = {"structured_outputs": {"regex": "[a-z]{3} [0-9]"}, "max_tokens": 5, "stop": "!"}
    (choice,) = complete(client, return_state=True, **form)
    session = ok(client.post("/v1/sessions", json={"state": choice["state"]}), 201)
    assert session["position"] == 6 + len(choice["text"]) == 11
    text = ok(client.post("/v1/sessions", json={"text": "ROMEO:" + choice["text"], "seed": 7}), 201)["id"]
    assert ok(client.get(f"/v1/sessions/{text}/state"))["state"] == choice["state"]


def test_repeated_run__needs_the_same_form(client: FlaskClient) -> None:
    session = ok(client.post("/v1/sessions", json={"text": "ROMEO:", "seed": 7}), 201)["id"]
    path, body = f"/v1/sessions/{session}/generate", {"max_tokens": 20, "position": 6}
    first = ok(client.post(path, json=body | {"structured_outputs": {"json": SCHEMA}}))
    same: list[dict[str, Any]] = [{"guided_json": json.dumps(SCHEMA, indent=4)}, {"response_format": IN_OPENAIS_WORDS}]
    assert [ok(client.post(path, json=body | form)) for form in same] == [first, first]
    others: list[dict[str, Any]] = [{}, {"guided_json": SCHEMA | {"title": "a"}}, {"guided_regex": "a"}]
    for form in others:
        refused(client.post(path, json=body | form), 409, "position_conflict", "position")
    streamed = client.get(path + "?after=6").text
    assert json.dumps(first["text"]) in streamed


def test_body__takes_ten_thousand_choices(client: FlaskClient) -> None:
    """As long as the default limit of a body allows, and beside other fields."""
    choices = [f"{number:04}" + chr(97 + number % 26) * 80 for number in range(10_000)]
    assert len(json.dumps(choices)) < 2**20
    short = [choice[:20] for choice in choices]
    bias = {chr(code): 0 for code in range(97, 123)}
    ((text, _),) = outcomes(client, structured_outputs={"choice": short}, logit_bias=bias, max_tokens=20)
    assert text in short
    error = refused(
        client.post("/v1/completions", json={"prompt": "", "guided_choice": choices}), 400, "out_of_range",
        "guided_choice",
    )  # fmt: skip
    assert "262,144" in error["message"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(
    form=st.dictionaries(st.sampled_from(KEYWORDS), JSON, max_size=5).map(lambda schema: {"guided_json": schema})
    | st.text("ab(|)[]*+?{}1,2.^$\\\\dws-", max_size=12).map(lambda pattern: {"guided_regex": pattern})
    | st.lists(st.text(max_size=4), min_size=1, max_size=5).map(lambda choices: {"guided_choice": choices})
)
def test_any_form__is_written_or_refused_by_its_path(client: FlaskClient, form: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json={"prompt": "", "max_tokens": 300, "seed": 1} | form)
    (name,) = form
    if response.status_code == 200:
        (choice,) = response.get_json()["choices"]
        text: str = choice["text"]
        if name == "guided_json":
            value = json.loads(text)
            with contextlib.suppress(
                jsonschema.SchemaError
            ):  # such as a keyword that is null, which means it is not set
                jsonschema.Draft202012Validator.check_schema(form[name])
                assert jsonschema.Draft202012Validator(form[name]).is_valid(value)
        else:
            assert text in form[name] if name == "guided_choice" else re.fullmatch(form[name], text)
        return
    error = response.get_json()["error"]
    assert (response.status_code, error["param"] in (name, "max_tokens")) == (400, True), error
    assert error["code"] in ("out_of_range", "unknown_characters")
