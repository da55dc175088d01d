"""The wire contract of errors: every code with its status, and a tree of categories that decides it."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from service import errors
from service.errors import GruServeError
from service.web.gate import error_responses
from service.web.gate.error_responses import STATUS, STATUS_OF_CATEGORY, body_of, error_body, error_response, status_of
from tests.harness.application import refused

# What clients rely on. A line may be added; none may change.
CONTRACT = {
    "bad_request": 400,
    "invalid_json": 400,
    "invalid_state": 400,
    "missing_field": 400,
    "no_chat_template": 400,
    "out_of_range": 400,
    "state_expired": 400,
    "state_model_mismatch": 400,
    "unknown_characters": 400,
    "unknown_field": 400,
    "unsupported_value": 400,
    "wrong_type": 400,
    "invalid_api_key": 401,
    "forbidden": 403,
    "host_not_allowed": 403,
    "listing_needs_keys": 403,
    "origin_not_allowed": 403,
    "model_not_found": 404,
    "not_found": 404,
    "session_not_found": 404,
    "method_not_allowed": 405,
    "incomplete_body": 408,
    "model_changed": 409,
    "no_run": 409,
    "position_conflict": 409,
    "revision_conflict": 409,
    "run_taken_over": 409,
    "session_busy": 409,
    "session_exists": 409,
    "session_lost": 409,
    "position_gone": 410,
    "session_gone": 410,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "overloaded": 429,
    "rate_limited": 429,
    "too_many_scores": 429,
    "too_many_streams": 429,
    "client_gone": 499,
    "internal_error": 500,
    "draining": 503,
    "engine_failed": 503,
    "invalid_artifact": 503,
    "not_ready": 503,
    "session_store_unavailable": 503,
    "store_error": 503,
    "outcome_unknown": 504,
}
# No request causes these; if one did, it would be our mistake.
OPERATOR_CODES = {
    "address_unusable",
    "invalid_charset",
    "invalid_checkpoint",
    "invalid_corpus",
    "invalid_model_file",
    "invalid_settings",
    "missing_library",
    "training_diverged",
    "training_failed",
    "unsupported_model",
}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GruServeError)]
CODED = [kind for kind in KINDS if "code" in vars(kind)]
CATEGORIES = [kind for kind in KINDS if kind not in CODED]


def test_status__of_every_code_is_as_published() -> None:
    assert STATUS == CONTRACT


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.__name__)
def test_status__of_an_error_and_of_its_code_are_the_same(kind: type[GruServeError]) -> None:
    assert status_of(kind) == CONTRACT.get(kind.code, 500)
    assert (kind.code in CONTRACT) != (kind.code in OPERATOR_CODES)


def test_status__of_a_subclass_is_its_parents() -> None:
    class Special(errors.SessionBusy):
        pass

    assert status_of(Special) == 409


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        (errors.InvalidValue, "invalid_request_error"),
        (errors.Overloaded, "rate_limit_error"),
        (errors.StoreUnavailable, "server_error"),
        (errors.InvalidArtifact, "server_error"),
        (errors.InvalidCorpus, "server_error"),
    ],
)
def test_body__has_the_type_of_its_status(kind: type[GruServeError], type_: str) -> None:
    assert body_of(kind("x"))["error"]["type"] == type_
    assert body_of(kind("x")) == error_body(body_of(kind("x"))["error"]["message"], kind.code)


def test_error_tree__every_code_belongs_to_one_class_below_one_category() -> None:
    assert len({kind.code for kind in CODED}) == len(CODED)
    for kind in set(CODED) - {GruServeError, errors.ClientGone, errors.OutcomeUnknown}:
        assert len([category for category in CATEGORIES if issubclass(kind, category)]) == 1, kind
    assert all(kind in STATUS_OF_CATEGORY or kind is errors.OperatorError for kind in CATEGORIES)


def test_error_tree__the_drawing_names_every_class_with_its_place_and_code() -> None:
    drawn: dict[str, str] = {}  # class -> the drawn class above it
    above: list[str] = []
    text = errors.__doc__ or ""
    for line in text.splitlines():
        words = line.strip(" │├└─").split()
        if not words or not hasattr(errors, words[0]):
            continue
        depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
        above[depth:] = [words[0]]
        drawn[words[0]] = above[depth - 1] if depth else "Exception"
        kind = getattr(errors, words[0])
        if kind in CODED and kind is not GruServeError:
            assert words[1].rstrip(":") == kind.code
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "caught_by"),
    [
        (errors.UnknownCharacters, errors.InvalidValue),
        (errors.StateExpired, errors.InvalidState),
        (errors.StateModelMismatch, errors.InvalidState),
    ],
)
def test_error_tree__special_errors_are_caught_as_their_general_one(
    kind: type[GruServeError], caught_by: type[GruServeError]
) -> None:
    assert issubclass(kind, caught_by)
    assert not issubclass(errors.InvalidState, errors.InvalidValue)


def test_errors__that_pass_by_themselves_say_when_to_try_again() -> None:
    """A session is busy until another operation ends; other conflicts stay."""
    with Flask("errors").test_request_context():
        for code, status in STATUS.items():
            is_temporary = status in (429, 503) or code == "session_busy"
            assert ("Retry-After" in error_response("message", code).headers) == is_temporary, code


@pytest.mark.parametrize(
    ("path", "code", "param"),
    [
        ("/v1/sessions/a/text?from=a", "out_of_range", "from"),
        ("/v1/sessions/a/state?ttl_s=-1", "out_of_range", "ttl_s"),
        ("/v1/sessions/a/generate?take_over=maybe", "out_of_range", "take_over"),
        ("/readyz?part=x", "out_of_range", "part"),
        ("/tokenizer_info?models=x", "unknown_field", "models"),
        ("/v1/models/" + "a" * 201, "out_of_range", "id"),
    ],
)
@pytest.mark.parametrize("content_type", [None, "application/json"])
def test_query__that_is_wrong_is_named_also_if_the_request_declares_a_body_that_it_has_not(
    client: FlaskClient, path: str, code: str, param: str, content_type: str | None
) -> None:
    refused(client.get(path, content_type=content_type), 400, code, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a", "logit_bias": {f"k{place}": [] for place in range(1000)}}, "logit_bias"),
        ("completions", {"prompt": "a", "stream_options": dict.fromkeys(map(str, range(3000)), 1)}, "stream_options.0"),
        ("chat/completions", {"messages": [dict.fromkeys(map(str, range(3000)), 1)]}, "messages[0].role"),
    ],
)
def test_body__with_thousands_of_errors_costs_no_more_than_one_with_a_few(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object], param: str
) -> None:
    """Each error's path took a third of a millisecond: 40 KB took more than a second, in which all others waited."""
    find, found = error_responses._path, []

    def counted(*arguments: Any) -> tuple[str | int, ...]:
        found.append(find(*arguments))
        return found[-1]

    monkeypatch.setattr(error_responses, "_path", counted)
    response = client.post(f"/v1/{path}", json=body)
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, param)
    assert 1 <= len(found) <= 32


def test_unknown_field__with_an_endless_name_is_not_compared_with_the_known_ones(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of a megabyte took half a second, in which all others waited."""
    compared: list[int] = []

    def close(word: str, *_: object) -> list[str]:
        compared.append(len(word))
        return []

    monkeypatch.setattr(error_responses, "get_close_matches", close)
    for length in (10, 5000):
        name = "n" * length
        for body in ({name: 1}, {"stream": True, "stream_options": {name: 1}}):
            error = client.post("/v1/completions", json={"prompt": "a"} | body).get_json()["error"]
            assert (error["code"], error["param"].rpartition(".")[2]) == ("unknown_field", name[:80])
        assert client.get(f"/v1/{name}").status_code == 404
    assert compared == [10, 10, len("/v1/") + 10]
