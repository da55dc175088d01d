"""The first contact with a Redis server."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import StoreUnavailable
from service.sessions.redis_server import RedisServer
from tests.harness.programs import free_port
from tests.harness.redis_process import redis_process


def test_check__refuses_a_server_that_was_just_started_until_others_have_restored(tmp_path: Path) -> None:
    """It refuses from the first moment on: a replica that was ready for a moment would be sent requests."""
    with redis_process(tmp_path) as redis, closing(RedisServer(redis.url, recovery_window_s=1)) as server:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            server.check()
        time.sleep(began + 1.1 - time.monotonic())
        server.check()


def test_check__refuses_at_once_if_no_server_listens() -> None:
    with closing(RedisServer(f"redis://127.0.0.1:{free_port()}/0")) as server, pytest.raises(StoreUnavailable):
        server.check()
