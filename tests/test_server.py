"""The real process: gunicorn over a real socket, the real `openai` client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import pytest

from service.store import ModelStore

BODY = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 50, "seed": 7}


@contextmanager
def serving(command: list[str], environment: dict[str, str]) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Start a server on a free port (`PORT` in the command) and wait until it is ready; the port and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    process = subprocess.Popen(words, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or []))
    reader.start()
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if call(port, "GET", "/readyz")[0] == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None, "".join(log)
            assert time.monotonic() < deadline, "".join(log)
            time.sleep(0.05)
        process.log = log  # type: ignore[attr-defined]
        yield port, process
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        process.stderr.close()


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
    """One request on a connection of its own: status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore) -> dict[str, str]:
    return {
        "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_REQUEST_TIMEOUT_S": "1",
        "GRU_SERVE_HTTP_THREADS": "8",
    }


@pytest.fixture(scope="module")
def port(environment: dict[str, str]) -> Iterator[int]:
    with serving([sys.executable, "-m", "service", "serve", "--port", "PORT"], environment) as (port, _):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def text(port: int, **changes: object) -> str:
    status, answer = call(port, "POST", "/v1/completions", BODY | changes)
    assert status == 200, answer
    return answer["choices"][0]["text"]  # type: ignore[index,no-any-return]


def test_the_openai_client_works_unchanged(client: openai.OpenAI, port: int) -> None:
    answer = client.completions.create(
        model="tiny", prompt="ROMEO:", max_tokens=50, seed=7, temperature=0.8, top_p=0.9, stop=["§"], user="me"
    )
    assert len(answer.choices[0].text) == 50
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.total_tokens == 56
    assert answer.choices[0].text == text(port, temperature=0.8, top_p=0.9)
    own = client.completions.create(model="tiny", prompt="R", extra_body={"top_k": 1, "unknown_chars": "fold"})
    assert own.usage
    assert own.usage.completion_tokens == 16
    assert [model.id for model in client.models.list()] == ["tiny@1"]
    assert client.models.retrieve("tiny").id == "tiny@1"


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="a", suffix="b")
    assert (bad.value.code, bad.value.param) == ("unsupported_value", "suffix")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", stream=True)


def test_requests_side_by_side_get_what_each_gets_alone(port: int) -> None:
    alone = {seed: text(port, seed=seed) for seed in range(4)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: text(port, seed=seed % 4), range(40)))
    assert together == [alone[seed % 4] for seed in range(40)]


def test_a_restarted_server_gives_the_same_text(port: int, environment: dict[str, str]) -> None:
    with serving([sys.executable, "-m", "service", "serve", "--port", "PORT"], environment) as (other, _):
        assert text(other) == text(port)


def test_gunicorn_can_serve_the_application_itself(port: int, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gunicorn", "service.web.app:create_app()", "-b", "127.0.0.1:PORT"]
    with serving([*command, "--no-control-socket"], environment) as (other, _):
        assert text(other) == text(port)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_body_of_10_mb_gets_its_answer_and_not_a_reset(port: int, chunked: bool, keep: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"} | ({} if keep else {"Connection": "close"})
    body = (b"x" * 10_000 for _ in range(1000)) if chunked else b"x" * 10_000_000
    connection.request("POST", "/v1/completions", body, headers, encode_chunked=chunked)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"
    if keep:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


def test_a_body_of_unknown_length_is_read(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    pieces = iter([json.dumps(BODY)[:10].encode(), json.dumps(BODY)[10:].encode()])
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["text"] == text(port)
    connection.close()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


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
def test_bodies_that_stall_or_are_malformed_are_refused_and_hold_no_thread(port: int, data: bytes) -> None:
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]  # as many as threads
    for connection in stalled:
        connection.sendall(data)
    answers = []
    for connection in stalled:
        answers.append(connection.recv(65_536)[:12])
        connection.close()
    assert set(answers) <= {b"HTTP/1.1 408", b"HTTP/1.1 413", b"HTTP/1.1 400"}
    assert call(port, "GET", "/healthz")[0] == 200


def test_headers_that_stall_hold_no_thread(port: int) -> None:
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]
    for connection in stalled:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
    assert call(port, "GET", "/healthz")[0] == 200
    for connection in stalled:
        assert connection.recv(100) == b""
        connection.close()


def test_a_body_that_drips_has_a_deadline_as_a_whole(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began, answer = time.monotonic(), b""
        connection.settimeout(0.2)
        while not answer:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                answer = connection.recv(100)
            assert time.monotonic() - began < 20
        assert answer.startswith(b"HTTP/1.1 408")


def test_malformed_http_gets_an_answer_and_the_server_lives(port: int) -> None:
    for data in (
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(data + b"\r\n\r\n")
            assert connection.recv(65_536).startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    assert call(port, "GET", "/healthz")[0] == 200


def test_sigterm_lets_a_running_request_finish_and_exits_with_0(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "PORT"]
    with serving(command, environment) as (port, process), ThreadPoolExecutor(1) as pool:
        running = pool.submit(text, port, max_tokens=8000)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert len(running.result()) == 8000
        assert process.wait(30) == 0
        log = process.log  # type: ignore[attr-defined]
        lines = [json.loads(line) for line in log]
        assert {"event", "level", "timestamp", "logger"} <= set(lines[0])
        assert any(line["event"] == "request" and line["status"] == 200 for line in lines)
        assert "ROMEO" not in "".join(log)


def test_a_taken_port_is_an_error(port: int, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", str(port)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_variable_stops_the_start(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve"]
    changed = os.environ | environment | {"GRU_SERVE_MAX_TOKEN": "7"}
    result = subprocess.run(command, env=changed, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "GRU_SERVE_MAX_TOKEN is not a setting" in result.stderr
