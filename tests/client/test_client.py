"""The client, against servers that a test plays. tests/process/test_session_streams.py has it against the real one."""

from __future__ import annotations

import inspect
import itertools
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate

import pytest

from service.client import Client, ServerError, Session
from service.web.api.sse import IDLE_S, PING_S
from tests.harness.played_server import head, played
from tests.harness.programs import free_port


def test_client__resumes_a_stream_at_once_when_told_to_reconnect() -> None:
    """A server sends `reconnect`, and the next server at the same address continues. The test sends what they would."""
    parts = [
        b'id: 8\nevent: text\ndata: {"text": "ab"}\n\nid: 8\nevent: reconnect\ndata: {"position": 8}\n\n',
        b'id: 9\nevent: text\ndata: {"text": "c"}\n\nid: 9\nevent: done\ndata: {"finish_reason": "length", "position": '
        b'9, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}\n\n',
    ]
    with played([FACTS, *(STREAM + part for part in parts)]) as (url, requests), Client(url) as client:
        session = client.open("a")
        client.close()
        assert "".join(session.generate(3)) == "abc"
        assert session.position == 9
    assert requests[1][1].startswith(b"POST /v1/sessions/a/generate ")
    assert requests[2][1].startswith(b"GET /v1/sessions/a/generate ")
    assert b"last-event-id: 8\r\n" in requests[2][1].lower()


def test_client__resumes_a_stream_whose_server_falls_silent() -> None:
    """Its time-out is longer than its patience, which counts from the first failure after the last text."""
    parts = [
        b'id: 8\nevent: text\ndata: {"text": "ab"}\n\n',
        b'id: 9\nevent: text\ndata: {"text": "c"}\n\nid: 9\nevent: done\ndata: {"finish_reason": "length", "position": '
        b'9, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}\n\n',
    ]
    facts = {"id": "a", "model": "tiny@1", "seed": 7, "position": 6}
    json_head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    stream_head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    busy = b'{"error": {"message": "another operation", "code": "session_busy"}}'
    busy_head = b"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(busy)
    answers = [
        (json_head + json.dumps(facts).encode(), False),
        (stream_head + parts[0], True),
        (busy_head + busy, False),
        (stream_head + parts[1], False),
    ]

    def serve(listener: socket.socket) -> None:
        for answer, is_silent in answers:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(30)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                connection.sendall(answer)
                if is_silent:
                    while connection.recv(65_536):  # until the client gives it up
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, listener)
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5, retry_s=0.3) as client:
            session = client.open("a")
            client.close()
            assert "".join(session.generate(3)) == "abc"
        served.result(30)


HEAD = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
STREAM_HEAD = HEAD % (b"200 OK", b"text/event-stream")
BUSY = HEAD % (b"409 Conflict", b"application/json") + b'{"error": {"message": "busy", "code": "session_busy"}}'
TAKEN_OVER = b'event: error\ndata: {"error": {"message": "taken over", "code": "run_taken_over"}}\n\n'


@contextmanager
def playing(answers: list[bytes]) -> Iterator[tuple[Session, list[bytes]]]:
    """Play a server: give each connection the next answer, the last one again and again. Gives also the requests."""
    facts = {"id": "a", "model": "tiny@1", "seed": 7, "position": 6}
    answers = [HEAD % (b"200 OK", b"application/json") + json.dumps(facts).encode(), *answers]
    requests: list[bytes] = []

    def serve() -> None:
        for number in itertools.count():
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the listener is closed
            with connection:
                connection.settimeout(30)
                requests.append(connection.recv(65_536))
                connection.sendall(answers[min(number, len(answers) - 1)])

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        try:
            with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", retry_s=0.5) as client:
                session = client.open("a")
                client.close()
                yield session, requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            served.result(30)


@pytest.mark.parametrize("code", [b"run_taken_over", b"revision_conflict"])
def test_client__waits_for_the_connection_that_took_its_stream_over(code: bytes) -> None:
    """Perhaps its own request of long ago, which a server that was paused carries out late."""
    loss = TAKEN_OVER.replace(b"run_taken_over", code)
    answers = [
        STREAM_HEAD + b'id: 8\nevent: text\ndata: {"text": "ab"}\n\n' + loss,
        BUSY.replace(b"session_busy", code) if code == b"revision_conflict" else BUSY,
        STREAM_HEAD
        + b'id: 9\nevent: text\ndata: {"text": "c"}\n\nid: 9\nevent: done\ndata: {"finish_reason": "length", '
        b'"position": 9, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}\n\n',
    ]
    with playing(answers) as (session, requests):
        assert "".join(session.generate(3)) == "abc"
    for request in requests[2:]:
        assert request.startswith(b"GET /v1/sessions/a/generate?take_over=false ")
        assert b"last-event-id: 8\r\n" in request.lower()


def test_client__gives_up_a_stream_that_another_connection_continues_to_read() -> None:
    answers = [STREAM_HEAD + b'id: 8\nevent: text\ndata: {"text": "ab"}\n\n' + TAKEN_OVER, BUSY]
    with playing(answers) as (session, requests):
        pieces = session.generate(3)
        assert next(pieces) == "ab"
        with pytest.raises(ServerError) as error:
            next(pieces)
        assert error.value.code == "run_taken_over"
    assert 2 < len(requests) < 30
    assert not any(request.startswith(b"POST /v1/sessions/a/rewind") for request in requests)


def test_client__gives_up_a_stream_that_is_taken_over_again_and_again() -> None:
    with playing([STREAM_HEAD + TAKEN_OVER]) as (session, requests):
        with pytest.raises(ServerError) as error:
            next(session.generate(3))
        assert error.value.code == "run_taken_over"
    assert 2 < len(requests) < 30


def test_client__has_patience_for_more_than_one_ping() -> None:
    defaults = inspect.signature(Client).parameters
    assert defaults["timeout_s"].default > PING_S + IDLE_S


def test_client__gives_up_on_an_absent_server_after_retry_s() -> None:
    with pytest.raises(ConnectionRefusedError):
        Client(f"http://127.0.0.1:{free_port()}", retry_s=0.1).create()


FACTS = head("application/json") + b'{"id": "a", "model": "tiny@1", "seed": 7, "position": 6}'
STREAM = head("text/event-stream")
LAST = (
    b'id: 9\nevent: text\ndata: {"text": "abc"}\n\nid: 9\nevent: done\ndata: {"finish_reason": "length", "position": 9,'
)
LAST += b'"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}\n\n'


def test_stream__that_ends_with_an_error_is_resumed_if_the_server_says_so() -> None:
    """The client knows no code: a server of a later version may have others."""
    error = b'event: error\ndata: {"error": {"message": "m", "code": "unheard_of", "retry": true}}\n\n'
    with played([FACTS, STREAM + error, STREAM + LAST]) as (url, requests), Client(url) as client:
        session = client.open("a")
        client.close()
        assert "".join(session.generate(3)) == "abc"
    assert requests[2][1].startswith(b"GET /v1/sessions/a/generate ")


@pytest.mark.parametrize("retry", [b"", b', "retry": false'])
def test_stream__that_ends_with_any_other_error_is_not_resumed(retry: bytes) -> None:
    error = b'event: error\ndata: {"error": {"message": "m", "code": "engine_failed"' + retry + b"}}\n\n"
    with played([FACTS, STREAM + error]) as (url, _), Client(url) as client:
        session = client.open("a")
        client.close()
        with pytest.raises(ServerError) as failed:
            "".join(session.generate(3))
    assert failed.value.code == "engine_failed"


def refusal(status: str, *lines: str) -> bytes:
    return head("application/json", status, *lines) + b'{"error": {"message": "m", "code": "c"}}'


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
@pytest.mark.parametrize("is_date", [False, True])
def test_call__waits_as_long_as_the_server_asks(status: str, is_date: bool) -> None:
    # A date has no fractions of a second, so a date two seconds from now is between one and two seconds away.
    retry_after = formatdate(time.time() + 2, usegmt=True) if is_date else "1"
    refused = refusal(status, f"Retry-After: {retry_after}")
    with played([refused, FACTS]) as (url, requests), Client(url) as client:
        client.open("a")
    assert requests[1][0] - requests[0][0] >= 0.9


def test_call__that_would_have_to_wait_longer_than_its_patience_fails_at_once() -> None:
    for retry_after in ("60", "9" * 400, formatdate(time.time() + 60, usegmt=True)):
        refused = refusal("429 Too Many Requests", f"Retry-After: {retry_after}")
        with played([refused]) as (url, _), Client(url, retry_s=30) as client, pytest.raises(ServerError) as failed:
            client.open("a")
        assert failed.value.status == 429
        assert failed.value.retry_after_s > 30


@pytest.mark.parametrize(
    ("status", "code", "is_deleted"),
    [
        ("404 Not Found", "session_not_found", True),
        ("410 Gone", "session_gone", True),
        ("404 Not Found", "not_found", False),  # of the route: the address of the server is wrong
        ("404 Not Found", "model_not_found", False),
    ],
)
def test_delete__takes_only_the_sessions_own_404_for_done(status: str, code: str, is_deleted: bool) -> None:
    answer = head("application/json", status) + b'{"error": {"message": "m", "code": "%s"}}' % code.encode()
    with played([FACTS, answer]) as (url, _), Client(url) as client:
        session = client.open("a")
        if is_deleted:
            session.delete()
        else:
            with pytest.raises(ServerError, match="404"):
                session.delete()


def test_call__ignores_a_retry_after_that_it_can_not_read_and_that_of_a_busy_session() -> None:
    answers = [refusal("503 Service Unavailable", f"Retry-After: {value}") for value in ("soon", "-1", "\u0661", "1.5")]
    busy = head("application/json", "409 Conflict", "Retry-After: 9") + b'{"error": {"code": "session_busy"}}'
    with played([*answers, busy, FACTS]) as (url, _), Client(url, retry_s=5) as client:
        assert client.open("a").id == "a"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://localhost", "http://", ""])
def test_client__says_how_to_write_an_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"write it as in http://127\.0\.0\.1:8000"):
        Client(url)


def test_client__sends_a_text_where_a_list_belongs_as_it_is() -> None:
    """Its characters would be candidates. The server refuses a text, and says what belongs there."""
    refused = refusal("400 Bad Request", "Connection: close")
    with played([FACTS, *[refused] * 4]) as (url, requests), Client(url) as client:
        session = client.open("a")
        for call in (client.score_candidates, client.chat, lambda text: list(client.stream_chat(text))):
            with pytest.raises(ServerError):
                call("light")  # type: ignore[arg-type]
        with pytest.raises(ServerError):
            session.score_candidates("light")
    bodies = [json.loads(body.partition(b"\r\n\r\n")[2]) for _, body in requests[1:]]
    assert [body.get("candidates", body.get("messages")) for body in bodies] == ["light"] * 4
