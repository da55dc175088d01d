"""The real process: gunicorn on a real socket, and the real `openai` client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from service.store.model_store import ModelStore
from tests.harness.programs import program
from tests.harness.server import BODY, SERVE, Server, ask, serving
from tests.harness.wait import wait_until

NUM_THREADS = 20  # the minimum for two texts that run and two that wait


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_REQUEST_TIMEOUT_S": "1",
        "GRU_SERVE_MAX_BATCH": "2",
        "GRU_SERVE_MAX_QUEUE": "2",
        "GRU_SERVE_HTTP_THREADS": str(NUM_THREADS),
    }


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[Server]:
    with serving(SERVE, environment) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client__works_unchanged(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(
        model="tiny", prompt="ROMEO:", max_tokens=50, seed=7, temperature=0.8, top_p=0.9, stop=["zzzz"], user="me"
    )
    assert len(answer.choices[0].text) == 50
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.total_tokens == 56
    assert answer.choices[0].text == server.text(temperature=0.8, top_p=0.9)
    own = client.completions.create(model="tiny", prompt="R", extra_body={"top_k": 1, "unknown_chars": "fold"})
    assert own.usage
    assert own.usage.completion_tokens == 16
    assert [model.id for model in client.models.list()] == ["tiny", "tiny@1"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_client__raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="a", suffix="b")
    assert (bad.value.code, bad.value.param) == ("unsupported_value", "suffix")


def test_requests_side_by_side__get_the_text_that_each_gets_alone(server: Server) -> None:
    alone = {seed: server.text(seed=seed) for seed in range(4)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: server.text(seed=seed % 4), range(40)))
    assert together == [alone[seed % 4] for seed in range(40)]


def test_restarted_server__gives_the_same_text(server: Server, environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as other:
        assert other.text() == server.text()


def test_gunicorn__can_serve_the_application_by_itself(server: Server, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gunicorn", "service.web.app:create_app()", "-b", "127.0.0.1:0"]
    with serving([*command, "--no-control-socket"], environment) as other:
        assert other.text() == server.text()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_body_that_is_too_large__gets_an_answer_and_no_reset(server: Server, chunked: bool, keep: bool) -> None:
    connection = server.connect()
    headers = {"Content-Type": "application/json"} | ({} if keep else {"Connection": "close"})
    body = (b"x" * 10_000 for _ in range(150)) if chunked else b"x" * 1_500_000
    connection.request("POST", "/v1/completions", body, headers, encode_chunked=chunked)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"
    if keep:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


def test_body_of_unknown_length__is_read(server: Server) -> None:
    connection = server.connect()
    pieces = iter([json.dumps(BODY)[:10].encode(), json.dumps(BODY)[10:].encode()])
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["text"] == server.text()
    connection.close()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Content-Length: 5000000\r\n\r\nabc",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nab",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_stalled_and_malformed_bodies__are_refused_and_hold_no_thread(server: Server, data: bytes) -> None:
    stalled = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(NUM_THREADS)]
    for connection in stalled:
        connection.sendall(data)
    answers = []
    for connection in stalled:
        answers.append(connection.recv(65_536)[:12])
        connection.close()
    assert set(answers) <= {b"HTTP/1.1 408", b"HTTP/1.1 413", b"HTTP/1.1 400"}
    assert server.call("GET", "/healthz")[0] == 200


def test_stalled_headers__hold_no_thread(server: Server) -> None:
    stalled = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(NUM_THREADS)]
    for connection in stalled:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
    assert server.call("GET", "/healthz")[0] == 200
    for connection in stalled:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_clients_that_keep_their_side_open__delay_no_other(server: Server) -> None:
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(NUM_THREADS)]
    for connection in connections:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    # If the server waited two seconds for each of them in turn, this would time out.
    assert server.call("GET", "/healthz")[0] == 200
    for connection in connections:
        connection.close()


def test_dripping_body__has_a_deadline_as_a_whole(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began, answer = time.monotonic(), b""
        connection.settimeout(0.2)
        while not answer:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(100)
            assert time.monotonic() - began < 20
        assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\x00" * 100 + b"\r\n\r\n", 400, "bad_request"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "bad_request"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n", 400, "bad_request"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", 400, "bad_request"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", 408, "incomplete_body"),
        (b"GET /healthz HTTP/1.1\r\nHo", 408, "incomplete_body"),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nab", 413, "body_too_large"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 414, "bad_request"),
        (HEAD + b"Expect: miracles\r\n\r\n", 417, "bad_request"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 431, "bad_request"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, "bad_request"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000, 431, "bad_request"),
        (HEAD + b"Transfer-Encoding: brotli\r\n\r\n", 501, "bad_request"),
        (b"GET / HTTP/9.9\r\n\r\n", 505, "bad_request"),
    ],
)
def test_malformed_http__gets_an_error_in_the_usual_shape(server: Server, data: bytes, status: int, code: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert response.headers["Content-Type"] == "application/json"
        error = json.loads(response.read())["error"]
        assert error["code"] == code
        assert set(error) == {"message", "type", "param", "code"}
    assert server.call("GET", "/healthz")[0] == 200
    request_id = response.headers["X-Request-Id"]

    def logged() -> list[int]:
        lines = [*server.logged("request refused"), *server.logged("request")]
        return [line["status"] for line in lines if line["request_id"] == request_id]

    wait_until(lambda: logged() == [status])


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (b"GET /v1/mod els HTTP/1.1", "write a space in it as %20"),
        (b"GET  /version HTTP/1.1", "write a space in it as %20"),
        ("GET /v1/models/é HTTP/1.1".encode(), "write other characters than ASCII in it as %C3%A9 for é"),
        (b"GET /version HTTP/2.0", "the server speaks HTTP/1.1 and HTTP/1.0"),
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1", "the server speaks HTTP, not HTTPS"),
        (b"\x00\x01\x02 hello", "begins with a line such as `GET /version HTTP/1.1`"),
        (b"GET /version", "begins with a line such as `GET /version HTTP/1.1`"),
    ],
)
def test_request_line__that_is_wrong_gets_what_to_do(server: Server, line: bytes, advice: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert advice in json.loads(response.read())["error"]["message"]


def test_pipelined_requests__are_answered_in_order(server: Server) -> None:
    """Also those that wait in the server while a stream is sent, and with bodies of both kinds."""
    body = json.dumps(BODY | {"stream": True}).encode()
    stream = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nTrailer: a\r\n\r\n"
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(get + stream + chunked + get + stream + last)
        with connection.makefile("rb") as answers:
            raw = answers.read()
    assert [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+)", raw)] == [200, 200, 400, 200, 200, 200]
    assert raw.count(b"data: [DONE]") == 2
    assert raw.endswith(b'{"status":"ok"}')


def test_expectation__is_met_before_the_body_is_sent(server: Server) -> None:
    body = json.dumps(BODY).encode()
    head = HEAD + b"Expect: 100-continue\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 99999999\r\n\r\n")  # refused, so it is never sent
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_curl__sends_bodies_of_every_kind(server: Server, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(json.dumps(BODY))
    large.write_text(json.dumps(BODY | {"user": "a" * 2_000_000}))
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    curl = [
        program("curl"),
        "-sS",
        "--max-time",
        "30",
        "-H",
        "Content-Type: application/json",
        "-w",
        "\n%{http_code}\n",
    ]
    for options, statuses in (
        (["-d", f"@{small}", url, url], [200, 200]),  # two requests on one connection
        (["-d", f"@{small}", "-H", "Transfer-Encoding: chunked", url], [200]),
        (["-d", f"@{small}", "-H", "Expect: 100-continue", url], [200]),
        (["-d", f"@{small}", "--http1.0", url], [200]),
        (["-d", f"@{large}", url], [413]),  # curl expects 100-continue for large bodies by itself
        (["-d", f"@{large}", "-H", "Transfer-Encoding: chunked", "-H", "Expect:", url], [413]),
    ):
        result = subprocess.run([*curl, *options], capture_output=True, text=True, check=True)
        assert [int(line) for line in result.stdout.splitlines() if line.isdecimal()] == statuses, result.stdout


def test_sigterm__lets_a_running_request_finish_and_exits_with_0(environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as server, contextlib.closing(server.connect()) as connection:
        ask(connection, "POST", "/v1/completions", BODY | {"max_tokens": 8000, "stream": True})
        response = connection.getresponse()  # the stream has begun
        server.process.send_signal(signal.SIGTERM)
        events = response.read().split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert sum(len(json.loads(event[6:])["choices"][0]["text"]) for event in events[:-2]) == 8000
        assert server.process.wait(30) == 0
        wait_until(lambda: 200 in {line["status"] for line in server.logged("request")})
        assert {"event", "level", "timestamp", "logger"} <= set(json.loads(server.log[0]))
        assert "ROMEO" not in "".join(server.log)


def test_sigterm__with_abandoned_texts_exits_with_0(environment: dict[str, str]) -> None:
    with serving(SERVE, environment) as server:
        for _ in range(4):
            with server.open(BODY | {"max_tokens": 8000, "stream": True}) as connection:
                assert connection.recv(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert {json.loads(line)["level"] for line in server.log} == {"info"}


def test_taken_port__stops_the_start(server: Server, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", str(server.port)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: 127.0.0.1:{server.port} is in use by another program")
    assert "GRU_SERVE_PORT" in result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_variable__stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve"]
    changed = os.environ | environment | {"GRU_SERVE_MAX_TOKEN": "7"}
    result = subprocess.run(command, env=changed, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "GRU_SERVE_MAX_TOKEN is not a setting" in result.stderr
