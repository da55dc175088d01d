"""Completions, chats and scores of both clients, against servers that a test plays, and the connections of asyncio."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import pytest

from service.client import (
    AsyncClient,
    Client,
    Conflict,
    Gone,
    InvalidRequest,
    NotFound,
    NotPermitted,
    Overloaded,
    ServerError,
    ServerFailed,
    StreamBroken,
)
from tests.harness.played_server import head, played
from tests.harness.programs import free_port

Item = TypeVar("Item")

JSON, STREAM = head("application/json"), head("text/event-stream")
MAKER = {"id": "cmpl-1", "model": "tiny@1", "system_fingerprint": "fp_1"}
USAGE = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2}}


class Awaited:
    """AsyncClient with the calls of Client: each runs in one event loop of another thread."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def run(*arguments: Any, **fields: Any) -> Any:
            result = call(*arguments, **fields)
            if isinstance(result, AsyncGenerator):
                return self._iterate(result)
            return self._wait(result)

        return run

    def close(self) -> None:
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def _iterate(self, items: AsyncGenerator[Item]) -> Generator[Item]:
        async def following() -> tuple[Item] | None:
            async for item in items:
                return (item,)
            return None

        try:
            while (found := self._wait(following())) is not None:
                yield found[0]
        finally:
            self._wait(items.aclose())


@contextmanager
def connected(kind: type[Client | Awaited], url: str, **options: Any) -> Iterator[Any]:
    """A client of either kind, whose calls block."""
    client = kind(url, **options)
    try:
        yield client
    finally:
        client.close()


both = pytest.mark.parametrize("kind", [Client, Awaited])


def chunk(text: str, finish_reason: str | None = None, **changes: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return f"data: {json.dumps(MAKER | {'choices': [choice]} | changes)}\n\n".encode()


END = f"data: {json.dumps(MAKER | {'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n".encode()


def body_of(request: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
    return body


@both
def test_complete__returns_choices_usage_and_log_probabilities(kind: type[Client | Awaited]) -> None:
    scores = {"tokens": ["a", "b"], "token_logprobs": [-1.5, -0.5], "top_logprobs": [{"a": -1.5}, {"b": -0.5}]}
    choice = {"index": 0, "text": "ab", "logprobs": scores, "finish_reason": "stop"}
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, requests), connected(kind, url, api_key="secret") as client:
        completion = client.complete("ROMEO:", max_tokens=3, logprobs=1, temperature=0.5)
    assert (completion.text, completion.choices[0].finish_reason, completion.model) == ("ab", "stop", "tiny@1")
    assert completion.choices[0].logprobs.logprobs == [-1.5, -0.5]
    assert completion.choices[0].logprobs.top == [{"a": -1.5}, {"b": -0.5}]
    assert (completion.usage.completion_tokens, completion.usage.cached_tokens) == (3, 2)
    request = requests[0][1]
    assert request.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"authorization: bearer secret\r\n" in request.lower()
    assert body_of(request) == {"prompt": "ROMEO:", "max_tokens": 3, "logprobs": 1, "temperature": 0.5}


@both
def test_chat__returns_the_message_and_its_log_probabilities(kind: type[Client | Awaited]) -> None:
    content = [{"token": "a", "logprob": -1.5, "top_logprobs": [{"token": "b", "logprob": -0.25}]}]
    message = {"role": "assistant", "content": "a", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "length"}
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, requests), connected(kind, url) as client:
        chat = client.chat([{"role": "user", "content": "Who?"}], max_tokens=1, logprobs=True, top_logprobs=1)
    assert (chat.text, chat.choices[0].logprobs.logprobs, chat.choices[0].logprobs.top) == ("a", [-1.5], [{"b": -0.25}])
    assert requests[0][1].startswith(b"POST /v1/chat/completions ")
    with played([answer]) as (url, requests), connected(kind, url) as client:
        client.chat([{"role": "user", "content": "Who?"}])
    assert body_of(requests[0][1])["max_tokens"] is None  # the server's default for chats, not that of completions


@both
def test_form__is_sent_and_its_log_probabilities_are_returned(kind: type[Client | Awaited]) -> None:
    form = {"regex": "[ab]+"}
    scores = {"tokens": ["a", "b"], "token_logprobs": [-1.5, -0.5], "top_logprobs": None, "text_offset": [0, 1]}
    choice = {
        "index": 0,
        "text": "ab",
        "logprobs": scores | {"allowed_logprobs": [None, -0.25]},
        "finish_reason": "stop",
    }
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, requests), connected(kind, url) as client:
        found = client.complete("", logprobs=0, structured_outputs=form).choices[0].logprobs
    assert (found.allowed, found.since(1).allowed) == ([None, -0.25], [-0.25])
    assert body_of(requests[0][1])["structured_outputs"] == form
    content = [{"token": "a", "logprob": -1.5, "top_logprobs": [], "allowed_logprob": -0.25}]
    message = {"role": "assistant", "content": "a", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, requests), connected(kind, url) as client:
        wanted = {"type": "json_object"}
        chat = client.chat([{"role": "user", "content": "Who?"}], logprobs=True, response_format=wanted)
    assert chat.choices[0].logprobs.allowed == [-0.25]
    assert body_of(requests[0][1])["response_format"] == wanted


@both
def test_score__sums_what_is_scored(kind: type[Client | Awaited]) -> None:
    scores = {"tokens": ["a", "b", "c"], "token_logprobs": [None, -math.log(2), -math.log(8)], "top_logprobs": None}
    choice = {"index": 0, "text": "abc", "logprobs": scores, "finish_reason": "length"}
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, requests), connected(kind, url) as client:
        score = client.score("abc", model="tiny")
    assert score.total == pytest.approx(-math.log(16))
    assert score.bits_per_char == pytest.approx(2)
    expected = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0, "model": "tiny"}
    assert body_of(requests[0][1]) == expected


@both
def test_candidates__are_scored_in_their_order_and_the_best_is_known(kind: type[Client | Awaited]) -> None:
    data = [
        {"object": "score", "index": 0, "text": "a", "logprob": -3.0, "score": -3.0},
        {"object": "score", "index": 1, "text": "bc", "logprob": -4.0, "score": -2.0},
        {"object": "score", "index": 2, "text": "cb", "logprob": -4.0, "score": -2.0},
    ]
    answer = JSON + json.dumps({"object": "list", "model": "tiny@1", "position": 6, "data": data}).encode()
    with played([b"", answer]) as (url, requests), connected(kind, url) as client:  # the first connection breaks
        found = client.score_candidates(("a", "bc", "cb"), prompt="ROMEO:", normalize="length", model="tiny")
    assert (found.model, found.position, [one.text for one in found.scores]) == ("tiny@1", 6, ["a", "bc", "cb"])
    assert (found.best.text, found.best.logprob, found.best.score) == ("bc", -4.0, -2.0)
    assert requests[1][1].startswith(b"POST /v1/score HTTP/1.1\r\n")
    body = {"candidates": ["a", "bc", "cb"], "prompt": "ROMEO:", "normalize": "length", "model": "tiny"}
    assert body_of(requests[1][1]) == body


def test_session__names_its_position_for_candidates_and_suggestions() -> None:
    facts = {"id": "a", "model": "tiny@1", "seed": 7, "position": 6}
    scores = {"object": "list", "model": "tiny@1", "position": 6, "data": []}
    suggestions = scores | {"exact": False, "data": [{"index": 0, "text": "what", "logprob": -1.5}]}
    answers = [JSON + json.dumps(answer).encode() for answer in (facts, scores, suggestions)]
    with played(answers) as (url, requests), Client(url) as client:
        session = client.open("a")
        assert session.score_candidates(["what"]).scores == []
        found = session.suggest(3, prompt="w", until=" ")
    assert (found.is_exact, [(one.text, one.logprob) for one in found.texts]) == (False, [("what", -1.5)])
    assert requests[1][1].startswith(b"POST /v1/sessions/a/score ")
    assert body_of(requests[1][1]) == {"candidates": ["what"], "position": 6}
    assert requests[2][1].startswith(b"POST /v1/sessions/a/suggest ")
    assert body_of(requests[2][1]) == {"n": 3, "position": 6, "prompt": "w", "until": " "}


@both
def test_stream__that_breaks_is_requested_again_and_continues_after_the_last_piece(
    kind: type[Client | Awaited],
) -> None:
    parts = [chunk("ab") + chunk("c"), chunk("a") + chunk("bcd") + chunk("e", "length") + END]
    with played([STREAM + part for part in parts]) as (url, requests), connected(kind, url) as client:
        pieces = list(client.stream("ROMEO:", max_tokens=5))
    assert [piece.text for piece in pieces] == ["ab", "c", "d", "e", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length", None]
    assert pieces[-1].usage.total_tokens == 9
    first, second = (body_of(request) for _, request in requests)
    assert first == second
    assert first["stream"] is True
    assert isinstance(first["seed"], int)


@both
def test_stream__with_log_probabilities_repeats_none_of_them(kind: type[Client | Awaited]) -> None:
    def scored(text: str) -> bytes:
        scores = {"tokens": list(text), "token_logprobs": [-float(ord(char)) for char in text], "top_logprobs": None}
        choice = {"index": 0, "text": text, "logprobs": scores, "finish_reason": None}
        return chunk("", choices=[choice])

    parts = [scored("ab"), scored("abc") + scored("d") + END]
    with played([STREAM + part for part in parts]) as (url, _), connected(kind, url) as client:
        pieces = list(client.stream("ROMEO:", seed=7, logprobs=0))
    chars = [char for piece in pieces if piece.logprobs for char in piece.logprobs.chars]
    assert "".join(chars) == "".join(piece.text for piece in pieces) == "abcd"


@both
def test_stream__that_breaks_repeats_no_ids_and_has_the_state_at_its_end(kind: type[Client | Awaited]) -> None:
    def part(text: str, ids: list[int], reason: str | None = None, **more: Any) -> bytes:
        return chunk("", choices=[{"index": 0, "text": text, "token_ids": ids, "finish_reason": reason} | more])

    first = part("Rab", [1, 2], prompt_token_ids=[30])  # an echoed prompt has no ids beside those of the prompt
    second = part("R", [], prompt_token_ids=[30]) + part("abcd", [1, 2, 3, 4]) + part("", [], "length", state="eyJ")
    with played([STREAM + first, STREAM + second + END]) as (url, _), connected(kind, url) as client:
        pieces = list(client.stream([30], seed=7, echo=True, return_token_ids=True, return_state=True))
    assert [piece.text for piece in pieces] == ["Rab", "cd", "", ""]
    assert [piece.token_ids for piece in pieces] == [[1, 2], [3, 4], [], None]
    assert [piece.prompt_token_ids for piece in pieces] == [[30], None, None, None]
    assert [piece.state for piece in pieces] == [None, None, "eyJ", None]


@both
def test_complete__returns_ids_states_and_scores_of_the_prompt(kind: type[Client | Awaited]) -> None:
    scores = [None, {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}]
    more = {"token_ids": [2], "prompt_token_ids": [30, 1], "prompt_logprobs": scores, "state": "eyJ"}
    choice = {"index": 0, "text": "b", "logprobs": None, "finish_reason": "length"} | more
    answer = JSON + json.dumps(MAKER | {"choices": [choice], "usage": USAGE}).encode()
    with played([answer]) as (url, _), connected(kind, url) as client:
        (found,) = client.complete([30, 1], return_token_ids=True, return_state=True, prompt_logprobs=1).choices
    assert {name: getattr(found, name) for name in more} == more


@both
@pytest.mark.parametrize(
    ("session_id", "path"),
    [("../../healthz", "..%2F..%2Fhealthz"), ("a b", "a%20b"), ("é?", "%C3%A9%3F"), ("a\r\nX: y", "a%0D%0AX%3A%20y")],
)
def test_session_id__leads_to_no_other_route(kind: type[Client | Awaited], session_id: str, path: str) -> None:
    answer = head("application/json").replace(b"200 OK", b"404 Not Found") + b'{"error": {"code": "not_found"}}'
    for name, arguments in (("open", {}), ("create", {"text": "a"})):
        with played([answer]) as (url, requests), connected(kind, url) as client, pytest.raises(NotFound):
            getattr(client, name)(id=session_id, **arguments)
        assert requests[0][1].split(b" ")[1] == f"/v1/sessions/{path}".encode()


@both
@pytest.mark.parametrize("changes", [{}, {"system_fingerprint": "fp_2"}])
def test_stream__that_is_not_the_same_when_repeated_fails(
    kind: type[Client | Awaited], changes: dict[str, str]
) -> None:
    parts = [chunk("abc"), chunk("abc" if changes else "abx", **changes) + END]
    with played([STREAM + part for part in parts]) as (url, _), connected(kind, url) as client:
        pieces = client.stream("ROMEO:", seed=7)
        assert next(pieces).text == "abc"
        with pytest.raises(ServerFailed) as failed:
            list(pieces)
    assert failed.value.code == "damaged"


@both
def test_stream__of_a_chat_yields_its_content(kind: type[Client | Awaited]) -> None:
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    chunks = [chunk("", choices=[{"index": 0, "delta": each, "finish_reason": None}]) for each in deltas]
    with played([STREAM + b"".join(chunks) + END]) as (url, _), connected(kind, url) as client:
        pieces = list(client.stream_chat([{"role": "user", "content": "Who?"}]))
    assert [piece.text for piece in pieces if piece.text] == ["a", "b"]


@both
def test_stream__ignores_comments_and_reads_any_line_ends(kind: type[Client | Awaited]) -> None:
    content = b": ping\n\nretry: 1000\n\n" + chunk("a").replace(b"\n", b"\r\n") + END
    with played([STREAM + content]) as (url, _), connected(kind, url) as client:
        assert "".join(piece.text for piece in client.stream("x", seed=1)) == "a"


@both
def test_stream__with_an_error_raises_it(kind: type[Client | Awaited]) -> None:
    error = b'event: error\ndata: {"error": {"message": "m", "code": "engine_failed"}}\n\n'
    with played([STREAM + chunk("a") + error]) as (url, _), connected(kind, url) as client:
        pieces = client.stream("x", seed=1)
        assert next(pieces).text == "a"
        with pytest.raises(ServerError, match="engine_failed"):
            next(pieces)


@both
@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("400 Bad Request", InvalidRequest), ("401 Unauthorized", NotPermitted), ("403 Forbidden", NotPermitted),
        ("404 Not Found", NotFound), ("409 Conflict", Conflict), ("410 Gone", Gone), ("413 Too Large", InvalidRequest),
        ("429 Too Many Requests", Overloaded), ("500 Internal Server Error", ServerFailed),
    ],
)  # fmt: skip
def test_refusal__has_a_class_for_its_status(
    kind: type[Client | Awaited], status: str, error: type[ServerError]
) -> None:
    refused = head("application/json", status, "Retry-After: 60")
    refused += b'{"error": {"message": "m", "code": "c", "param": "p"}}'
    with played([refused]) as (url, _), connected(kind, url, retry_s=0.5) as client, pytest.raises(error) as failed:
        client.complete("x")
    assert (failed.value.status, failed.value.code, failed.value.param) == (int(status[:3]), "c", "p")
    assert failed.value.retry_after_s == 60


@both
def test_call__waits_as_long_as_an_overloaded_server_asks(kind: type[Client | Awaited]) -> None:
    refused = head("application/json", "429 Too Many Requests", "Retry-After: 1") + b'{"error": {"code": "overloaded"}}'
    answer = JSON + b'{"data": [{"id": "tiny", "created": 1, "meta": {"num_units": 16}}]}'
    with played([refused, answer]) as (url, requests), connected(kind, url) as client:
        (model,) = client.models()
    assert (model.id, model.meta["num_units"]) == ("tiny", 16)
    assert requests[1][0] - requests[0][0] >= 0.9


@both
def test_client__of_an_absent_server_gives_up_after_retry_s(kind: type[Client | Awaited]) -> None:
    with (
        connected(kind, f"http://127.0.0.1:{free_port()}", retry_s=0.1) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.models()


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@both
def test_body__is_read_in_chunks_and_by_length(kind: type[Client | Awaited]) -> None:
    chunked = CHUNKED + b'9;x=y\r\n{"data": \r\n3\r\n[]}\r\n0\r\nTrailer: 1\r\n\r\n'
    by_length = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"data": []}'
    for answer in (chunked, by_length):
        with played([answer]) as (url, _), connected(kind, url) as client:
            assert client.models() == []


@both
@pytest.mark.parametrize(
    "answer",
    [
        b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-T", JSON + b"{", CHUNKED + b"c\r\n{", CHUNKED,
        CHUNKED + b"zz\r\n{}\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
)  # fmt: skip
def test_answer__that_is_cut_or_no_http_is_an_error_of_the_client(kind: type[Client | Awaited], answer: bytes) -> None:
    with (
        played([answer]) as (url, _),
        connected(kind, url, retry_s=0) as client,
        pytest.raises((StreamBroken, OSError)),
    ):
        client.models()


def test_async_client__gives_up_on_a_silent_server_and_serves_other_tasks_meanwhile() -> None:
    async def main(url: str) -> int:
        ticks = 0
        async with AsyncClient(url, timeout_s=0.3, retry_s=0) as client:
            models = asyncio.ensure_future(client.models())
            while not models.done():
                await asyncio.sleep(0.01)
                ticks += 1
            with pytest.raises(TimeoutError):
                await models
        return ticks

    with silent() as url:
        assert asyncio.run(main(url)) > 3


def test_async_stream__that_its_reader_leaves_closes_its_connection() -> None:
    async def main(url: str) -> str:
        async with AsyncClient(url) as client, aclosing(client.stream("x", seed=1)) as pieces:
            async for piece in pieces:
                return piece.text
        return ""

    with silent(STREAM + chunk("a")) as url:  # returns when the client has closed the connection
        assert asyncio.run(main(url)) == "a"


@contextmanager
def silent(answer: bytes = b"") -> Iterator[str]:
    """Serve one connection: send the answer, and wait until the client closes it."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            connection.recv(65_536)
            connection.sendall(answer)
            while connection.recv(65_536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        served.result(30)
