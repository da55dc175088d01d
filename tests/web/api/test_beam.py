"""Completions with `beam`: the likeliest continuations, in OpenAI's shape, and what can't be combined with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.harness.application import ok, refused

BODY: dict[str, Any] = {"prompt": "ROMEO: ", "max_tokens": 2, "beam": 6}


def scored(client: FlaskClient, prompt: str, texts: list[str]) -> list[float]:
    answer = ok(client.post("/v1/score", json={"prompt": prompt, "candidates": texts}))
    return [one["logprob"] for one in answer["data"]]


def test_beam__returns_the_likeliest_continuations(client: FlaskClient) -> None:
    answer = ok(client.post("/v1/completions", json=BODY))
    choices = answer["choices"]
    assert (answer["object"], answer["model"], len(choices)) == ("text_completion", "tiny@1", 6)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
    assert {(choice["finish_reason"], choice["exact"], choice["logprobs"]) for choice in choices} == {
        ("length", True, None)
    }
    characters = "\n !'-,.:?ABCEFIJLMORTUabcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in characters for b in characters]
    best: list[float] = []
    for start in range(0, len(pairs), 480):  # of together at most 1,000 characters
        best += scored(client, "ROMEO: ", pairs[start : start + 480])
    ranked = sorted(zip(best, pairs, strict=True), reverse=True)[:6]
    assert [choice["text"] for choice in choices] == [text for _, text in ranked]
    assert [choice["logprob"] for choice in choices] == pytest.approx([value for value, _ in ranked], abs=1e-6)
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["usage"]["completion_tokens"] > 0


def test_beam__ends_texts_before_stop_strings(client: FlaskClient) -> None:
    body = BODY | {"max_tokens": 3, "stop": ["b", "cd"], "beam": 64}
    choices = ok(client.post("/v1/completions", json=body))["choices"]
    included = ok(client.post("/v1/completions", json=body | {"include_stop_str_in_output": True}))["choices"]
    assert [choice["logprob"] for choice in choices] == [choice["logprob"] for choice in included]
    ended = 0
    for choice, whole in zip(choices, included, strict=True):
        assert choice["logprob"] == pytest.approx(scored(client, "ROMEO: ", [whole["text"]])[0], abs=1e-6)
        if choice["finish_reason"] == "stop":
            ended += 1
            assert whole["text"] in (choice["text"] + "b", choice["text"] + "cd")
        else:
            assert whole["text"] == choice["text"]
            assert len(choice["text"]) == 3
        assert not any(stop in choice["text"] for stop in ("b", "cd"))
    assert ended > 0
    assert choices[0]["finish_reason"] == "stop"  # `b` alone is likelier than any three characters


def test_beam__continues_each_prompt_and_a_state(client: FlaskClient) -> None:
    both = ok(client.post("/v1/completions", json=BODY | {"prompt": ["ROMEO: ", "JULIET:"], "beam": 2}))["choices"]
    alone = [
        ok(client.post("/v1/completions", json=BODY | {"prompt": text, "beam": 2}))["choices"]
        for text in ("ROMEO: ", "JULIET:")
    ]
    assert both == [choice | {"index": index} for index, choice in enumerate(alone[0] + alone[1])]
    state = ok(client.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 0, "return_state": True}))
    for prompt, rest in (("ROMEO: ", " "), ("ROMEO:", "")):
        body = BODY | {"prompt": rest, "state": state["choices"][0]["state"]}
        expected = ok(client.post("/v1/completions", json=BODY | {"prompt": prompt}))["choices"]
        assert ok(client.post("/v1/completions", json=body))["choices"] == expected


def test_beam__of_long_texts_is_that_of_a_beam_search(client: FlaskClient) -> None:
    answer = ok(client.post("/v1/completions", json=BODY | {"max_tokens": 40, "beam": 3}))
    assert [choice["exact"] for choice in answer["choices"]] == [False] * 3
    assert [len(choice["text"]) for choice in answer["choices"]] == [40] * 3
    greedy = ok(client.post("/v1/completions", json={"prompt": "ROMEO: ", "max_tokens": 40, "temperature": 0}))
    likelihood = scored(client, "ROMEO: ", [greedy["choices"][0]["text"]])[0]
    assert answer["choices"][0]["logprob"] >= likelihood - 1e-6
    assert not math.isinf(likelihood)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "stream"),
        ({"seed": 7}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"echo": True}, "echo"),
        ({"return_state": True}, "return_state"),
        ({"best_of": 6}, "best_of"),
        ({"n": 3}, "n"),
        ({"beam": 65}, "beam"),
        ({"beam": 0}, "beam"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"prompt": ["a"] * 30}, "beam"),
    ],
)
def test_beam__refuses_what_it_cannot_honour(client: FlaskClient, change: dict[str, Any], param: str) -> None:
    refused(client.post("/v1/completions", json=BODY | change), 400, "out_of_range", param)


def test_beam__says_how_many_characters_it_takes_and_names_no_field_that_it_refuses(client: FlaskClient) -> None:
    response = client.post("/v1/completions", json=BODY | {"max_tokens": 0})
    assert response.get_json()["error"]["message"] == "max_tokens: 1 to 1024 characters with beam"


def test_beam__with_neutral_settings_is_the_same(client: FlaskClient) -> None:
    expected = ok(client.post("/v1/completions", json=BODY))["choices"]
    neutral = {"temperature": 1, "top_k": -1, "top_p": 1, "n": 6, "logit_bias": {}, "seed": None, "stream": False}
    assert ok(client.post("/v1/completions", json=BODY | neutral))["choices"] == expected


def test_beam__has_the_log_probabilities_of_its_texts(client: FlaskClient) -> None:
    """Those that a request gets which reads the text as a prompt; a stop string counts in `logprob` alone."""
    body = BODY | {"prompt": ["ROMEO: ", "JULIET:"], "max_tokens": 5, "beam": 3, "stop": "b"}
    plain = ok(client.post("/v1/completions", json=body))
    for num_top, included in ((0, True), (3, False)):
        body |= {"logprobs": num_top, "include_stop_str_in_output": included}
        answer = ok(client.post("/v1/completions", json=body))
        assert answer["usage"]["completion_tokens"] > plain["usage"]["completion_tokens"]
        for number, (choice, without) in enumerate(zip(answer["choices"], plain["choices"], strict=True)):
            scores, text, prompt = choice["logprobs"], choice["text"], body["prompt"][number // 3]
            read = {"prompt": prompt + text, "max_tokens": 0, "echo": True, "logprobs": num_top}
            expected = ok(client.post("/v1/completions", json=read))["choices"][0]["logprobs"]
            for name in ("tokens", "token_logprobs"):
                assert scores[name] == expected[name][len(prompt) :]
            if num_top:
                assert scores["top_logprobs"] == (expected["top_logprobs"][len(prompt) :] or None)
            assert scores["text_offset"] == [*range(len(text))]
            if included:
                assert sum(scores["token_logprobs"]) == pytest.approx(choice["logprob"], abs=1e-5)
            assert choice["logprob"] == without["logprob"]
    form = BODY | {"structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 5, "beam": 1, "logprobs": 0}
    assert len(ok(client.post("/v1/completions", json=form))["choices"][0]["logprobs"]["tokens"]) in (2, 3)


def test_beam__of_a_form_has_it_and_may_end_before_a_stop_string(client: FlaskClient) -> None:
    texts = ["what", "where", "a"]
    body = BODY | {"max_tokens": 9, "structured_outputs": {"choice": texts}}
    choices = ok(client.post("/v1/completions", json=body))["choices"]
    assert sorted(choice["text"] for choice in choices) == sorted(texts)
    assert {(choice["finish_reason"], choice["exact"]) for choice in choices} == {("stop", True)}
    assert [choice["logprob"] for choice in choices] == pytest.approx(
        scored(client, "ROMEO: ", [choice["text"] for choice in choices]), abs=1e-6
    )
    digits = ok(client.post("/v1/completions", json=body | {"structured_outputs": {"regex": "[ab]+"}, "max_tokens": 2}))
    assert {(choice["finish_reason"], len(choice["text"])) for choice in digits["choices"]} == {("length", 2)}
    ended = ok(client.post("/v1/completions", json=body | {"structured_outputs": {"regex": "[ab]+"}, "stop": "."}))
    for choice in ended["choices"]:
        assert set(choice["text"]) <= {"a", "b"}
        assert choice["finish_reason"] == "stop" or len(choice["text"]) == 9
    refused(
        client.post("/v1/completions", json=body | {"structured_outputs": {"regex": "a{10}"}}),
        400,
        "out_of_range",
        "max_tokens",
    )
    refused(
        client.post("/v1/completions", json=body | {"structured_outputs": {"regex": "("}}),
        400,
        "out_of_range",
        "structured_outputs.regex",
    )


@pytest.mark.parametrize("pattern", ["", "(abcdef)?"])
def test_beam__of_a_form_that_only_the_empty_text_has_returns_it(client: FlaskClient, pattern: str) -> None:
    """As a request that draws does, also if what may follow is too long."""
    body = BODY | {"structured_outputs": {"regex": pattern}, "max_tokens": 5, "logprobs": 1}
    (choice,) = ok(client.post("/v1/completions", json=body))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprob"], choice["exact"]) == ("", "stop", 0.0, True)
    assert choice["logprobs"]["tokens"] == []
    (drawn,) = ok(client.post("/v1/completions", json={k: v for k, v in body.items() if k != "beam"}))["choices"]
    assert (drawn["text"], drawn["finish_reason"]) == ("", "stop")
