"""A Redis server that is met for the first time."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from service.sessions.redis_server import RedisServer
from tests.parts import free_port, redis_process


def test_who_meets_a_server_that_was_just_started_refuses_until_others_have_put_back(tmp_path: Path) -> None:
    """From the first moment on: a replica that said to be ready and then wasn't would be sent requests meanwhile."""
    with redis_process(tmp_path) as redis, closing(RedisServer(redis.url, recovery_window_s=1)) as server:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            server.check()
        time.sleep(began + 1.1 - time.monotonic())
        server.check()


def test_a_server_that_is_not_there_is_known_to_be_away_at_once() -> None:
    with closing(RedisServer(f"redis://127.0.0.1:{free_port()}/0")) as server, pytest.raises(StoreUnavailable):
        server.check()
