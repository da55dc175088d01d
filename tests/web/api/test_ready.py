"""GET /readyz, the session store's URL and the rate limit, with a Redis server of a test's own."""

from __future__ import annotations

import logging
import re
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.errors import InvalidSettings
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.application import client_of
from tests.harness.programs import free_port
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_topologies import admin_of, redis_cluster, sentinel_group
from tests.harness.wait import wait_until

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "redis.md"


@pytest.fixture(autouse=True)
def restored_logs() -> Iterator[None]:
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path, "--unixsocket", str(tmp_path / "socket")) as process:
        yield process


def settings(store: ModelStore, url: str, **changes: Any) -> Settings:
    return Settings(model_store=store.root, model="tiny", session_store=SecretStr(url), **changes)


def status(client: FlaskClient, path: str = "/readyz") -> int:
    return client.get(path).status_code


def test_readyz__is_503_while_the_session_store_is_a_replica(tiny_store: ModelStore, process: RedisProcess) -> None:
    """As after an orderly failover: it answers, and no session call can succeed."""
    with client_of(settings(tiny_store, process.url)) as client, redis.Redis.from_url(process.url) as admin:
        wait_until(lambda: status(client) == 200)
        client.put("/v1/sessions/a", json={"text": "ROMEO:"})
        admin.replicaof("127.0.0.1", str(free_port()))
        wait_until(lambda: status(client) == 503)
        assert status(client, "/readyz?part=completions") == 200
        assert status(client, "/v1/sessions/a") == 503
        admin.replicaof("NO", "ONE")
        wait_until(lambda: status(client) == 200)
        assert status(client, "/v1/sessions/a") == 200


def test_readyz__is_200_with_a_session_store_that_is_full(tiny_store: ModelStore, process: RedisProcess) -> None:
    """Only new sessions are refused."""
    with client_of(settings(tiny_store, process.url)) as client, redis.Redis.from_url(process.url) as admin:
        wait_until(lambda: status(client) == 200)
        client.put("/v1/sessions/a", json={"text": "ROMEO:"})
        admin.config_set("maxmemory", 1)
        probe = admin.pttl("gru-serve:probe")
        wait_until(lambda: admin.pttl("gru-serve:probe") > probe)  # the server is checked again
        assert status(client) == 200
        assert client.put("/v1/sessions/b", json={"text": "ROMEO:"}).status_code == 429
        assert client.delete("/v1/sessions/a").status_code == 204


def test_readyz__says_what_to_do_about_the_session_store(tiny_store: ModelStore, process: RedisProcess) -> None:
    with client_of(settings(tiny_store, process.url.replace("//", "//someone:a-password@"))) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "correct the user and the password in GRU_SERVE_SESSION_STORE" in answer.text
        assert "a-password" not in answer.text
        assert "correct the user" not in client.get("/v1/sessions/a").text  # no advice for those who can't follow it


@contextmanager
def shared_store(kind: str, directory: Path, login: str) -> Iterator[tuple[str, list[RedisProcess]]]:
    """Run servers. Yields the session store's URL, with a login, and the servers."""
    if kind == "cluster":
        with redis_cluster(directory) as cluster:
            yield cluster.url.replace("//", f"//{login}@"), cluster.masters
    elif kind == "sentinel":
        with sentinel_group(directory, num_replicas=0, num_sentinels=1) as group:
            yield group.url.replace("//", f"//{login}@"), group.servers
    else:
        with redis_process(directory, "--unixsocket", str(directory / "socket")) as process:
            url = f"unix://{login}@{directory}/socket" if kind == "unix" else process.url.replace("//", f"//{login}@")
            yield url, [process]


@pytest.mark.parametrize("kind", ["redis", "unix", "sentinel", "cluster"])
def test_session_store_and_rate_limit__need_only_the_permissions_that_are_documented(
    tiny_store: ModelStore, tmp_path: Path, kind: str
) -> None:
    """Whatever the URL leads to, starts are counted there."""
    rules = re.findall("^ACL SETUSER sessions .*$", DOCUMENTATION.read_text(), re.MULTILINE)
    assert len(rules) == 3
    with shared_store(kind, tmp_path, "sessions:a-password") as (url, servers):
        clients = [admin_of(server) for server in servers]
        for client in clients:
            for rule in rules if kind == "cluster" else rules[:2]:
                client.execute_command(*rule.split())
        key, entry = new_key("alice")
        limited = settings(tiny_store, url, rate_limit="4/day", api_keys=SecretStr(entry))
        with client_of(limited) as one:
            one.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
            wait_until(lambda: status(one) == 200)
            answers = [one.put(f"/v1/sessions/{number}", json={"text": "ROMEO:"}).status_code for number in range(5)]
            assert answers == [201] * 4 + [429]
            assert one.get("/v1/sessions/1").status_code == 200
            assert len(one.get("/v1/sessions").get_json()["data"]) == 4
        with client_of(limited) as other:
            other.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
            wait_until(lambda: status(other) == 200)
            assert other.post("/v1/sessions/1/feed", json={"text": "a"}).status_code == 429
            assert other.delete("/v1/sessions/1").status_code == 204
        assert any(client.keys("gru-serve:starts*") for client in clients)
        for client in clients:
            denied = client.execute_command("ACL", "LOG")
            assert not denied, denied
            client.close()


@pytest.mark.parametrize("rate_limit", ["", "2/day"])
@pytest.mark.parametrize("url", ["redis://user:{}@host:port", "redis://user:{}#@host", "redis://:{}@host?nonsense=1"])
def test_create_app__with_an_invalid_url_does_not_show_its_password(
    tiny_store: ModelStore, url: str, rate_limit: str
) -> None:
    password = secrets.token_hex()
    with pytest.raises(InvalidSettings, match="GRU_SERVE_SESSION_STORE") as caught:
        create_app(settings(tiny_store, url.format(password), rate_limit=rate_limit))
    assert password not in "".join(traceback.format_exception(caught.value))
