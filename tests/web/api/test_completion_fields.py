"""The fields of completions beyond OpenAI's: what ends a text, what may be drawn, and ids and scores in the answer.

Most tests compare an answer with the plain text of the same seed, or with the same answer in another form.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from service.web.api.completions.schemas import CompletionAnswer, CompletionBody
from service.web.gate.body_json import MAX_VALUES
from tests.harness.application import ok, refused
from tests.harness.models import TINY_CHARSET

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 60, "seed": 7}
examples = settings(max_examples=60)


def ids_of(text: str) -> list[int]:
    """The ids of a text's characters."""
    return [TINY_CHARSET.index(char) for char in text]


def complete(client: FlaskClient, **changes: Any) -> dict[str, Any]:
    """The answer to `GOOD` with some fields changed."""
    answer: dict[str, Any] = ok(client.post("/v1/completions", json=GOOD | changes))
    CompletionAnswer.model_validate(answer)
    return answer


def choice(client: FlaskClient, **changes: Any) -> dict[str, Any]:
    """The first choice of that answer."""
    found: dict[str, Any] = complete(client, **changes)["choices"][0]
    return found


def events(client: FlaskClient, **changes: Any) -> list[dict[str, Any]]:
    """The events of a stream without the last, `[DONE]`."""
    response = client.post("/v1/completions", json=GOOD | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    chunks = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
    for chunk in chunks:
        CompletionAnswer.model_validate({"usage": None} | chunk)
    return chunks


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """One choice of a stream, put together."""
    parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
    whole: dict[str, Any] = {"text": "".join(part["text"] for part in parts)}
    whole["finish_reason"] = parts[-1]["finish_reason"]
    if "token_ids" in parts[0]:
        whole["token_ids"] = [one for part in parts for one in part["token_ids"]]
        assert ["prompt_token_ids" in part for part in parts] == [True] + [False] * (len(parts) - 1)
        whole["prompt_token_ids"] = parts[0]["prompt_token_ids"]
    return whole


def ended(plain: str, stops: list[str], min_tokens: int, *, includes: bool) -> tuple[str, str]:
    """What a text becomes with stop strings, and why it ends, character by character."""
    for end in range(min_tokens + 1, len(plain) + 1):
        found = [stop for stop in stops if plain[:end].endswith(stop)]
        if found:
            return plain[:end] if includes else plain[: end - max(map(len, found))], "stop"
    return plain, "length"


@pytest.fixture(scope="module")
def plain(client: FlaskClient) -> str:
    """The text of `GOOD`, which nothing ends."""
    text: str = choice(client)["text"]
    assert len(text) == 60
    return text


# What ends a text


@examples
@given(data=st.data())
def test_end_of_a_text__is_that_of_its_plain_text_streamed_and_not(
    client: FlaskClient, plain: str, data: st.DataObject
) -> None:
    """Stop strings and ids, `min_tokens` and `include_stop_str_in_output` in any combination."""
    places = data.draw(st.lists(st.tuples(st.integers(0, 57), st.integers(1, 3)), max_size=3))
    stops = [plain[at : at + length] for at, length in places]
    stop_ids = data.draw(st.lists(st.sampled_from(sorted(set(ids_of(plain)))), max_size=2))
    min_tokens = data.draw(st.sampled_from([0, 1, 60]) | st.integers(0, 60))
    includes, echo = data.draw(st.booleans()), data.draw(st.booleans())
    fields: dict[str, Any] = {"stop": stops, "stop_token_ids": stop_ids, "min_tokens": min_tokens, "echo": echo}
    fields |= {"include_stop_str_in_output": includes, "return_token_ids": True}
    text, reason = ended(plain, [*stops, *(TINY_CHARSET[one] for one in stop_ids)], min_tokens, includes=includes)
    whole = choice(client, **fields)
    assert (whole["text"], whole["finish_reason"]) == ("ROMEO:" * echo + text, reason)
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (ids_of("ROMEO:"), ids_of(text))
    assert joined(events(client, **fields)) == {
        key: whole[key] for key in whole if key != "logprobs" and key != "index"
    }
    session = ok(client.post("/v1/sessions", json={"text": "ROMEO:", "seed": 7}), 201)["id"]
    taken = ("stop", "stop_token_ids", "min_tokens", "include_stop_str_in_output")
    body = {"max_tokens": 60} | {name: fields[name] for name in taken}
    run = ok(client.post(f"/v1/sessions/{session}/generate", json=body))
    assert (run["text"], run["finish_reason"], run["position"]) == (text, reason, 6 + len(text))
    assert ok(client.get(f"/v1/sessions/{session}/text"))["text"] == "ROMEO:" + text


def test_min_tokens__equal_to_max_tokens_gives_the_whole_length(client: FlaskClient, plain: str) -> None:
    answer = complete(client, min_tokens=60, stop=list("etao"), stop_token_ids=ids_of("hrsn"), ignore_eos=True)
    assert answer["choices"][0]["text"] == plain
    assert answer["usage"]["completion_tokens"] == 60
    refused(client.post("/v1/completions", json=GOOD | {"min_tokens": 61}), 400, "out_of_range", "min_tokens")


def test_stop_token_ids__that_no_character_has_are_refused_by_their_place(client: FlaskClient) -> None:
    session = ok(client.post("/v1/sessions", json={}), 201)["id"]
    for route in ("/v1/completions", f"/v1/sessions/{session}/generate"):
        body = {"max_tokens": 5} | (GOOD if route == "/v1/completions" else {})
        for name in ("stop_token_ids", "allowed_token_ids"):
            error = refused(client.post(route, json=body | {name: [3, 48]}), 400, "out_of_range", f"{name}[1]")
            assert "0 to 47" in error["message"]
            refused(client.post(route, json=body | {name: [3, -1]}), 400, "out_of_range", f"{name}[1]")
            refused(client.post(route, json=body | {name: [3, "a"]}), 400, "wrong_type", f"{name}[1]")
        refused(client.post(route, json=body | {"allowed_token_ids": []}), 400, "out_of_range", "allowed_token_ids")


# What may be drawn


@examples
@given(allowed=st.sets(st.integers(0, 47), min_size=1), temperature=st.sampled_from([0, 0.7, 1, 2]))
def test_allowed_token_ids__draw_what_a_bias_against_all_others_draws(
    client: FlaskClient, allowed: set[int], temperature: float
) -> None:
    sent = {"allowed_token_ids": sorted(allowed), "temperature": temperature}
    text = choice(client, **sent)["text"]
    assert set(text) <= {TINY_CHARSET[one] for one in allowed}
    against = {char: -100 for one, char in enumerate(TINY_CHARSET) if one not in allowed}
    assert text == choice(client, logit_bias=against, temperature=temperature)["text"]
    assert text == joined(events(client, **sent))["text"]


def test_allowed_token_ids__change_no_neighbour_and_no_log_probability(client: FlaskClient, plain: str) -> None:
    free, only = choice(client, logprobs=3), choice(client, logprobs=3, allowed_token_ids=ids_of(plain[0]))
    assert only["text"] == plain[0] * 60
    assert only["logprobs"]["top_logprobs"][0] == free["logprobs"]["top_logprobs"][0]


def test_logit_bias__may_have_ids_as_keys(client: FlaskClient) -> None:
    assert TINY_CHARSET[12] != "1"
    assert choice(client, logit_bias={"12": 100})["text"] == TINY_CHARSET[12] * 60
    assert choice(client, logit_bias={"05": 100, "12": -3})["text"] == TINY_CHARSET[5] * 60
    for key in ("48", "100000", "ab"):
        refused(client.post("/v1/completions", json=GOOD | {"logit_bias": {key: 1}}), 400, "out_of_range", "logit_bias")
    mixed = refused(
        client.post("/v1/completions", json=GOOD | {"logit_bias": {"5": 1, "12": 1}}), 400, "out_of_range", "logit_bias"
    )
    assert "'05'" in mixed["message"]


# Prompts as ids


@examples
@given(texts=st.lists(st.text(TINY_CHARSET, max_size=9), min_size=1, max_size=3))
def test_prompts__as_ids_are_answered_as_their_texts(client: FlaskClient, texts: list[str]) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "return_token_ids": True, "echo": True, "logprobs": 1}
    by_text = complete(client, prompt=texts, **fields)
    by_ids = complete(client, prompt=[ids_of(text) for text in texts], **fields)
    assert by_ids["choices"] == by_text["choices"]
    for one, text in zip(by_ids["choices"], texts, strict=True):
        assert one["prompt_token_ids"] == ids_of(text)
        alone = choice(client, prompt=ids_of(text) if text else [[]], **fields)
        assert alone | {"index": one["index"]} == one


@pytest.mark.parametrize(
    ("prompt", "path", "code"),
    [
        ([1, 2, 99], "prompt[2]", "out_of_range"),
        ([[1], [1, 48]], "prompt[1][1]", "out_of_range"),
        ([1, "a"], "prompt[1]", "wrong_type"),
        (["a", 1], "prompt[1]", "wrong_type"),
        ([[1], "a"], "prompt[1]", "wrong_type"),
        ([[1], ["a"]], "prompt[1][0]", "wrong_type"),
        ([1, -1], "prompt[1]", "out_of_range"),
        ([1, 1.5], "prompt[1]", "wrong_type"),
        ([1, None], "prompt[1]", "wrong_type"),
        ([True], "prompt[0]", "wrong_type"),
        (5, "prompt", "wrong_type"),
        ([], "prompt", "out_of_range"),
        ([[1]] * 129, "prompt", "out_of_range"),
        ([1] * 1001, "prompt", "out_of_range"),
        ([[1], [1] * 1001], "prompt[1]", "out_of_range"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_prompt__that_is_no_list_of_ids_is_refused_by_the_place(
    client: FlaskClient, prompt: Any, path: str, code: str
) -> None:
    refused(client.post("/v1/completions", json=GOOD | {"prompt": prompt}), 400, code, path)


def test_prompt__of_ids_may_be_longer_than_other_lists(client: FlaskClient) -> None:
    """Ids don't count as values, which would bound a prompt; what they become is bounded before it is computed."""
    long = [[1] * 900] * 12
    assert sum(map(len, long)) > MAX_VALUES
    assert len(complete(client, prompt=long, max_tokens=1)["choices"]) == 12
    refused(client.post("/v1/completions", json=GOOD | {"prompt": [47] * 9000}), 400, "out_of_range", "prompt")
    refused(client.post("/v1/completions", json=GOOD | {"prompt": [70_000] * 9000}), 400, "out_of_range", "prompt[0]")
    refused(client.post("/v1/completions", json=GOOD | {"stop": [7] * 9000}), 400, "wrong_type", "stop[0]")


def test_rate_limit__counts_prompts_of_ids_as_texts() -> None:
    for texts in ("abc", ["abc", "de"]):
        ids = ids_of(texts) if isinstance(texts, str) else list(map(ids_of, texts))
        bodies = [
            CompletionBody.model_validate({"prompt": prompt, "max_tokens": 100, "n": 2}) for prompt in (texts, ids)
        ]
        assert bodies[0].num_chars(500) == bodies[1].num_chars(500) > 200


# What an answer has besides its text


@examples
@given(
    prompts=st.lists(st.text(TINY_CHARSET, max_size=12), min_size=1, max_size=2),
    num=st.sampled_from([0, 2, 20]),
    logprobs=st.sampled_from([None, 0, 5]),
    echo=st.booleans(),
    n=st.integers(1, 2),
)
def test_prompt_logprobs__are_the_echoed_ones_in_vllms_shape(
    client: FlaskClient, prompts: list[str], num: int, logprobs: int | None, echo: bool, n: int
) -> None:
    fields: dict[str, Any] = {"prompt": prompts, "max_tokens": 4, "echo": echo, "logprobs": logprobs, "n": n}
    found = complete(client, prompt_logprobs=num, **fields)["choices"]
    without = complete(client, **fields)["choices"]
    assert [{key: one[key] for key in one if key != "prompt_logprobs"} for one in found] == without
    scored = complete(client, prompt=prompts, max_tokens=0, echo=True, logprobs=num)["choices"]
    for place, one in enumerate(found):
        expected, prompt = scored[place // n]["logprobs"], prompts[place // n]
        assert len(one["prompt_logprobs"]) == len(prompt)
        for at, at_place in enumerate(one["prompt_logprobs"]):
            if at == 0:
                assert at_place is None
                continue
            own = at_place[str(TINY_CHARSET.index(prompt[at]))]
            assert own["logprob"] == expected["token_logprobs"][at]
            assert {one["decoded_token"]: one["logprob"] for one in at_place.values()} == (
                expected["top_logprobs"][at] if num else {prompt[at]: own["logprob"]}
            )
            assert sorted(one["rank"] for one in at_place.values() if one["rank"]) == list(range(1, num + 1))
            by_rank = sorted((one["rank"], -one["logprob"]) for one in at_place.values() if one["rank"])
            assert by_rank == sorted(by_rank, key=lambda pair: pair[1])


def test_prompt_logprobs__of_a_stream_are_refused_and_false_means_none(client: FlaskClient) -> None:
    body = GOOD | {"prompt_logprobs": 1, "stream": True}
    refused(client.post("/v1/completions", json=body), 400, "out_of_range", "prompt_logprobs")
    assert "prompt_logprobs" not in choice(client, prompt_logprobs=False)
    refused(client.post("/v1/completions", json=GOOD | {"prompt_logprobs": 21}), 400, "out_of_range", "prompt_logprobs")


def test_token_ids__of_several_choices_are_streamed_as_they_are_returned(client: FlaskClient) -> None:
    fields: dict[str, Any] = {"prompt": ["ROMEO:", ""], "n": 2, "return_token_ids": True, "max_tokens": 40}
    whole, stream = complete(client, **fields)["choices"], events(client, **fields)
    assert len(whole) == 4
    for one in whole:
        assert joined(stream, one["index"]) == {key: one[key] for key in one if key not in ("logprobs", "index")}
        assert one["token_ids"] == ids_of(one["text"])


@pytest.mark.parametrize("include_usage", [True, False])
def test_continuous_usage__grows_to_that_of_the_whole_answer(client: FlaskClient, include_usage: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    fields: dict[str, Any] = {"max_tokens": 400, "n": 2, "cache_salt": f"fresh{include_usage}"}
    chunks = events(client, stream_options=options, **fields)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (chunks[-1]["choices"] == []) is include_usage
    expected = complete(client, **fields | {"cache_salt": f"other{include_usage}"})["usage"]
    assert chunks[-1]["usage"] == expected
    assert chunks[-1 - include_usage]["usage"] == expected
    refused(
        client.post("/v1/completions", json=GOOD | {"stream_options": options}), 400, "out_of_range", "stream_options"
    )


def test_ids_and_usage__are_only_in_answers_that_request_them(client: FlaskClient) -> None:
    assert set(choice(client)) == {"index", "text", "logprobs", "finish_reason"}
    assert all("usage" not in chunk for chunk in events(client))


@pytest.mark.parametrize("name", ["cache_salt", "prompt_logprobs", "return_token_ids", "stream_options", "prompt", "n"])
def test_session_run__refuses_what_has_no_meaning_there(client: FlaskClient, name: str) -> None:
    session = ok(client.post("/v1/sessions", json={}), 201)["id"]
    body = {"max_tokens": 5, name: 1}
    refused(client.post(f"/v1/sessions/{session}/generate", json=body), 400, "unknown_field", name)


@pytest.mark.parametrize("logprobs", [0, 3])
def test_logprobs__of_no_characters_are_empty_streamed_and_not(client: FlaskClient, logprobs: int) -> None:
    nothing = {"prompt": ["", "ROMEO:"], "max_tokens": 0, "echo": True, "logprobs": logprobs}
    (event,) = [one for one in events(client, **nothing) if one["choices"][0]["index"] == 0]
    whole = choice(client, **nothing)["logprobs"]
    assert whole == event["choices"][0]["logprobs"]
    assert whole == {"tokens": [], "token_logprobs": [], "top_logprobs": None, "text_offset": []}


def test_prompt__that_folding_makes_too_long_is_named_by_its_place(client: FlaskClient) -> None:
    long = "a" * 998 + "…"  # an ellipsis is read as three full stops
    for prompt, path in (
        (long, "prompt"),
        (["a", long], "prompt[1]"),
        ([long], "prompt[0]"),
        (["a" * 1001], "prompt[0]"),
    ):
        body = GOOD | {"prompt": prompt, "unknown_chars": "fold"}
        refused(client.post("/v1/completions", json=body), 400, "out_of_range", path)
