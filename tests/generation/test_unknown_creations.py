"""A creation whose outcome nobody knows: it may be repeated under an id of the caller's own, and nowhere else."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.errors import OutcomeUnknown, StoreUnavailable
from service.generation.session_service import NewSession, SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.portable import StateSealer
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session, SessionKey
from service.sessions.text import Retention
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.wait import wait_until

SOURCE = SessionKey("", "source")
Creation = Callable[[SessionService, str | None], tuple[Session, bool]]


def create(sessions: SessionService, session_id: str | None) -> tuple[Session, bool]:
    return sessions.create("", NewSession(session_id, "tiny", "ROMEO:"))


def fork(sessions: SessionService, session_id: str | None) -> tuple[Session, bool]:
    return sessions.fork(SOURCE, session_id, None, None)


class PausedAtCreation(RedisStore):
    """A store whose server receives a creation and does not answer it until it is woken up."""

    redis: RedisProcess | None = None  # None while it answers

    def _call_create(self, *arguments: Any) -> list[Any]:
        if self.redis is not None:
            self.redis.send(signal.SIGSTOP)
        return super()._call_create(*arguments)


@contextmanager
def service(tiny_store: ModelStore, redis: RedisProcess) -> Iterator[tuple[SessionService, PausedAtCreation]]:
    retention = Retention(16, 10_000)
    store = PausedAtCreation(RedisServer(redis.url, recovery_window_s=0), retention.segment_chars)
    models = LoadedModels(tiny_store, 1, engine_settings())
    sessions = SessionService(models, store, StateSealer(["0123456789abcdef"]), 60, retention)
    try:
        wait_until(lambda: is_ready(store))
        yield sessions, store
    finally:
        sessions.runs.close()
        store.close()
        models.close()


def is_ready(store: RedisStore) -> bool:
    try:
        store.check()
    except StoreUnavailable:
        return False
    return True


@pytest.mark.parametrize("creation", [create, fork])
@pytest.mark.parametrize(("session_id", "error"), [(None, OutcomeUnknown), ("mine", StoreUnavailable)])
def test_creation__says_whether_it_may_be_repeated(
    tiny_store: ModelStore, tmp_path: Path, creation: Creation, session_id: str | None, error: type[Exception]
) -> None:
    """The server does what it had received as soon as it wakes up. A repetition under the same id finds it."""
    with redis_process(tmp_path) as redis, service(tiny_store, redis) as (sessions, store):
        create(sessions, SOURCE.id)
        store.redis = redis
        try:
            with pytest.raises(error) as caught:
                creation(sessions, session_id)
            assert type(caught.value) is error
        finally:
            redis.send(signal.SIGCONT)
            store.redis = None
        wait_until(lambda: is_ready(store))
        wait_until(lambda: len(sessions.page("", "", 10)) == 2)  # it was done
        if session_id is not None:
            again: Any = creation(sessions, session_id)
            assert (again[0].id, again[1]) == (session_id, False)
            assert len(sessions.page("", "", 10)) == 2
