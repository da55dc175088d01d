"""/v1/sessions over HTTP: the shapes of answers, and errors that name the bad field."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.errors import (
    EngineFailed,
    GruServeError,
    InvalidArtifact,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    PositionGone,
    RevisionConflict,
    RunTakenOver,
    SessionLost,
    StoreUnavailable,
)
from service.generation.run_stream import RunStream
from service.generation.runs import RunRegistry
from service.sessions.portable import StateSealer
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.application import client_of, ok, refused
from tests.harness.models import publish_tiny
from tests.harness.portable_states import changed

KEYS = "the first of the keys, the key of last year"
NUM_STATES = int(os.environ.get("BAD_STATES", "3000"))


@pytest.fixture
def session(client: FlaskClient) -> str:
    """The path of a new session, whose text is `ROMEO:`."""
    response = client.post("/v1/sessions", json={"text": "ROMEO:", "seed": 7})
    assert response.status_code == 201, response.text
    return f"/v1/sessions/{response.get_json()['id']}"


def events(response: Any) -> list[tuple[int | None, str, dict[str, Any]]]:
    """(id, kind, data) of each event of a stream."""
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    parsed = []
    for block in response.text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        number = int(fields["id"]) if "id" in fields else None
        parsed.append((number, fields["event"], json.loads(fields["data"])))
    return parsed


def test_session__is_created_described_and_deleted(client: FlaskClient) -> None:
    answer = ok(client.put("/v1/sessions/mine", json={"text": "ROMEO:", "seed": 7, "ttl_s": 90}), 201)
    created = answer.pop("created_at")
    assert answer.pop("expires_at") == pytest.approx(created + 90)
    assert answer == {
        "id": "mine",
        "object": "session",
        "model": "tiny@1",
        "position": 6,
        "seed": 7,
        "ttl_s": 90,
        "text_from": 0,
    }
    assert ok(client.get("/v1/sessions/mine"))["position"] == 6
    assert ok(client.put("/v1/sessions/mine", json={"text": "ROMEO:", "seed": 7, "ttl_s": 90}))["created_at"] == created
    refused(client.put("/v1/sessions/mine", json={"text": "ROMEO:", "seed": 8}), 409, "session_exists", "id")
    assert client.delete("/v1/sessions/mine").status_code == 204
    refused(client.get("/v1/sessions/mine"), 404, "session_not_found")
    assert client.delete("/v1/sessions/mine").status_code == 204  # the answer to the first one may have been lost
    refused(client.delete("/v1/sessions/another"), 404, "session_not_found")


def test_ids_and_seeds__are_random_by_default(client: FlaskClient) -> None:
    answers = [ok(client.post("/v1/sessions", json={}), 201) for _ in range(5)]
    assert len({answer["id"] for answer in answers}) == len({answer["seed"] for answer in answers}) == 5
    assert all(len(answer["id"]) == 32 for answer in answers)  # 128 bits
    assert all(0 <= answer["seed"] < 2**53 for answer in answers)  # JavaScript's numbers represent it exactly


def test_sessions__are_listed_in_pages(tiny_store: ModelStore) -> None:
    key, entry = new_key("alice")
    with client_of(Settings(model_store=tiny_store.root, model="tiny", api_keys=SecretStr(entry)), key) as client:
        for number in range(5):
            ok(client.put(f"/v1/sessions/page{number}", json={}), 201)
        first = ok(client.get("/v1/sessions?after=page&limit=2"))
        assert [one["id"] for one in first["data"]] == ["page0", "page1"]
        assert first["has_more"] is True
        rest = ok(client.get("/v1/sessions?after=page1&limit=3"))
        assert [one["id"] for one in rest["data"]] == ["page2", "page3", "page4"]
        assert rest["has_more"] is False


def test_feed__returns_the_distribution_of_the_next_character(client: FlaskClient, session: str) -> None:
    answer = ok(client.post(f"{session}/feed", json={"text": " what", "position": 6}))
    assert answer["position"] == 11
    assert answer["logprobs"] is None
    likelihoods = [entry["logprob"] for entry in answer["next"]]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert sum(math.exp(value) for value in likelihoods) == pytest.approx(1)  # of all characters that the model knows
    scored = ok(client.post(f"{session}/feed", json={"text": "a", "logprobs": 2, "num_next": 3}))
    assert len(scored["next"]) == 3
    assert scored["logprobs"]["tokens"] == ["a"]
    assert scored["logprobs"]["text_offset"] == [11]
    expected = next(entry["logprob"] for entry in answer["next"] if entry["char"] == "a")
    assert scored["logprobs"]["token_logprobs"] == [expected]
    empty = ok(client.post(f"{session}/feed", json={"text": "", "num_next": 3}))
    assert empty == {"position": 12, "next": scored["next"], "logprobs": None}


def test_feed__repeated_at_its_position_gets_the_same_answer(client: FlaskClient, session: str) -> None:
    body = {"text": " what", "position": 6, "logprobs": 1}
    first = ok(client.post(f"{session}/feed", json=body))
    assert ok(client.post(f"{session}/feed", json=body)) == first
    ok(client.post(f"{session}/feed", json={"text": " light"}))
    assert ok(client.post(f"{session}/feed", json=body)) == first
    for wrong in (
        {"text": " that", "position": 6},
        {"text": "a", "position": 18},
        {"text": "t light x", "position": 10},
    ):
        error = refused(client.post(f"{session}/feed", json=wrong), 409, "position_conflict", "position")
        assert error["position"] == 17
    assert ok(client.get(f"{session}/text")) == {"text": "ROMEO: what light", "from": 0, "to": 17}


def test_text__is_read_in_parts(client: FlaskClient, session: str) -> None:
    assert ok(client.get(f"{session}/text?from=1&to=4")) == {"text": "OME", "from": 1, "to": 4}
    assert ok(client.get(f"{session}/text?from=6"))["text"] == ""
    refused(client.get(f"{session}/text?from=5&to=2"), 400, "out_of_range", "from")
    refused(client.get(f"{session}/text?to=7"), 409, "position_conflict", "to")
    refused(client.get(f"{session}/text?from=-1"), 400, "out_of_range", "from")
    refused(client.get(f"{session}/text?start=1"), 400, "unknown_field", "start")


def test_generate__appends_to_the_text_of_the_session(client: FlaskClient, session: str) -> None:
    body = {"max_tokens": 50, "temperature": 0.8}
    answer = ok(client.post(f"{session}/generate", json=body))
    completion = ok(client.post("/v1/completions", json={"prompt": "ROMEO:", "seed": 7} | body))
    assert answer["text"] == completion["choices"][0]["text"]
    assert answer["sha256"] == hashlib.sha256(answer["text"].encode()).hexdigest()
    assert (answer["position"], answer["finish_reason"]) == (56, "length")
    assert answer["usage"]["completion_tokens"] == 50
    assert ok(client.get(f"{session}/text"))["text"] == "ROMEO:" + answer["text"]


def test_stream__has_positions_as_ids_and_resumes_from_each(client: FlaskClient, session: str) -> None:
    found = events(client.post(f"{session}/generate", json={"max_tokens": 300, "stream": True}))
    position = 6
    for number, kind, data in found[:-1]:
        assert kind == "text"
        position += len(data["text"])
        assert number == position
    text = "".join(data["text"] for _, _, data in found[:-1])
    number, kind, done = found[-1]
    assert (number, kind) == (306, "done")
    assert done == {
        "finish_reason": "length",
        "position": 306,
        "usage": done["usage"],
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }

    # Resume at any position, by the query or by the header that browsers send.
    for after in (6, 7, 100, 305, 306):
        for how in ({"query_string": {"after": after}}, {"headers": {"Last-Event-ID": str(after)}}):
            again = events(client.get(f"{session}/generate", **how))
            assert "".join(data["text"] for _, _, data in again[:-1]) == text[after - 6 :]
            assert again[-1] == found[-1]
    both = {"query_string": {"after": 6}, "headers": {"Last-Event-ID": "300"}}
    assert events(client.get(f"{session}/generate", **both))[0][2]["text"] == text[294:]
    assert events(client.get(f"{session}/generate"))[0][2]["text"] == text


@pytest.mark.parametrize(
    ("error", "may_be_resumed"),
    [
        (EngineFailed, True), (NotReady, True), (Overloaded, True), (StoreUnavailable, True), (OutcomeUnknown, True),
        (RunTakenOver, False), (RevisionConflict, False), (SessionLost, False), (PositionGone, False),
        (InvalidArtifact, False),
    ],
)  # fmt: skip
def test_stream__says_whether_it_may_be_resumed_after_its_error(
    client: FlaskClient, session: str, monkeypatch: pytest.MonkeyPatch, error: type[GruServeError], may_be_resumed: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("it failed")

    with monkeypatch.context() as patched:
        patched.setattr(RunStream, "chunks", fail)
        response = client.post(f"{session}/generate", json={"max_tokens": 5, "stream": True})
        (data,) = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        response.close()
    shown = json.loads(data)["error"]
    assert shown["code"] == error.code
    assert shown.get("retry", False) is may_be_resumed


def test_resume__without_a_run_or_at_a_bad_position_is_refused(client: FlaskClient, session: str) -> None:
    refused(client.get(f"{session}/generate?after=6"), 409, "no_run")
    ok(client.post(f"{session}/generate", json={"max_tokens": 10}))
    assert refused(client.get(f"{session}/generate?after=17"), 409, "position_conflict", "after")["position"] == 16
    client.post(f"{session}/feed", json={"text": "ab"})  # the position is the length of the text, here too
    assert refused(client.get(f"{session}/generate?after=17"), 409, "position_conflict", "after")["position"] == 18
    for bad in ("x", "-1", "1.5", "", "1" * 17, "²"):
        headers = {"Last-Event-ID": bad.encode().decode("latin-1")}
        refused(client.get(f"{session}/generate", headers=headers), 400, "out_of_range", "Last-Event-ID")
    refused(client.get("/v1/sessions/nobody/generate?after=6"), 404, "session_not_found")


def test_take_over__is_true_or_false(client: FlaskClient, session: str) -> None:
    ok(client.post(f"{session}/generate", json={"max_tokens": 10}))
    for word in ("true", "false"):
        assert events(client.get(f"{session}/generate?after=6&take_over={word}"))[-1][1] == "done"
    for word in ("1", "0", "False", "yes", "", "maybe"):
        error = refused(client.get(f"{session}/generate?take_over={word}"), 400, "out_of_range", "take_over")
        assert "true or false" in error["message"]


def test_head__does_not_take_over_a_stream(client: FlaskClient, session: str) -> None:
    stream = client.post(f"{session}/generate", json={"max_tokens": 500, "stream": True})
    assert client.head(f"{session}/generate").status_code == 405
    assert b"event: done" in stream.data


def test_stop__is_not_sent_and_not_part_of_the_text(client: FlaskClient, session: str) -> None:
    whole = ok(client.post(f"{session}/generate", json={"max_tokens": 80}))["text"]
    ok(client.post(f"{session}/rewind", json={"position": 6}))
    stop = whole[40:43]
    found = events(client.post(f"{session}/generate", json={"max_tokens": 80, "stop": stop, "stream": True}))
    before = whole[: whole.index(stop)]
    assert "".join(data["text"] for _, _, data in found[:-1]) == before
    assert found[-1][0] == found[-1][2]["position"] == 6 + len(before)
    assert found[-1][2]["finish_reason"] == "stop"
    assert ok(client.get(f"{session}/text"))["text"] == "ROMEO:" + before


def test_rewind_and_fork__give_the_same_continuation_with_the_same_seed(client: FlaskClient, session: str) -> None:
    whole = ok(client.post(f"{session}/generate", json={"max_tokens": 60}))["text"]
    fork = ok(client.post(f"{session}/fork", json={"id": "branch", "position": 20, "seed": 9}), 201)
    assert (fork["id"], fork["position"], fork["seed"]) == ("branch", 20, 9)
    assert ok(client.post(f"{session}/fork", json={"id": "branch", "position": 20, "seed": 9}))["id"] == "branch"
    other = ok(client.post("/v1/sessions/branch/generate", json={"max_tokens": 46}))["text"]
    same = ok(client.post(f"{session}/fork", json={"position": 20}), 201)["id"]
    assert ok(client.post(f"/v1/sessions/{same}/generate", json={"max_tokens": 46}))["text"] == whole[14:]
    assert other != whole[14:]
    assert ok(client.post(f"{session}/rewind", json={"position": 20}))["position"] == 20
    assert ok(client.post(f"{session}/generate", json={"max_tokens": 46}))["text"] == whole[14:]
    assert refused(client.post(f"{session}/rewind", json={"position": 99}), 409, "position_conflict", "position")
    assert refused(client.post(f"{session}/fork", json={"position": 99}), 409, "position_conflict", "position")


def test_portable_state__continues_as_its_session_does(client: FlaskClient, session: str) -> None:
    answer = ok(client.get(f"{session}/state"))
    assert (answer["model"], answer["position"], answer["seed"], answer["expires_at"]) == ("tiny@1", 6, 7, None)
    copy = ok(client.post("/v1/sessions", json={"state": answer["state"]}), 201)
    assert (copy["position"], copy["text_from"], copy["seed"]) == (6, 6, 7)
    path = f"/v1/sessions/{copy['id']}"
    body = {"max_tokens": 40}
    assert ok(client.post(f"{path}/generate", json=body)) == ok(client.post(f"{session}/generate", json=body))
    refused(client.post(f"{path}/rewind", json={"position": 5}), 410, "position_gone")
    refused(client.get(f"{path}/text?from=5"), 410, "position_gone")
    ok(client.post("/v1/sessions", json={"state": answer["state"], "model": "tiny", "text": "abc", "seed": 1}), 201)
    limited = ok(client.get(f"{session}/state?ttl_s=0.0001"))
    refused(client.post("/v1/sessions", json={"state": limited["state"]}), 400, "state_expired", "state")


def test_portable_state__that_is_bad_is_refused(tiny_store: ModelStore) -> None:
    """Altered states; states of another key, model, size or time; impossible ones. BAD_STATES=100000 tests more."""
    chance, keys = random.Random(1), [key.strip() for key in KEYS.split(",")]
    ours, foreign = StateSealer(keys), StateSealer(["the key of another server"])
    settings = Settings(model_store=tiny_store.root, model="tiny", state_keys=KEYS, log_level="error")
    with client_of(settings) as client:
        ok(client.put("/v1/sessions/a", json={"text": "ROMEO:"}), 201)
        good = ok(client.get("/v1/sessions/a/state"))["state"]
        opened = ours.open(good)
        header, hidden = opened.header, opened.hidden(opened.header.identity, (1, 16), "tiny@1")
        makers: list[Callable[[], str]] = [
            *[lambda: changed(good, chance)] * 6,
            lambda: foreign.seal(header, hidden),
            lambda: ours.seal(header.model_copy(update={"identity": f"{chance.getrandbits(256):064x}"}), hidden),
            lambda: ours.seal(
                header.model_copy(update={"model": f"m{chance.getrandbits(32)}@1", "identity": ""}), hidden
            ),
            lambda: ours.seal(header.model_copy(update={"expires_at": chance.random() * 1.7e9}), hidden),
            lambda: ours.seal(header, np.resize(hidden, (1, chance.choice([0, 1, 15, 17, 32, 4096])))),
            lambda: ours.seal(header, hidden * np.float32(chance.choice([np.nan, np.inf, 1e30, -50]))),
        ]
        expected = {
            (400, "invalid_state"), (400, "state_model_mismatch"), (400, "state_expired"), (404, "model_not_found")
        }  # fmt: skip
        refusals = set()
        for _ in range(NUM_STATES):
            bad = chance.choice(makers)()
            if bad != good:
                response = client.post("/v1/sessions", json={"state": bad})
                refusals.add((response.status_code, response.get_json()["error"]["code"]))
        assert refusals == expected
        assert "\ngru_serve:sessions 1.0\n" in client.get("/metrics").text


@pytest.fixture
def replicas(tiny_store: ModelStore) -> Iterator[list[FlaskClient]]:
    """Three servers. The first two share a state key, the third has a random one."""
    with ExitStack() as stack:
        clients = []
        for keys in (KEYS, KEYS.split(",")[1], ""):
            app = create_app(Settings(model_store=tiny_store.root, model="tiny", state_keys=keys))
            stack.callback(app.extensions["gru_serve"].close)
            clients.append(app.test_client())
        yield clients


def test_state_keys__are_shared_between_servers_and_rotated(replicas: list[FlaskClient]) -> None:
    first, second, third = replicas
    created = ok(second.post("/v1/sessions", json={"text": "ROMEO:"}), 201)
    old = ok(second.get(f"/v1/sessions/{created['id']}/state"))["state"]
    copy = ok(first.post("/v1/sessions", json={"state": old}), 201)
    new = ok(first.get(f"/v1/sessions/{copy['id']}/state"))["state"]
    refused(second.post("/v1/sessions", json={"state": new}), 400, "invalid_state", "state")
    refused(third.post("/v1/sessions", json={"state": new}), 400, "invalid_state", "state")


BAD = [
    ("post", "", {"model": "nobody"}, 404, "model_not_found", "model"),
    ("post", "", {"text": "é"}, 400, "unknown_characters", "text"),
    ("post", "", {"text": 5}, 400, "wrong_type", "text"),
    ("post", "", {"text": "a" * 1001}, 400, "out_of_range", "text"),
    ("post", "", {"seed": 2**63}, 400, "out_of_range", "seed"),
    ("post", "", {"ttl_s": 0.5}, 400, "out_of_range", "ttl_s"),
    ("post", "", {"ttl_s": 10**9}, 400, "out_of_range", "ttl_s"),
    ("post", "", {"id": "x"}, 400, "unknown_field", "id"),
    ("post", "", {"state": "x"}, 400, "invalid_state", "state"),
    ("post", "", {"state": ""}, 400, "invalid_state", "state"),
    ("post", "", {"unknown_chars": "guess"}, 400, "out_of_range", "unknown_chars"),
    ("put", "/.hidden", {}, 400, "out_of_range", "id"),
    ("put", "/" + "x" * 129, {}, 400, "out_of_range", "id"),
    ("put", "/a%20b", {}, 400, "out_of_range", "id"),
    ("get", "?limit=0", None, 400, "out_of_range", "limit"),
    ("get", "?limit=1001", None, 400, "out_of_range", "limit"),
    ("get", "?limit=1&limit=2", None, 400, "bad_request", "limit"),
    ("get", "/S/text?to=1&from=0&from=1", None, 400, "bad_request", "from"),
    ("get", "/S/state?x=1&x=1", None, 400, "bad_request", "x"),
    ("post", "/S/feed", {}, 400, "missing_field", "text"),
    ("post", "/S/feed", {"text": "é"}, 400, "unknown_characters", "text"),
    ("post", "/S/feed", {"text": "a", "position": -1}, 400, "out_of_range", "position"),
    ("post", "/S/feed", {"text": "a", "position": 1.5}, 400, "wrong_type", "position"),
    ("post", "/S/feed", {"text": "a", "logprobs": 21}, 400, "out_of_range", "logprobs"),
    ("post", "/S/feed", {"text": "a", "num_next": 1001}, 400, "out_of_range", "num_next"),
    ("post", "/S/feed", {"text": "a", "rebase": "nobody"}, 404, "model_not_found", "rebase"),
    ("post", "/S/generate", {"max_tokens": 0}, 400, "out_of_range", "max_tokens"),
    ("post", "/S/generate", {"max_tokens": 501}, 400, "out_of_range", "max_tokens"),
    ("post", "/S/generate", {"prompt": "a"}, 400, "unknown_field", "prompt"),
    ("post", "/S/generate", {"temperature": -1}, 400, "out_of_range", "temperature"),
    ("post", "/S/generate", {"logit_bias": {"é": 1}}, 400, "unknown_characters", "logit_bias"),
    ("post", "/S/generate", {"n": 2}, 400, "unknown_field", "n"),
    ("post", "/S/rewind", {}, 400, "missing_field", "position"),
    ("post", "/S/rewind", {"position": "3"}, 400, "wrong_type", "position"),
    ("post", "/S/fork", {"id": "a/b"}, 400, "out_of_range", "id"),
    ("get", "/S/state?ttl_s=0", None, 400, "out_of_range", "ttl_s"),
    ("get", "/S/state?ttl_s=nan", None, 400, "out_of_range", "ttl_s"),
    ("post", "/nobody/feed", {"text": "a"}, 404, "session_not_found", None),
    ("post", "/nobody/generate", {}, 404, "session_not_found", None),
    ("post", "/nobody/rewind", {"position": 1}, 404, "session_not_found", None),
    ("post", "/nobody/fork", {}, 404, "session_not_found", None),
    ("get", "/nobody/state", None, 404, "session_not_found", None),
    ("get", "/nobody/text", None, 404, "session_not_found", None),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code", "param"), BAD)
def test_bad_input__is_refused_and_changes_nothing(
    client: FlaskClient, session: str, method: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    path = "/v1/sessions" + path.replace("/S", "/" + session.rsplit("/", 1)[1])
    refused(client.open(path, method=method.upper(), json=body), status, code, param)
    assert ok(client.get(session))["position"] == 6


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/score", {"candidates": ["a"]}, "model"),
        ("/v1/inspect", {"text": "a"}, "model"),
        ("/v1/sessions", {}, "model"),
        ("/tokenize", {"prompt": "a"}, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/detokenize", {"tokens": [1]}, "model"),
        ("/S/feed", {"text": ""}, "rebase"),
    ],
)
def test_unknown_model__is_told_from_an_unknown_session_by_code_and_field(
    client: FlaskClient, session: str, path: str, body: dict[str, Any], param: str
) -> None:
    path = path.replace("/S", session)
    for name in ("nobody", "tiny@99", "tiny@nobody", "a b", "tiny@", "@1"):
        error = refused(client.post(path, json=body | {param: name}), 404, "model_not_found", param)
        assert error["message"].startswith(f"{param}: ")
    refused(client.post(path, json=body | {param: "x" * 201}), 400, "out_of_range", param)
    refused(client.post(path, json=body | {param: 1}), 400, "wrong_type", param)
    if path != "/v1/chat/completions" and "messages" not in body:  # this model has no template
        for default in ("", None):
            assert client.post(path, json=body | {param: default}).status_code in (200, 201)
    lost = client.post("/v1/sessions/nobody/feed", json={"text": "", "rebase": "nobody"})
    refused(lost, 404, "session_not_found")  # the session is looked for first


def test_unknown_chars__are_folded_or_dropped_on_request(client: FlaskClient, session: str) -> None:
    assert ok(client.post(f"{session}/feed", json={"text": "é—", "unknown_chars": "fold"}))["position"] == 8
    assert ok(client.post(f"{session}/feed", json={"text": "é—a", "unknown_chars": "drop"}))["position"] == 9
    assert ok(client.get(f"{session}/text"))["text"] == "ROMEO:e-a"


def test_log__does_not_have_session_ids(client: FlaskClient, session: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        ok(client.get(session))
    assert session.rsplit("/", 1)[1] not in caplog.text
    assert "/v1/sessions/<id>" in caplog.text


def test_full_store__refuses_new_sessions_only_if_all_are_in_use(tiny_store: ModelStore) -> None:
    endless = 10_000_000
    settings = Settings(
        model_store=tiny_store.root, model="tiny", max_sessions=2, max_tokens=endless, session_text_chars=endless
    )
    with client_of(settings) as client:
        for name in ("a", "b", "c"):
            ok(client.put(f"/v1/sessions/{name}", json={}), 201)
        error = refused(client.get("/v1/sessions/a"), 410, "session_gone")
        assert "evicted" in error["message"]
        body = {"max_tokens": endless - 2000, "stream": True}
        streams = [client.post(f"/v1/sessions/{name}/generate", json=body) for name in ("b", "c")]
        refused(client.put("/v1/sessions/d", json={}), 429, "overloaded")
        refused(client.post("/v1/sessions/b/feed", json={"text": "a"}), 409, "session_busy")
        for stream in streams:
            stream.close()
        ok(client.put("/v1/sessions/d", json={}), 201)


def test_position__before_the_retained_text_is_gone(tiny_store: ModelStore) -> None:
    settings = Settings(model_store=tiny_store.root, model="tiny", session_text_chars=1024, session_checkpoint_chars=64)
    with client_of(settings) as client:
        ok(client.put("/v1/sessions/a", json={"text": "abc" * 500}), 201)
        start = ok(client.get("/v1/sessions/a"))["text_from"]
        assert start == (1500 - 1024) // 256 * 256
        for path, body in (("rewind", {"position": start - 1}), ("fork", {"position": 0})):
            refused(client.post(f"/v1/sessions/a/{path}", json=body), 410, "position_gone")
        refused(client.post("/v1/sessions/a/feed", json={"text": "abc", "position": 0}), 410, "position_gone")
        assert ok(client.post("/v1/sessions/a/rewind", json={"position": start}))["position"] == start
        error = refused(
            client.post("/v1/sessions/a/generate", json={"max_tokens": 769}), 400, "out_of_range", "max_tokens"
        )
        assert "768" in error["message"]


def test_generate__biases_belong_to_the_model_that_the_lease_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session moves to a model with fewer characters after the route has read the request, and before it leases."""
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "few", charset=" ab")
    generate = RunRegistry.generate

    def move_first(*arguments: Any, **options: Any) -> RunStream:
        moving = threading.Thread(target=move)  # a thread of its own, because this one has a request's context
        moving.start()
        moving.join()
        return generate(*arguments, **options)

    def move() -> None:
        with client.application.test_client() as other:
            ok(other.post("/v1/sessions/s/feed", json={"text": "", "rebase": "few", "num_next": 0}))

    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:
        ok(client.put("/v1/sessions/s", json={"text": "ab"}), 201)
        with monkeypatch.context() as patch:
            patch.setattr(RunRegistry, "generate", move_first)
            body = {"max_tokens": 40, "logit_bias": {"z": 1.0}}
            refused(client.post("/v1/sessions/s/generate", json=body), 400, "unknown_characters", "logit_bias")
        forced = ok(client.post("/v1/sessions/s/generate", json={"max_tokens": 40, "logit_bias": {"b": 100.0}}))
        assert forced["text"] == "b" * 40
        ok(client.get("/readyz"))
