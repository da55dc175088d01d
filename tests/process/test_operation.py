"""API keys and model versions that change while the real server works."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api_keys import new_key
from service.client import Client, ServerError
from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny
from tests.harness.server import SERVE, Server, serving
from tests.harness.wait import wait_until

(OLD, OLD_ENTRY), (NEW, NEW_ENTRY), (BOB, BOB_ENTRY) = new_key("alice"), new_key("alice"), new_key("bob")
NUM_CLIENTS = 8


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    publish_tiny(store)
    return store


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{OLD_ENTRY}\n")
    return path


@pytest.fixture
def server(store: ModelStore, keys: Path) -> Iterator[Server]:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MODEL_POLL_S": "0",
        "GRU_SERVE_API_KEYS": BOB_ENTRY,
        "GRU_SERVE_API_KEYS_FILE": str(keys),
    }
    with serving(SERVE, environment) as server:
        yield server


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def ask(server: Server, method: str, path: str, body: object = None, key: str = BOB) -> tuple[int, Any]:
    connection = server.connect()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if response.headers.get_content_type() == "application/json" else data


def knows(server: Server, key: str) -> bool:
    return ask(server, "GET", "/v1/models", key=key)[0] == 200


def test_api_keys__change_while_the_server_runs(server: Server, keys: Path) -> None:
    """Old and new key have one owner. A broken file changes nothing. Without its entry the old key is refused."""
    with Client(url(server), api_key=OLD) as client:
        session = client.create("ROMEO:", seed=7)
        before = "".join(session.generate(max_tokens=20))
    keys.write_text(f"{OLD_ENTRY}\nalice:not-a-hash\n")
    wait_until(lambda: knows(server, OLD) and bool(server.logged("API keys not read: the previous ones stay valid")))
    keys.write_text(f"{OLD_ENTRY}\n{NEW_ENTRY}\n")
    wait_until(lambda: knows(server, NEW))
    assert knows(server, OLD)
    keys.write_text(f"{NEW_ENTRY}\n")
    wait_until(lambda: not knows(server, OLD))
    with Client(url(server), api_key=NEW) as client:
        assert client.open(session.id).text() == f"ROMEO:{before}"
    with Client(url(server), api_key=OLD) as client, pytest.raises(ServerError) as refused:
        client.open(session.id)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    with Client(url(server), api_key=BOB) as client, pytest.raises(ServerError) as missing:
        client.open(session.id)
    assert (missing.value.status, missing.value.code) == (404, "session_not_found")
    assert len(server.logged("API keys not read: the previous ones stay valid")) == 1
    wait_until(lambda: "bob" in {line.get("key_name") for line in server.logged("request")})
    assert {line.get("key_name") for line in server.logged("request")} == {None, "alice", "bob"}
    log = "".join(server.log)
    assert not any(secret in log for secret in (OLD, NEW, BOB, session.id, "not-a-hash"))


def test_openai_client__sends_the_key(server: Server) -> None:
    with openai.OpenAI(base_url=f"{url(server)}/v1", api_key=BOB, max_retries=0) as client:
        assert len(client.completions.create(model="tiny", prompt="a", max_tokens=5).choices[0].text) == 5
        chunks = client.completions.create(model="tiny", prompt="a", max_tokens=5, stream=True)
        assert len("".join(chunk.choices[0].text for chunk in chunks)) == 5
    with openai.OpenAI(base_url=f"{url(server)}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.completions.create(model="tiny", prompt="a")
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_large_body_without_a_key__gets_an_answer_and_no_reset(server: Server, chunked: bool, keep: bool) -> None:
    connection = server.connect()
    headers = {"Content-Type": "application/json"} | ({} if keep else {"Connection": "close"})
    body = (b"x" * 10_000 for _ in range(150)) if chunked else b"x" * 1_500_000
    connection.request("POST", "/v1/completions", body, headers, encode_chunked=chunked)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (401, "invalid_api_key")
    if keep:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


def test_log__quotes_no_request_that_gunicorn_can_not_parse(server: Server) -> None:
    for data in (
        f"GET /v1/sessions/{OLD} x HTTP/9.9\r\n\r\n",
        f"GET / HTTP/1.1\r\nAuthorization {OLD}: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: localhost\r\n Bearer {OLD}\r\n\r\n",
        f"{OLD} / HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\nContent-Length: {OLD}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(data.encode())
            assert connection.recv(65_536).startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    wait_until(lambda: len(server.logged("request refused")) == 5)
    assert OLD[4:] not in "".join(server.log)


def test_bad_key_file__stops_the_start_in_one_line(store: ModelStore, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from service.__main__ import main

    missing = str(tmp_path / "nowhere")
    result = CliRunner().invoke(main, ["serve", "--model-store", str(store.root), "--api-keys-file", missing])
    assert result.exit_code == 2
    assert f"GRU_SERVE_API_KEYS_FILE: can't read {missing}" in result.stderr
    assert "Traceback" not in result.stderr


def test_versions__change_under_load_and_no_request_fails(server: Server, store: ModelStore) -> None:
    """Clients complete, stream and feed while five versions are published in turn, two of them broken."""
    over, versions = threading.Event(), []

    def work(number: int) -> int:
        """Send requests until `over` is set and return their number; fail at the first wrong answer."""
        num_requests = 0
        with Client(url(server), api_key=BOB, retry_s=0) as client:
            session = client.create("ROMEO:", seed=number)
            while not over.is_set() or num_requests < 10:
                status, answer = ask(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 20})
                assert status == 200, answer
                assert len(answer["choices"][0]["text"]) == 20
                versions.append(answer["model"])
                assert len("".join(session.generate(max_tokens=30))) == 30
                session.feed("JULIET:")
                num_requests += 3
            assert client.open(session.id).model == session.model == "tiny@1"  # a session keeps its version
        return num_requests

    def served() -> str:
        status, answer = ask(server, "POST", "/admin/reload", {})
        assert status == 200, answer
        (name,) = answer["data"]
        return f"{name['model']} {name['code']}"

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        working = [pool.submit(work, number) for number in range(NUM_CLIENTS)]
        try:
            wait_until(lambda: len(versions) > NUM_CLIENTS or any(one.done() for one in working))
            for number, is_broken in enumerate((False, True, False, True, False), 2):
                ref = publish_tiny(store, seed=number)
                if is_broken:
                    (store.resolve(ref).path / "model.safetensors").write_bytes(b"")
                    assert served() == f"tiny@{number - 1} invalid_artifact"
                    assert ask(server, "POST", "/v1/completions", {"prompt": "a", "model": ref})[0] == 503
                    store.delete(ref)
                    assert served() == f"tiny@{number - 1} None"
                else:
                    assert served() == f"{ref} None"
                    wait_until(lambda ref=ref: ref in versions)  # type: ignore[misc]
                assert server.call("GET", "/readyz")[0] == 200
        finally:
            over.set()
        assert all(one.result() >= 10 for one in working)
    assert {f"tiny@{number}" for number in (1, 2, 4, 6)} >= set(versions) >= {"tiny@2", "tiny@4", "tiny@6"}
    metrics = ask(server, "GET", "/metrics")[1].decode()
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    found = {(one.name, one.labels.get("outcome"), one.labels.get("status")): one.value for one in samples}
    assert found["gru_serve:model_reloads_total", "switched", None] == 3
    assert found["gru_serve:model_reloads_total", "failed", None] == 2
    assert server.call("GET", "/metrics")[0] == 401


def test_versions__are_found_by_polling(store: ModelStore) -> None:
    environment = {
        "GRU_SERVE_MODEL_STORE": str(store.root),
        "GRU_SERVE_MODEL": "tiny",
        "GRU_SERVE_MODEL_POLL_S": "0.05",
    }
    with serving(SERVE, environment) as server:

        def model() -> str:
            ref: str = server.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[1]["model"]
            return ref

        assert model() == "tiny@1"
        publish_tiny(store, seed=1)
        wait_until(lambda: model() == "tiny@2")
