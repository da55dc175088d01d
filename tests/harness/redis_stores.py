"""Stores in Redis, as several replicas have them, and small sessions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

import numpy as np

from service.errors import StoreUnavailable
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session
from service.sessions.text import Text
from tests.harness.clock import Clock
from tests.harness.wait import wait_until

Answer = TypeVar("Answer")
LEASE_S = 0.3
TIMEOUT_S = 5.0  # of a call; the service's own is shorter than what a busy machine takes at times


def session(session_id: str = "a", characters: str = "ROMEO:") -> Session:
    return Session(session_id, "", "tiny@1", "ab", 7, 600, 0, 0, Text(np.zeros((1, 16), np.float32), 0, (), characters))


def appended(more: str) -> Callable[[Session], tuple[Session, int]]:
    """Return a change that appends characters; its answer is the position after them."""

    def change(one: Session) -> tuple[Session, int]:
        hidden = np.float32(0.25) + one.hidden * np.float32(0.5)  # another state that a GRU can have
        text = Text(hidden, 0, (), characters(one) + more)
        return replace(one, text=text), text.position

    return change


def characters(one: Session) -> str:
    return one.text.slice(0, one.position)


def when_served(call: Callable[[], Answer]) -> Answer:
    """Repeat a call until the store doesn't refuse it because of a restart."""
    answers: list[Answer] = []

    def is_served() -> bool:
        with suppress(StoreUnavailable):
            answers.append(call())
        return bool(answers)

    wait_until(is_served)
    return answers[0]


@contextmanager
def replicas(
    *urls: str,
    cache_bytes: int = 2**20,
    lease_s: float = LEASE_S,
    clock: Clock | None = None,
    recovery_window_s: float = 0.3,
) -> Iterator[list[RedisStore]]:
    """Run one store for each URL, all of which lead to the same server."""
    with ExitStack() as stack:
        stores = []
        for url in urls:
            server = RedisServer(url, TIMEOUT_S, recovery_window_s)
            store = RedisStore(server, 4096, cache_bytes, lease_s=lease_s, clock=clock)
            stores.append(stack.enter_context(closing(store)))
        for store in stores:
            when_served(store.check)
        yield stores
