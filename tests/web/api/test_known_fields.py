"""What clients of other servers send: neutral values change nothing, and everything else is refused by its path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from service.web.api.completions.schemas import CompletionBody
from service.web.api.known_fields import OTHER_NAMES, Anyway, ClientFields, Only, mark_of
from service.web.api.schemas import Body
from service.web.gate.body_json import MAX_VALUES, BodyJson
from tests.harness.application import ok, refused

GOOD: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 8, "seed": 7}
# The fields of POST /v1/completions as OpenAI (API reference, 2025) and vLLM 0.12 document them.
OPENAI = """best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop
stream stream_options suffix temperature top_p user"""
VLLM = """use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens allowed_token_ids
prompt_logprobs prompt_embeds add_special_tokens response_format structured_outputs priority request_id
return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs logits_processors bad_words"""
# Bodies as clients send them: their benchmarks, their defaults.
CLIENTS: dict[str, dict[str, Any]] = {
    "vllm bench": {"repetition_penalty": 1.0, "ignore_eos": True, "logprobs": None, "stream_options": None},
    "aiperf": {"prompt": ["ROMEO:"], "ignore_eos": True, "stream": False},
    "langchain": {"temperature": 1.0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "best_of": 1}
    | {"logit_bias": None, "logprobs": None},
    "vercel": {"echo": None, "logit_bias": None, "suffix": None, "user": None, "stop": None},
    "litellm": {"user": "me", "metadata": {"run": 1}},
    "llama.cpp": {"mirostat": 0, "typical_p": 1.0, "cache_prompt": True, "dry_multiplier": 0.0, "min_p": 0.0},
    "openai": {"store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y"},
    "switched off": {"top_k": -1, "suffix": "", "model": "", "logprobs": False, "max_tokens": 8.0},
}  # fmt: skip


def text(client: FlaskClient, **changes: Any) -> str:
    """The text of the answer to `GOOD` with some fields changed."""
    choice: dict[str, str] = ok(client.post("/v1/completions", json=GOOD | changes))["choices"][0]
    return choice["text"]


@pytest.mark.parametrize("sent", CLIENTS.values(), ids=CLIENTS)
def test_clients__are_answered_as_without_their_extra_fields(client: FlaskClient, sent: dict[str, Any]) -> None:
    assert text(client, **sent) == text(client)


def test_streams_of_benchmarks__have_what_they_count(client: FlaskClient) -> None:
    """guidellm reads the usage of each event; the benchmarks of vLLM and SGLang that of the last."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    guidellm = {"stream": True, "stream_options": options, "ignore_eos": True, "stop": None}
    others = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "logprobs": None}
    for sent in (guidellm, others | {"repetition_penalty": 1.0}):
        response = client.post("/v1/completions", json=GOOD | sent)
        *parts, done, rest = response.text.split("\n\n")
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
        assert (response.status_code, done, rest) == (200, "data: [DONE]", "")
        assert "".join(one["text"] for chunk in chunks for one in chunk["choices"]) == text(client)
        assert chunks[-1]["usage"]["completion_tokens"] == 8
        assert all((chunk["usage"] is not None) is (sent is guidellm) for chunk in chunks[:-1])


def test_fields__of_openai_and_vllm_are_known() -> None:
    assert set(OPENAI.split()) | set(VLLM.split()) <= set(CompletionBody.model_fields)


def accepted_values() -> st.SearchStrategy[tuple[str, Any]]:
    """Fields without an effect, each with a value that is accepted."""

    def values(name: str) -> st.SearchStrategy[Any]:
        mark, kind = mark_of(ClientFields.model_fields[name]), str(ClientFields.model_fields[name].annotation)
        if isinstance(mark, Only):
            return st.sampled_from([*mark.values, None])
        of_kind = {"bool": st.booleans(), "int": st.integers(), "dict": st.dictionaries(st.text(), st.integers())}
        return next((one for word, one in of_kind.items() if word in kind), st.text(max_size=256)) | st.none()

    names = sorted(ClientFields.model_fields)
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), values(name)))


@settings(max_examples=60)
@given(st.lists(accepted_values(), max_size=8).map(dict))
def test_accepted_values__change_nothing(client: FlaskClient, sent: dict[str, Any]) -> None:
    assert text(client, **sent) == text(client)


@pytest.mark.parametrize("name", ClientFields.model_fields)
def test_accepted_fields__refuse_what_they_do_not_accept_and_say_why(client: FlaskClient, name: str) -> None:
    mark = mark_of(ClientFields.model_fields[name])
    if isinstance(mark, Only):
        other = {bool: True, int: 3, float: 3, dict: {"a": 1}, list: ["a"], str: "x"}
        wrong = other[type(mark.values[0])] if mark.values else "x"
        error = refused(client.post("/v1/completions", json=GOOD | {name: wrong}), 400, "unsupported_value", name)
        assert error["message"].endswith(mark.why)
    assert isinstance(mark, Only | Anyway)
    refused(client.post("/v1/completions", json=GOOD | {name: [[1]]}), 400, *refusal_of_lists(name))


def refusal_of_lists(name: str) -> tuple[str, str]:
    """Code and path of the error about a list of lists, which no field without an effect accepts."""
    kind = ClientFields.model_fields[name].annotation
    if kind is Any:
        return "unsupported_value", name
    return "wrong_type", f"{name}[0]" if "list" in str(kind) else name


NESTED = [
    ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "include_usage"),
    ({"stream": True, "stream_options": {"foo": True}}, "stream_options.foo", None),
    ({"max_tokns": 5}, "max_tokns", "max_tokens"),
    ({"n_predict": 5}, "n_predict", "max_tokens"),
    ({"repeat_penalty": 1.1}, "repeat_penalty", "repetition_penalty"),
    ({"zzz": None}, "zzz", None),
]


@pytest.mark.parametrize(("sent", "path", "nearest"), NESTED, ids=lambda value: str(value)[:30])
def test_unknown_field__is_refused_by_its_path_with_the_nearest_name(
    client: FlaskClient, sent: dict[str, Any], path: str, nearest: str | None
) -> None:
    error = refused(client.post("/v1/completions", json=GOOD | sent), 400, "unknown_field", path)
    assert error["message"].startswith(f"{path}: ")
    assert error["message"].endswith(f"; did you mean {nearest}?" if nearest else "unknown or not supported")


def test_other_names__lead_to_fields_that_exist_and_are_no_fields_themselves() -> None:
    assert set(OTHER_NAMES.values()) <= set(CompletionBody.model_fields)
    assert not set(OTHER_NAMES) & set(CompletionBody.model_fields)


@pytest.mark.parametrize(
    ("sent", "path", "code"),
    [
        ({"stop": ["a", 5]}, "stop[1]", "wrong_type"),
        ({"stop": ["a", ""]}, "stop[1]", "out_of_range"),
        ({"prompt": ["a", 3]}, "prompt[1]", "wrong_type"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "wrong_type"),
        ({"logit_bias": {"a": "1"}}, "logit_bias", "wrong_type"),  # a key of the client's own is no path of a schema
        ({"stop": 5}, "stop", "wrong_type"),
    ],
    ids=str,
)
def test_wrong_value__is_named_by_its_path(client: FlaskClient, sent: dict[str, Any], path: str, code: str) -> None:
    refused(client.post("/v1/completions", json=GOOD | sent), 400, code, path)


def test_top_p_0__is_greedy(client: FlaskClient) -> None:
    assert {text(client, top_p=0, seed=seed) for seed in range(3)} == {text(client, temperature=0)}


@settings(max_examples=200)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63))
def test_numbers__without_a_fraction_are_integers_and_others_what_they_were(number: float) -> None:
    parsed = BodyJson.loads(None, json.dumps({"number": number}))["number"]  # type: ignore[arg-type]
    assert parsed == number
    is_whole = isinstance(number, int) or (number.is_integer() and abs(number) <= 2**53)
    assert isinstance(parsed, int if is_whole else float)


# What bounds the errors about a body, which take more memory than the body


def bodies(kind: type[BaseModel] = Body) -> Iterator[type[BaseModel]]:
    """Every schema of a request body."""
    for child in kind.__subclasses__():
        yield child
        yield from bodies(child)


def lists_in(schema: Any) -> Iterator[dict[str, Any]]:
    """The lists in a core schema of pydantic."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        for part in schema.values():
            yield from lists_in(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from lists_in(part)


def test_lists__of_every_body_have_few_elements_or_end_at_their_first_error() -> None:
    """A megabyte of numbers that are all wrong would be refused one by one, with 600 bytes for each."""
    for body in bodies():
        for found in lists_in(body.__pydantic_core_schema__):
            is_bounded = found.get("fail_fast") or found.get("max_length", MAX_VALUES + 1) <= MAX_VALUES
            assert is_bounded, f"a list of {body.__name__}"
