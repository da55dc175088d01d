"""Log-probabilities: what is sent, how it is written, and the budget that all requests share."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from service.engine.scores import Scores
from service.errors import InvalidValue, TooManyScores
from service.generation.score_reservation import ScoreReservation
from service.model.charset import Charset
from service.settings import Settings
from service.shares import SharedBudget, work_for
from service.store.model_store import ModelStore
from service.web.api.json_pieces import logprobs_pieces
from service.web.api.responses import json_response
from tests.harness.application import client_of, ok, refused
from tests.harness.models import TINY_CHARSET
from tests.harness.server import SERVE, serving

BUDGET = 2000  # of one client
CHARSET = Charset(TINY_CHARSET)


@pytest.fixture(scope="module")
def limited(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    with client_of(Settings(model_store=tiny_store.root, model="tiny", max_scores=2 * BUDGET)) as client:
        client.post("/v1/completions", json=completion())  # the engine's thread starts with its first work
        yield client


def scores_of(num_chars: int, num_top: int) -> Scores:
    rng = np.random.default_rng(num_chars + num_top)
    top = -rng.exponential(3, (num_chars, num_top)).astype(np.float32)
    top_ids = rng.integers(0, len(CHARSET), (num_chars, num_top)).astype(np.int32)
    chosen = -rng.exponential(3, num_chars).astype(np.float32)
    if num_chars:
        chosen[0] = np.nan
    return Scores(chosen, top_ids, top)


@pytest.mark.parametrize("num_chars", [0, 1, 2, 2048, 2049, 5000])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_logprobs__are_written_in_small_pieces_of_openais_shape(num_chars: int, num_top: int) -> None:
    text = "".join(CHARSET.characters[index % len(CHARSET)] for index in range(num_chars))
    scores = scores_of(num_chars, num_top)
    pieces = list(logprobs_pieces(text, scores, CHARSET, 7))
    assert max(map(len, pieces)) < 50_000
    got = json.loads("".join(pieces))
    assert got["tokens"] == list(text)
    assert got["text_offset"] == list(range(7, 7 + num_chars))
    assert got["token_logprobs"][:1] == [None] * min(1, num_chars)
    assert got["token_logprobs"][1:] == pytest.approx(scores.chosen[1:].tolist(), abs=1e-7)
    if not num_top or not num_chars:
        assert got["top_logprobs"] is None
        return
    assert got["top_logprobs"][0] is None
    for index in range(1, num_chars):
        expected = {
            CHARSET.characters[char]: value
            for char, value in zip(scores.top_ids[index], scores.top[index].tolist(), strict=True)
        }
        expected[text[index]] = float(scores.chosen[index])
        assert got["top_logprobs"][index] == pytest.approx(expected, abs=1e-7)


def test_json_response__long_answers_are_sent_as_they_are_written() -> None:
    closed: list[int] = []
    drawn: list[int] = []

    def pieces() -> Iterator[str]:
        yield "["
        for index in range(100):
            drawn.append(index)
            yield f'"{"x" * 5000}",'
        yield "0]"

    with ExitStack() as held:
        held.callback(closed.append, 1)
        response = json_response(pieces(), held)
    assert len(drawn) < 20
    assert not closed
    assert len(json.loads(response.get_data())) == 101
    response.close()
    assert closed == [1]
    with ExitStack() as held:
        held.callback(closed.append, 2)
        short = json_response(["{", "}"], held)
    assert (short.content_length, closed) == (2, [1, 2])


def reservation_of(client: str, budget: SharedBudget) -> ScoreReservation:
    work_for(client)
    return ScoreReservation(budget)


def test_reservation__of_a_client_is_half_of_the_budget_at_most() -> None:
    budget = SharedBudget(200)
    one, other = reservation_of("a", budget), reservation_of("a", budget)
    one.require(60)
    with pytest.raises(TooManyScores):
        other.require(41)
    other.require(40)
    one.require(10)  # instead of the 60
    other.require(90)
    with pytest.raises(TooManyScores):
        one.require(11)
    assert budget.num_taken == 100  # a refusal changes nothing
    with pytest.raises(InvalidValue, match="100"):
        one.require(101)
    stranger = reservation_of("b", budget)
    stranger.require(50)  # half of the rest
    with pytest.raises(TooManyScores):
        stranger.require(51)
    work_for("")  # each gives back what its own client has
    for reservation in (one, other, one, stranger):
        reservation.release()
    assert budget.num_taken == 0


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "a", "max_tokens": 10, "logprobs": 4} | changes


FITTING = 400  # characters with 4 alternatives


def test_request__larger_than_the_budget_is_refused_on_every_route(limited: FlaskClient) -> None:
    """The characters count that are read, also those that folding adds. A client can use its whole half again."""
    ok(limited.put("/v1/sessions/s", json={"text": "a"}), 201)
    text, folded = "a" * FITTING, "a" * (FITTING - 2) + "…"  # an ellipsis is read as three full stops
    for _ in range(3):
        for path, body in (
            ("/v1/completions", completion(prompt=folded, max_tokens=0, echo=True, unknown_chars="fold")),
            ("/v1/completions", completion(prompt=text, max_tokens=1, echo=True)),
            ("/v1/completions", completion(max_tokens=FITTING + 1)),
            ("/v1/completions", completion(max_tokens=FITTING // 4, n=5)),
            ("/v1/completions", completion(max_tokens=400, n=1, best_of=6, logprobs=None)),
            ("/v1/completions", completion(max_tokens=FITTING + 1, stream=True)),
            ("/v1/sessions/s/feed", {"text": text + "a", "logprobs": 4}),
            ("/v1/sessions/s/feed", {"text": folded, "logprobs": 4, "unknown_chars": "fold"}),
            ("/v1/inspect", {"text": text + "a", "logprobs": 4}),
        ):
            error = refused(limited.post(path, json=body), 400, "out_of_range", "logprobs")
            assert str(BUDGET) in error["message"]
        for path, body in (
            ("/v1/completions", completion(prompt=text, max_tokens=0, echo=True)),
            ("/v1/completions", completion(max_tokens=FITTING)),
            ("/v1/completions", completion(max_tokens=FITTING, best_of=1)),
            ("/v1/sessions/s/feed", {"text": text, "logprobs": 4}),
            ("/v1/inspect", {"text": text, "logprobs": 4}),
        ):
            ok(limited.post(path, json=body))
        with limited.post("/v1/completions", json=completion(max_tokens=FITTING, stream=True)) as stream:
            assert b"data: [DONE]" in stream.get_data()


def test_feed__repeated_counts_only_what_it_scores(limited: FlaskClient) -> None:
    """The state at its start is stepped from a checkpoint, without scores."""
    ok(limited.put("/v1/sessions/repeated", json={"text": "ab" * 500}), 201)
    body = {"text": "ab" * 100, "position": 700, "logprobs": 8}
    repeated = ok(limited.post("/v1/sessions/repeated/feed", json=body))
    ok(limited.put("/v1/sessions/fresh", json={"text": "ab" * 350}), 201)
    assert ok(limited.post("/v1/sessions/fresh/feed", json=body)) == repeated


def test_budget__in_use_is_429_until_the_answer_is_sent(tiny_store: ModelStore) -> None:
    """A client of the real server reads the answer slowly: further scores for its address are refused meanwhile."""
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    big = completion(prompt="ab" * 15_000, max_tokens=0, echo=True, logprobs=20)
    num_scores = 30_000 * 21
    with serving(SERVE, environment | {"GRU_SERVE_MAX_SCORES": str(2 * num_scores)}) as server:
        server.call("PUT", "/v1/sessions/s", {"text": "a"})
        slow = server.open(big, receive_bytes=4096)
        try:
            head = slow.recv(100)
            assert head.startswith(b"HTTP/1.1 200 ")
            for path, body in (
                ("/v1/completions", completion()),
                ("/v1/completions", completion(stream=True)),
                ("/v1/sessions/s/feed", {"text": "a", "logprobs": 0}),
                ("/v1/inspect", {"text": "a", "logprobs": 0}),
            ):
                connection = server.connect()
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                assert (response.status, response.headers["Retry-After"]) == (429, "1")
                assert json.loads(response.read())["error"]["code"] == "too_many_scores"
                connection.close()
            assert server.call("POST", "/v1/completions", completion(logprobs=None))[0] == 200
            received = head
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # from now on it reads fast
            while part := slow.recv(1 << 20):
                received += part
                if received.endswith(b"\r\n0\r\n\r\n"):
                    break
        finally:
            slow.close()
        assert received.count(b'"a":') >= 15_000
        status, answer = server.call("POST", "/v1/completions", big)
        assert status == 200
        assert len(answer["choices"][0]["logprobs"]["top_logprobs"]) == 30_000
