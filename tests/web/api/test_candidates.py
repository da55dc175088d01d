"""/v1/score and the suggestions of a session over HTTP: what is answered, and errors that name the bad field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, described, ok, refused

CANDIDATES = ["what", "where", "what", "wh", "a"]


@pytest.fixture
def session(client: FlaskClient) -> str:
    """The path of a new session, whose text is `ROMEO: `."""
    return f"/v1/sessions/{ok(client.post('/v1/sessions', json={'text': 'ROMEO: ', 'seed': 7}), 201)['id']}"


def fed(client: FlaskClient, prompt: str, text: str) -> float:
    """The log-probability of a text after a prompt, as a feed reports it."""
    path = f"/v1/sessions/{ok(client.post('/v1/sessions', json={'text': prompt}), 201)['id']}"
    answer = ok(client.post(f"{path}/feed", json={"text": text, "logprobs": 0}))
    return math.fsum(answer["logprobs"]["token_logprobs"])


@pytest.mark.parametrize("prompt", ["", "ROMEO: "])
def test_score__is_the_log_probability_of_a_feed(client: FlaskClient, prompt: str) -> None:
    answer = ok(client.post("/v1/score", json={"prompt": prompt, "candidates": CANDIDATES}))
    num_chars = len(prompt) + sum(map(len, CANDIDATES))
    assert (answer["object"], answer["model"], answer["position"]) == ("list", "tiny@1", len(prompt))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (num_chars, num_chars)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3, 4]
    assert [one["text"] for one in answer["data"]] == CANDIDATES
    for one in answer["data"]:
        assert one["logprob"] == one["score"] == pytest.approx(fed(client, prompt, one["text"]), abs=1e-6)


def test_score__normalised_is_a_mean_or_a_share(client: FlaskClient) -> None:
    body: dict[str, Any] = {"prompt": "ROMEO: ", "candidates": ["what", "where", "a"]}
    means = ok(client.post("/v1/score", json=body | {"normalize": "length"}))["data"]
    assert [one["score"] for one in means] == pytest.approx([one["logprob"] / len(one["text"]) for one in means])
    shares = ok(client.post("/v1/score", json=body | {"normalize": "candidates"}))["data"]
    assert [one["logprob"] for one in shares] == [one["logprob"] for one in means]
    total = math.log(sum(math.exp(one["logprob"]) for one in shares))
    assert [one["score"] for one in shares] == pytest.approx([one["logprob"] - total for one in shares], abs=1e-6)


def test_score__in_a_session_follows_its_text_and_changes_nothing(client: FlaskClient, session: str) -> None:
    before = ok(client.get(session))
    body = {"candidates": CANDIDATES, "position": 7}
    answer = ok(client.post(f"{session}/score", json=body))
    alone = ok(client.post("/v1/score", json={"prompt": "ROMEO: ", "candidates": CANDIDATES}))
    assert answer["data"] == alone["data"]
    assert answer["position"] == 7
    longer = ok(client.post(f"{session}/score", json=body | {"prompt": "But "}))
    alone = ok(client.post("/v1/score", json={"prompt": "ROMEO: But ", "candidates": CANDIDATES}))
    assert longer["data"] == alone["data"]
    assert longer["position"] == 11
    assert ok(client.get(session)) == before
    conflict = refused(
        client.post(f"{session}/score", json=body | {"position": 6}), 409, "position_conflict", "position"
    )
    assert conflict["position"] == 7


def test_score__reads_a_prompt_once(client: FlaskClient) -> None:
    body = {"prompt": "To be that which the model reads", "candidates": ["a"], "cache_salt": "once"}
    first, second = (ok(client.post("/v1/score", json=body)) for _ in range(2))
    assert first["data"] == second["data"]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
    assert cached == [0, len("To be that which the model reads")]


def test_score__treats_unknown_characters_as_requested(client: FlaskClient) -> None:
    body = {"prompt": "ROMEO: ", "candidates": ["a", "caf\u00e9"]}
    refused(client.post("/v1/score", json=body), 400, "unknown_characters", "candidates[1]")
    folded = ok(client.post("/v1/score", json=body | {"unknown_chars": "fold"}))
    assert [one["text"] for one in folded["data"]] == ["a", "cafe"]
    dropped = client.post("/v1/score", json={"candidates": ["a", "\u6f22"], "unknown_chars": "drop"})
    refused(dropped, 400, "out_of_range", "candidates[1]")
    refused(
        client.post("/v1/score", json={"prompt": "\u6f22", "candidates": ["a"]}), 400, "unknown_characters", "prompt"
    )


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"candidates": []}, "out_of_range", "candidates"),
        ({"candidates": ["a", ""]}, "out_of_range", "candidates[1]"),
        ({"candidates": "what"}, "wrong_type", "candidates"),
        ({"candidates": ["a"] * 10_001}, "out_of_range", "candidates"),
        ({"candidates": ["a" * 501, "b" * 500]}, "out_of_range", "candidates"),
        ({"prompt": "a" * 1001}, "out_of_range", "prompt"),
        ({"normalize": "softmax"}, "out_of_range", "normalize"),
        ({"model": "other"}, "model_not_found", "model"),
        ({"text_1": "a"}, "unknown_field", "text_1"),
    ],
)
def test_score__refuses_a_bad_field_by_name(client: FlaskClient, change: dict[str, Any], code: str, param: str) -> None:
    response = client.post("/v1/score", json={"candidates": ["a"]} | change)
    error = refused(response, 404 if code == "model_not_found" else 400, code, param)
    if param == "text_1":
        assert "prompt" in error["message"]


def test_score__counts_its_memory_in_the_budget_of_log_probabilities(tiny_store: ModelStore) -> None:
    with client_of(Settings(model_store=tiny_store.root, model="tiny", max_scores=7000)) as client:
        few = {"candidates": ["what", "where"]}
        ok(client.post("/v1/score", json=few))
        many = {"candidates": [a + b + "c" for a in "abcdefghijklmno" for b in "abcdefghijkl"]}
        refused(client.post("/v1/score", json=many), 400, "out_of_range", "candidates")
        ok(client.post("/v1/score", json=few))


def test_score__of_another_owners_session_is_not_found(tiny_store: ModelStore) -> None:
    (alice, one), (bob, other) = new_key("alice"), new_key("bob")
    settings = Settings(model_store=tiny_store.root, model="tiny", api_keys=SecretStr(f"{one},{other}"))
    with client_of(settings, alice) as client:
        ok(client.put("/v1/sessions/hers", json={"text": "a"}), 201)
        for route, body in (("score", {"candidates": ["a"]}), ("suggest", {})):
            ok(client.post(f"/v1/sessions/hers/{route}", json=body))
            headers = {"Authorization": f"Bearer {bob}"}
            refused(client.post(f"/v1/sessions/hers/{route}", json=body, headers=headers), 404, "session_not_found")
            assert (
                client.post(f"/v1/sessions/hers/{route}", json=body, headers={"Authorization": ""}).status_code == 401
            )


def test_suggest__returns_the_likeliest_words_and_changes_nothing(client: FlaskClient, session: str) -> None:
    before = ok(client.get(session))
    answer = ok(client.post(f"{session}/suggest", json={"n": 3, "position": 7, "max_chars": 2}))
    assert (answer["object"], answer["model"], answer["position"], answer["exact"]) == ("list", "tiny@1", 7, True)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    logprobs = [one["logprob"] for one in answer["data"]]
    assert logprobs == sorted(logprobs, reverse=True)
    for one in answer["data"]:
        assert 1 <= len(one["text"]) <= 2
        ended = [one["text"] + end for end in "\n !-,.:?"]
        scores = ok(client.post(f"{session}/score", json={"candidates": ended}))["data"]
        whole = math.log(sum(math.exp(score["logprob"]) for score in scores))
        assert one["logprob"] == pytest.approx(whole, abs=1e-5)
    assert ok(client.get(session)) == before
    refused(client.post(f"{session}/suggest", json={"position": 8}), 409, "position_conflict", "position")


def test_suggest__continues_the_word_that_was_begun(client: FlaskClient, session: str) -> None:
    inside = ok(client.post(f"{session}/suggest", json={"n": 64, "prompt": "wh", "max_chars": 1}))["data"]
    assert all(one["text"].isalpha() or one["text"] == "'" for one in inside)
    assert len(inside) == len("'ABCEFIJLMORTUabcdefghijklmnopqrstuvwxyz")
    after = ok(client.post(f"{session}/suggest", json={"n": 64, "prompt": "what", "max_chars": 2, "until": "."}))[
        "data"
    ]
    assert any(" " in one["text"] for one in after)
    before_word = ok(client.post(f"{session}/suggest", json={"n": 64, "prompt": "what,", "max_chars": 2}))["data"]
    assert any(not one["text"][0].isalpha() and one["text"][-1].isalpha() for one in before_word)


def test_suggest__without_ends_returns_texts_of_one_length(client: FlaskClient, session: str) -> None:
    answer = ok(client.post(f"{session}/suggest", json={"n": 4, "until": "", "max_chars": 2}))
    assert [len(one["text"]) for one in answer["data"]] == [2, 2, 2, 2]
    scores = ok(client.post(f"{session}/score", json={"candidates": [one["text"] for one in answer["data"]]}))["data"]
    assert [one["logprob"] for one in answer["data"]] == pytest.approx([one["logprob"] for one in scores], abs=1e-6)


def test_suggest__says_when_the_search_was_cut_short(client: FlaskClient, session: str) -> None:
    answer = ok(client.post(f"{session}/suggest", json={"n": 2, "until": "", "max_chars": 40}))
    assert answer["exact"] is False
    assert [len(one["text"]) for one in answer["data"]] == [40, 40]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"n": 0}, "out_of_range", "n"),
        ({"n": 65}, "out_of_range", "n"),
        ({"max_chars": 0}, "out_of_range", "max_chars"),
        ({"max_chars": 257}, "out_of_range", "max_chars"),
        ({"until": "\u6f22"}, "unknown_characters", "until"),
        ({"max_tokens": 3}, "unknown_field", "max_tokens"),
        ({"temperature": 0.5}, "unknown_field", "temperature"),
    ],
)
def test_suggest__refuses_a_bad_field_by_name(
    client: FlaskClient, session: str, change: dict[str, Any], code: str, param: str
) -> None:
    refused(client.post(f"{session}/suggest", json=change), 400, code, param)


def test_candidates__are_described_with_the_servers_bounds(client: FlaskClient) -> None:
    schemas = described(client)["components"]["schemas"]
    candidates = schemas["ScoreBody"]["properties"]["candidates"]
    assert (candidates["maxItems"], candidates["items"]["maxLength"]) == (10_000, 1000)
    assert schemas["SuggestBody"]["properties"]["prompt"]["maxLength"] == 1000


def test_candidates__of_a_long_list_are_answered_in_their_order(tiny_store: ModelStore) -> None:
    texts = [a + b + c for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghijkl"]
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        answer = ok(client.post("/v1/score", json={"candidates": texts, "normalize": "candidates"}))
        assert [one["text"] for one in answer["data"]] == texts
        assert math.fsum(math.exp(one["score"]) for one in answer["data"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"choice": ["what", "where", "a", "wh"]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}},
        {"guided_regex": "(?:what|where|wh|a)"},
    ],
)
def test_suggest__of_a_form_are_its_likeliest_texts(client: FlaskClient, session: str, form: dict[str, Any]) -> None:
    if "response_format" in form:  # the tiny model has no quotes, so no text has this form
        response = client.post(f"{session}/suggest", json=form)
        refused(response, 400, "unknown_characters", "response_format.json_schema.schema")
        return
    answer = ok(client.post(f"{session}/suggest", json=form | {"n": 9}))
    assert answer["exact"] is True
    found = {one["text"]: one["logprob"] for one in answer["data"]}
    texts = ["a", "wh", "what", "where"]
    assert sorted(found) == texts
    scores = ok(client.post(f"{session}/score", json={"candidates": [*texts, "wha", "whe"]}))["data"]
    logprobs = {one["text"]: one["logprob"] for one in scores}
    for text in ("a", "what", "where"):  # nothing may follow them
        assert found[text] == pytest.approx(logprobs[text], abs=1e-6)
    longer = math.exp(logprobs["wha"]) + math.exp(logprobs["whe"])
    assert found["wh"] == pytest.approx(math.log(math.exp(logprobs["wh"]) - longer), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"structured_outputs": {"regex": "a|b"}, "until": "."}, "until"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a{9}"}, "max_chars": 8}, "max_chars"),
        ({"structured_outputs": {"regex": "a"}, "guided_choice": ["b"]}, "guided_choice"),
    ],
)
def test_suggest__refuses_a_bad_form_by_name(
    client: FlaskClient, session: str, change: dict[str, Any], param: str
) -> None:
    refused(client.post(f"{session}/suggest", json=change), 400, "out_of_range", param)
