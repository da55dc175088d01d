"""Streams of the real process, read by the real `openai` client and by bare sockets; and clients that leave."""

from __future__ import annotations

import errno
import json
import math
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import openai
import pytest

from service.store.model_store import ModelStore
from tests.harness.server import BODY, ENDLESS, SERVE, Server, ask, serving
from tests.harness.wait import wait_until

RESET = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MAX_TOKENS": "10000000",
        "GRU_SERVE_MAX_BATCH": "8",
        "GRU_SERVE_MAX_QUEUE": "8",
    }


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[Server]:
    with serving(SERVE, environment) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(environment: dict[str, str]) -> Iterator[Server]:
    """A server with a place for one text, which soon drops clients that do not read."""
    limits = {"GRU_SERVE_MAX_BATCH": "1", "GRU_SERVE_MAX_QUEUE": "0", "GRU_SERVE_SEND_TIMEOUT_S": "1"}
    with serving(SERVE, environment | limits) as server:
        yield server


@pytest.fixture(scope="module")
def queued(environment: dict[str, str]) -> Iterator[Server]:
    """A server with a place for one text, and for another one that waits."""
    with serving(SERVE, environment | {"GRU_SERVE_MAX_BATCH": "1", "GRU_SERVE_MAX_QUEUE": "1"}) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai_client(server) as client:
        yield client


def openai_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def events(server: Server, **changes: object) -> list[str]:
    """Request a stream; return the data of each event."""
    connection = server.connect()
    try:
        ask(connection, "POST", "/v1/completions", BODY | {"stream": True} | changes)
        response = connection.getresponse()
        body = response.read().decode()
        assert response.status == 200, body
    finally:
        connection.close()
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def texts(found: list[str], num_choices: int = 1) -> list[str]:
    """Return the whole text of each choice."""
    pieces = [""] * num_choices
    for event in found[:-1]:
        for choice in json.loads(event)["choices"]:
            pieces[choice["index"]] += choice["text"]
    return pieces


def is_free(server: Server) -> bool:
    """Return whether a text is admitted at once."""
    return server.call("POST", "/v1/completions", BODY | {"max_tokens": 1})[0] == 200


@contextmanager
def holding_the_place(server: Server, body: object, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """A connection whose request has the only place.

    The requests of `is_free` may get the place first; the request is repeated until it has it.
    """
    wait_until(lambda: is_free(server))
    for _ in range(100):
        with server.open(body, receive_bytes=receive_bytes) as connection:
            wait_until(lambda: is_refused(connection) or not is_free(server))
            if not is_refused(connection):
                yield connection
                return
    raise AssertionError("another request always got the place first")


def is_refused(connection: socket.socket) -> bool:
    """Return whether the answer is an error."""
    return bool(select.select([connection], [], [], 0)[0]) and connection.recv(10, socket.MSG_PEEK).endswith(b" 4")


def is_reset(connection: socket.socket) -> bool:
    """Return whether the other side has dropped the connection."""
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)


# The official client


def test_stream__has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 3000, "seed": 7, "temperature": 0.8}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.model, chunk.system_fingerprint) for chunk in chunks} == {(whole.model, whole.system_fingerprint)}


def test_stream__has_the_usage_in_its_last_chunk_on_request(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt="ROMEO:", max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (6, 50)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_prompts__are_continued_as_if_each_were_alone(client: openai.OpenAI, server: Server) -> None:
    prompts = ["ROMEO:", "JULIET:", "a"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=40, seed=7)
    assert [choice.text for choice in answer.choices] == [
        server.text(prompt=prompt, max_tokens=40) for prompt in prompts
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    streamed = texts(events(server, prompt=prompts, max_tokens=40), 3)
    assert streamed == [choice.text for choice in answer.choices]


def test_n__continuations_differ_and_are_the_same_streamed(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(model="tiny", prompt="ROMEO:", max_tokens=40, seed=7, n=3)
    found = [choice.text for choice in answer.choices]
    assert len(set(found)) == 3
    assert found[0] == server.text(max_tokens=40)
    assert texts(events(server, n=3, max_tokens=40), 3) == found


def test_best_of__answers_the_likeliest_of_n(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 20, "seed": 7}
    answer = client.completions.create(**settings, n=4, logprobs=0)
    means = {}
    for choice in answer.choices:
        assert choice.logprobs
        assert choice.logprobs.token_logprobs
        means[choice.text] = math.fsum(choice.logprobs.token_logprobs) / 20
    best = client.completions.create(**settings, best_of=4).choices
    assert [choice.text for choice in best] == [max(means, key=lambda text: means[text])]


def test_echo__with_logprobs_covers_prompt_and_continuation(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 20, "seed": 7, "logprobs": 2}
    choice = client.completions.create(**settings, echo=True).choices[0]
    plain = client.completions.create(**settings).choices[0]
    assert choice.text == "ROMEO:" + plain.text
    assert choice.logprobs
    assert plain.logprobs
    assert choice.logprobs.tokens == list(choice.text)
    assert choice.logprobs.text_offset == list(range(26))
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob is not None and logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.top_logprobs
    assert choice.logprobs.top_logprobs[0] is None
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])
    assert choice.logprobs.token_logprobs[6:] == plain.logprobs.token_logprobs


def test_logprobs__of_a_stream_are_those_of_the_whole_answer(client: openai.OpenAI, server: Server) -> None:
    whole = client.completions.create(
        model="tiny", prompt="ROMEO:", max_tokens=500, seed=7, logprobs=2, echo=True
    ).choices[0]
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for event in events(server, max_tokens=500, logprobs=2, echo=True)[:-1]:
        for name, values in json.loads(event)["choices"][0]["logprobs"].items():
            joined[name] += values or []
    assert whole.logprobs
    assert joined == whole.logprobs.model_dump()


def test_logprobs__of_scoring_a_text_are_those_of_generating_it(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="ROMEO:", max_tokens=50, seed=7, logprobs=0, echo=True)
    text = made.choices[0].text
    scored = client.completions.create(model="tiny", prompt=text, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == text
    assert scored.choices[0].logprobs == made.choices[0].logprobs
    assert scored.usage
    assert scored.usage.completion_tokens == 0


def test_stream__is_refused_with_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a", stream=True)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="a", n=2, best_of=3, stream=True)
    assert (bad.value.code, bad.value.param) == ("out_of_range", "best_of")


def test_overloaded_server__raises_openais_rate_limit_error(narrow: Server) -> None:
    wait_until(lambda: is_free(narrow))
    with narrow.open(ENDLESS) as holder, openai_client(narrow) as client:
        assert holder.recv(1)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model="tiny", prompt="a", stream=stream)
            assert refused.value.code == "overloaded"
            assert refused.value.response.headers["Retry-After"] == "1"


# Framing


def test_stream__ends_with_done_and_forbids_buffering(server: Server) -> None:
    with closing(server.connect()) as connection:
        ask(connection, "POST", "/v1/completions", BODY | {"stream": True})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-cache, no-transform"
        assert "Content-Length" not in response.headers
        assert response.read().endswith(b"\n\ndata: [DONE]\n\n")


def test_stream__first_event_arrives_before_the_last_is_generated(server: Server) -> None:
    with server.open(ENDLESS) as connection, connection.makefile("rb") as lines:
        first = next(line for line in lines if line.startswith(b"data: "))
        assert json.loads(first[6:])["choices"][0]["finish_reason"] is None


def test_stop_string__is_never_sent_not_even_its_beginning(server: Server) -> None:
    text = server.text(max_tokens=1500)
    for start in range(100, 1400, 130):
        stop = text[start : start + 5]
        found = events(server, max_tokens=1500, stop=[stop, "zzzz"])
        assert texts(found) == [text[: text.index(stop)]]
        assert json.loads(found[-2])["choices"][0]["finish_reason"] == "stop"


def test_stop_string__its_beginning_is_sent_if_the_rest_does_not_follow(server: Server) -> None:
    text = server.text()
    assert texts(events(server, stop=text[-3:] + "a")) == [text]


def test_http_1_0__gets_the_events_without_chunks(server: Server) -> None:
    with server.open(BODY | {"stream": True}, version="1.0") as connection, connection.makefile("rb") as answer:
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert texts([block[6:].decode() for block in body.split(b"\n\n")[:-1]]) == [server.text()]


def test_connection__can_be_used_again_after_a_stream(server: Server) -> None:
    with closing(server.connect()) as connection:
        for _ in range(3):
            ask(connection, "POST", "/v1/completions", BODY | {"stream": True})
            first = connection.sock
            assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
            ask(connection, "GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            assert connection.sock is first


# Clients that leave


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves__frees_its_place(narrow: Server, stream: bool, reset: bool) -> None:
    ended = len(narrow.logged("stream ended"))
    with holding_the_place(narrow, ENDLESS | {"stream": stream}) as connection:
        if stream:
            assert connection.recv(1)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    wait_until(lambda: is_free(narrow))
    if stream:
        wait_until(lambda: len(narrow.logged("stream ended")) > ended)
        last = narrow.logged("stream ended")[ended]
        assert last["ending"] == "left"
        assert 0 < last["num_generated"] < ENDLESS["max_tokens"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_that_ends_its_side__still_gets_its_answer(queued: Server, stream: bool, version: str) -> None:
    """It waits for more than a second for its place, so that the server looks after it several times."""
    with waiting(queued, stream, version) as connection, connection.makefile("rb") as answer:
        raw = answer.read()
    assert raw.count(b" 200 OK") == 1
    # Whole answers: the server asks whether the client is there, at intervals that double.
    assert 0 < raw.count(b"HTTP/1.1 100 Continue\r\n\r\n") < 10 or stream or version == "1.0"
    assert raw.endswith((b"data: [DONE]\n\n", b"[DONE]\n\n\r\n0\r\n\r\n")) or not stream
    assert (b": ping\n\n" in raw) == stream


@contextmanager
def waiting(server: Server, stream: bool, version: str) -> Iterator[socket.socket]:
    """A connection that has ended its side and waits for a second or longer, until the block begins."""
    wait_until(lambda: server.call("POST", "/v1/completions", BODY | {"n": 2, "max_tokens": 1})[0] == 200)
    with server.open(ENDLESS) as holder:
        assert holder.recv(1)
        with server.open(BODY | {"stream": stream}, version=version) as connection:
            connection.shutdown(socket.SHUT_WR)
            select.select([connection], [], [], 1.2)
            if stream or version == "1.1":
                wait_until(lambda: bool(select.select([connection], [], [], 0)[0]))
            assert not is_refused(connection)
            holder.close()
            yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_client__that_leaves_frees_its_place(queued: Server, stream: bool) -> None:
    """One client fills the batch. Another one fills the queue, has ended its side long before, and leaves."""
    wait_until(lambda: queued.call("POST", "/v1/completions", BODY | {"n": 2, "max_tokens": 1})[0] == 200)
    with queued.open(ENDLESS) as holder:
        assert holder.recv(1)
        with queued.open(BODY | {"stream": stream}) as connection:
            connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: bool(select.select([connection], [], [], 0)[0]))
            assert not is_refused(connection)
            assert not is_free(queued)
        wait_until(lambda: queue_has_room(queued))


def queue_has_room(server: Server) -> bool:
    """Return whether a text is admitted to the queue, while another one has the only place in the batch."""
    with server.open(BODY | {"stream": True}) as connection:
        return connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_does_not_read__is_dropped(narrow: Server, stream: bool) -> None:
    # Scores of 25,000 characters are 14 MB: they do not fit into the buffers of both sides.
    body = ENDLESS | {"prompt": "ROMEO" * 5000, "logprobs": 20, "echo": True, "max_tokens": 1000, "stream": stream}
    with holding_the_place(narrow, body, receive_bytes=4096) as connection:
        wait_until(lambda: is_free(narrow))
        wait_until(lambda: is_reset(connection))
    assert narrow.logged("Socket error processing request.") == []
    assert "Traceback" not in "".join(narrow.log)


def test_clients_that_do_not_read__free_their_threads(narrow: Server) -> None:
    wait_until(lambda: is_free(narrow))
    status, answer = narrow.call("GET", "/openapi.json")
    assert status == 200
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    num_requests = 8_000_000 // len(json.dumps(answer))  # pipelined: their answers do not fit into the buffers
    silent = []
    for _ in range(17):  # as many as the server has threads
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", narrow.port))
        connection.setblocking(False)
        silent.append(connection)
    for connection in silent:
        try:
            connection.send(request * num_requests)
        except BlockingIOError:
            continue
    assert narrow.call("GET", "/healthz")[0] == 200
    for connection in silent:
        wait_until(lambda connection=connection: is_reset(connection))  # type: ignore[misc]
        connection.close()
