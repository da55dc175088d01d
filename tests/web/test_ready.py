"""GET /readyz, the session store's URL and the rate limit, with a Redis server of a test's own."""

from __future__ import annotations

import logging
import re
import secrets
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.errors import InvalidSettings
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.application import client_of
from tests.harness.programs import free_port
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.wait import wait_until

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


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
        wait_until(lambda: status(client) == 503, 5)
        assert status(client, "/readyz?part=completions") == 200
        assert status(client, "/v1/sessions/a") == 503
        admin.replicaof("NO", "ONE")
        wait_until(lambda: status(client) == 200, 10)
        assert status(client, "/v1/sessions/a") == 200


def test_readyz__is_200_with_a_session_store_that_is_full(tiny_store: ModelStore, process: RedisProcess) -> None:
    """Only new sessions are refused."""
    with client_of(settings(tiny_store, process.url)) as client, redis.Redis.from_url(process.url) as admin:
        wait_until(lambda: status(client) == 200)
        client.put("/v1/sessions/a", json={"text": "ROMEO:"})
        admin.config_set("maxmemory", 1)
        probe = admin.pttl("gru-serve:probe")
        wait_until(lambda: admin.pttl("gru-serve:probe") > probe, 5)  # the server is checked again
        assert status(client) == 200
        assert client.put("/v1/sessions/b", json={"text": "ROMEO:"}).status_code == 429
        assert client.delete("/v1/sessions/a").status_code == 204


@pytest.mark.parametrize("kind", ["redis", "unix"])
def test_rate_limit__counts_in_a_session_store_of_every_kind(
    tiny_store: ModelStore, process: RedisProcess, tmp_path: Path, kind: str
) -> None:
    """The user has the permissions that the documentation lists, and no others."""
    with redis.Redis.from_url(process.url) as admin:
        for rule in re.findall("^ACL SETUSER sessions .*$", OPERATIONS.read_text(), re.MULTILINE):
            admin.execute_command(*rule.split())
        login = "//sessions:a-password@"
        url = f"unix:{login}{tmp_path}/socket" if kind == "unix" else process.url.replace("//", login)
        with client_of(settings(tiny_store, url, rate_limit="2/day")) as client:
            wait_until(lambda: status(client) == 200)
            answers = [client.put("/v1/sessions/a", json={"text": "ROMEO:"}).status_code for _ in range(3)]
            assert (answers[0], answers[2]) == (201, 429)
            assert admin.keys("gru-serve:starts*")


@pytest.mark.parametrize("rate_limit", ["", "2/day"])
@pytest.mark.parametrize("url", ["redis://user:{}@host:port", "redis://user:{}#@host", "redis://:{}@host?nonsense=1"])
def test_create_app__with_an_invalid_url_does_not_show_its_password(
    tiny_store: ModelStore, url: str, rate_limit: str
) -> None:
    password = secrets.token_hex()
    with pytest.raises(InvalidSettings, match="GRU_SERVE_SESSION_STORE") as caught:
        create_app(settings(tiny_store, url.format(password), rate_limit=rate_limit))
    assert password not in "".join(traceback.format_exception(caught.value))
