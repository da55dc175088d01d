"""Runs are saved on their way, so that what the death of a replica costs doesn't depend on the length of the run."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis import exceptions as errors
from structlog.testing import capture_logs

from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import GruServeError, OutcomeUnknown, RunTakenOver, SessionBusy, SessionLost, StoreUnavailable
from service.generation import reader
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import Session, SessionKey
from service.sessions.text import Retention
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import TIMEOUT_S
from tests.harness.wait import wait_until

KEY = SessionKey("", "a")
RETENTION = Retention(16, 20_000)
LEASE_S = 0.6
SAVE_S = 0.1
LONG = RunRequest(2000, replace(PLAIN, temperature=0.9))
# Settings for which a resumed run has to know what was generated before.
DIFFICULT = RunRequest(1500, SamplingSettings(0.9, repetition_penalty=1.3, frequency_penalty=0.2), ("zqz", "xkqj"))


class Replica:
    """A service whose engine is slow enough that a run goes on while a test looks at it."""

    def __init__(
        self, url: str, prefix: str, models: ModelStore, ending: ExitStack, save_interval_s: float, lease_s: float
    ) -> None:
        self.store = RedisStore(
            RedisServer(url, TIMEOUT_S, 0.3), RETENTION.segment_chars, prefix=prefix, lease_s=lease_s
        )
        ending.callback(self.store.close)
        self.models = LoadedModels(models, 1, engine_settings())
        ending.callback(self.models.close)
        sealer = StateSealer(["0123456789abcdef"])
        self.sessions = SessionService(self.models, self.store, sealer, 60, RETENTION, save_interval_s=save_interval_s)
        ending.callback(self.sessions.runs.close)
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        try:
            self.store.page("", "", 1)
        except StoreUnavailable:
            return False
        return True

    def slow_down(self, char_s: float = 4e-4) -> None:
        """Let the engine generate at most a character in each `char_s` seconds."""
        engine = self.models.get("tiny").engine
        advance = engine._stepper.advance

        def slowly(rows: Any, num_chars: int) -> Any:
            time.sleep(char_s * num_chars)
            return advance(rows, num_chars)

        engine._stepper.advance = slowly  # type: ignore[method-assign]

    def create(self, session_id: str = "a") -> None:
        self.sessions.create("", NewSession(session_id, "tiny", "ROMEO:", seed=7))

    def generate(self, request: RunRequest, session_id: str = "a") -> RunStream:
        return self.sessions.runs.generate(SessionKey("", session_id), request, None)

    def uninterrupted(self, request: RunRequest) -> tuple[str, Session]:
        """Return the text of a run that is not disturbed, and the session after it."""
        self.create("other")
        text = "".join(piece.text for piece in self.generate(request, "other").whole(20) if piece is not None)
        return text, self.sessions.get(SessionKey("", "other"))

    def dies(self) -> None:
        """Neither save, renew nor release any more, as if the process were dead."""
        self.store._renewer.close()
        self.store._server.call = _dead  # type: ignore[method-assign, assignment]


def _dead(*_: Any) -> Any:
    raise StoreUnavailable("dead")


@pytest.fixture
def replica(redis_url: str, tiny_store: ModelStore) -> Iterator[Callable[..., Replica]]:
    """Return a function that makes replicas of one deployment."""
    prefix = secrets.token_hex(8)
    with ExitStack() as ending:
        yield lambda url=redis_url, save_interval_s=SAVE_S, lease_s=LEASE_S: Replica(
            url, prefix, tiny_store, ending, save_interval_s, lease_s
        )


class Reader:
    """Reads a stream on a thread of its own until it ends or fails."""

    def __init__(self, stream: RunStream, ending: ExitStack) -> None:
        self.stream, self.text = stream, ""
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        ending.callback(self._thread.join)
        ending.callback(stream.close)

    def _read(self) -> None:
        try:
            for piece in self.stream.chunks(0.0, 20):
                self.text += piece.text if piece is not None else ""
        except GruServeError as error:
            self.error = error

    def join(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def take(stream: RunStream) -> str:
    return "".join(piece.text for piece in stream.chunks(0.0, 20) if piece is not None)


def observe_saves(replica: Replica, ending: ExitStack) -> list[Session]:
    """Return a list to which each save of session `a` is appended until the run ends."""
    saves: list[Session] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            session = replica.sessions.get(KEY)
            if not saves or session.revision > saves[-1].revision:
                saves.append(session)

    thread = threading.Thread(target=watch)
    thread.start()
    ending.callback(thread.join)
    ending.callback(is_over.set)
    return saves


@pytest.mark.parametrize("request_", [LONG, DIFFICULT])
def test_run__is_continued_to_the_bit_from_every_save_on_its_way(
    replica: Callable[..., Replica], ending: ExitStack, request_: RunRequest
) -> None:
    one, two = replica(), replica()
    whole, expected = two.uninterrupted(request_)
    one.create()
    one.slow_down()
    saves = observe_saves(two, ending)
    reader = Reader(one.generate(request_), ending)
    reader.join()
    assert reader.text == whole
    end = two.sessions.get(KEY)
    assert (end.run, end.hidden.tobytes()) == (expected.run, expected.hidden.tobytes())
    on_the_way = [save for save in saves if save.run is not None and not save.run.is_finished and save.position > 6]
    assert len(on_the_way) >= 3
    for number, save in enumerate(on_the_way):
        assert save.text.slice(0, save.position) == "ROMEO:" + whole[: save.position - 6]
        two.store.create(replace(save, id=f"copy{number}"))
        key = SessionKey("", f"copy{number}")
        assert take(two.sessions.runs.resume(key, 6)) == whole
        resumed = two.sessions.get(key)
        assert (resumed.run, resumed.hidden.tobytes()) == (expected.run, expected.hidden.tobytes())


def test_run__saved_on_its_way_ends_before_a_stop_string_that_began_before_the_save(
    replica: Callable[..., Replica], ending: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is as long as many saves: all of them hold characters of it that don't belong to the text."""
    monkeypatch.setattr(reader, "MAX_STOP_CHARS", 1500)
    one, two = replica(), replica()
    whole, _ = two.uninterrupted(LONG)
    request = replace(LONG, stops=(whole[100:1600],))
    two.sessions.delete(SessionKey("", "other"))
    expected_text, expected = two.uninterrupted(request)
    assert expected_text == whole[:100]
    one.create()
    one.slow_down()
    saves = observe_saves(two, ending)
    reading = Reader(one.generate(request), ending)
    reading.join()
    assert reading.text == whole[:100]
    end = two.sessions.get(KEY)
    assert max(save.position for save in saves) <= 106  # no save goes further than what was sent
    assert (end.run, end.hidden.tobytes()) == (expected.run, expected.hidden.tobytes())


def test_save_progress__is_at_most_two_intervals_behind(replica: Callable[..., Replica], ending: ExitStack) -> None:
    """As long as the run lasts, its record is about as new as what was sent a moment ago.

    A machine that stalls delays a save; so of several rounds, one has to show it without an exception.
    """
    interval_s = 0.5
    one, two = replica(save_interval_s=interval_s), replica()
    one.create()
    one.slow_down()
    reader = Reader(one.generate(replace(LONG, max_chars=1_000_000)), ending)

    def is_in_time() -> bool:
        sent: list[tuple[float, int]] = []
        until = time.monotonic() + 4 * interval_s
        while (now := time.monotonic()) < until:
            sent.append((now, 6 + len(reader.text)))
            time.sleep(0.02)
            before = [position for at, position in sent if at <= now - 2 * interval_s]
            if before and two.sessions.get(KEY).position < before[-1]:
                return False
        return True

    wait_until(is_in_time)
    assert two.sessions.get(KEY).position > 6
    one.dies()
    got = reader.text
    began = two.sessions.get(KEY).position
    resumed = two.sessions.runs.resume(KEY, 6 + len(got))
    assert began > 6 + len(got) // 2  # it need not be generated again from the start
    resumed.close()


def test_save_progress__never_goes_further_than_was_sent(replica: Callable[..., Replica]) -> None:
    """So a client whose replica has died can feed where its stream broke off, though it hasn't read for long."""
    one, two = replica(), replica()
    one.create()
    one.slow_down()
    stream = one.generate(replace(LONG, max_chars=15_000))
    pieces, got = stream.chunks(0.0, 20), ""
    while two.sessions.get(KEY).position == 6:
        piece = next(pieces)
        got += piece.text if piece is not None else ""
    time.sleep(5 * SAVE_S)  # nothing to wait for: the position must not move
    assert two.sessions.get(KEY).position <= 6 + len(got)
    one.dies()

    def is_free() -> bool:
        try:
            two.sessions.feed(KEY, FeedRequest("xyz", 6 + len(got)))
        except SessionBusy:
            return False
        return True

    wait_until(is_free)
    assert two.sessions.text(KEY, None, None)[0] == f"ROMEO:{got}xyz"
    stream.close()


def test_save_progress__leaves_runs_alone_that_are_read_as_a_whole(replica: Callable[..., Replica]) -> None:
    """If the process is interrupted, such a session has to be as it was before."""
    one, two = replica(), replica()
    one.create()
    one.slow_down()
    stream = one.generate(replace(LONG, max_chars=15_000))
    pieces = stream.whole(0.1)
    for _ in range(5):
        assert next(pieces) is None
    assert two.sessions.get(KEY).position == 6
    one.sessions.runs.interrupt_all(0)
    assert two.sessions.get(KEY).position == 6


def test_save_progress__keeps_the_session_leased(replica: Callable[..., Replica], ending: ExitStack) -> None:
    one, two = replica(lease_s=10.0), replica(lease_s=10.0)  # longer than a machine stalls
    one.create()
    one.slow_down()
    reader = Reader(one.generate(replace(LONG, max_chars=1_000_000)), ending)
    wait_until(lambda: two.sessions.get(KEY).position > 6)
    for sessions in (one.sessions, two.sessions):
        operations: list[Callable[[], object]] = [
            partial(sessions.feed, KEY, FeedRequest("x")),
            partial(sessions.delete, KEY),
            partial(sessions.rewind, KEY, 3),
        ]
        for operation in operations:
            with pytest.raises(SessionBusy):
                operation()
    assert reader.error is None
    position = 6 + len(reader.text)
    more = two.sessions.runs.resume(KEY, position)  # handing over works in between two saves
    reader.join()
    assert isinstance(reader.error, RunTakenOver)
    more.close()


def test_save_progress__does_not_postpone_handing_over(replica: Callable[..., Replica], ending: ExitStack) -> None:
    """A save renews the lease. With frequent saves no renewal is due, but the holder learns of the request."""
    one, two = replica(lease_s=2.0), replica(lease_s=2.0)
    one.create()
    one.slow_down()
    reader = Reader(one.generate(replace(LONG, max_chars=1_000_000)), ending)
    wait_until(lambda: two.sessions.get(KEY).position > 6)
    lease, _ = two.store.begin(KEY, lambda session: (replace(session), None), take_over=True)
    reader.join()
    assert isinstance(reader.error, RunTakenOver)
    assert lease is not None
    lease.release()


def test_save_progress__ends_the_run_if_another_replica_has_the_lease(
    replica: Callable[..., Replica], ending: ExitStack
) -> None:
    one, two = replica(), replica()
    one.create()
    one.slow_down()
    reader = Reader(one.generate(replace(LONG, max_chars=15_000)), ending)
    wait_until(lambda: two.sessions.get(KEY).position > 6)
    one.store._renewer._closing.set()  # its lease ends

    def is_fed() -> bool:
        try:
            two.sessions.feed(KEY, FeedRequest("xyz"))
        except SessionBusy:
            return False
        return True

    server = one.store._server
    call, server.call = server.call, _dead  # type: ignore[method-assign, assignment]
    wait_until(is_fed)
    session = two.sessions.get(KEY)
    server.call = call  # type: ignore[method-assign]
    reader.join()
    assert isinstance(reader.error, RunTakenOver)
    assert two.sessions.get(KEY).revision == session.revision


@pytest.mark.parametrize("is_done", [False, True])
def test_save_progress__whose_outcome_is_unknown_is_tried_again(
    replica: Callable[..., Replica], ending: ExitStack, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    one, two = replica(), replica()
    whole, expected = two.uninterrupted(LONG)
    one.create()
    one.slow_down()
    run, num_lost = one.store._server._run_script, 0

    def lose(*arguments: Any, is_retry: bool = False, **limits: Any) -> Any:
        nonlocal num_lost
        if arguments[1] != "save" or num_lost == 3:
            return run(*arguments, is_retry=is_retry, **limits)
        num_lost += 1
        if is_done:
            run(*arguments, is_retry=is_retry, **limits)
        raise errors.TimeoutError

    stream = one.generate(LONG)
    monkeypatch.setattr(one.store._server, "_run_script", lose)
    reader = Reader(stream, ending)
    reader.join()
    assert num_lost == 3
    assert (reader.text, reader.error) == (whole, None)
    end = two.sessions.get(KEY)
    assert (end.run, end.hidden.tobytes()) == (expected.run, expected.hidden.tobytes())


def test_run__survives_an_outage_of_redis_that_ends_before_it(
    replica: Callable[..., Replica], ending: ExitStack, tmp_path: Path
) -> None:
    own = ending.enter_context(redis_process(tmp_path, "--appendonly", "yes", "--appendfsync", "everysec"))
    request = replace(LONG, max_chars=5000)
    one = replica(own.url)
    whole, expected = one.uninterrupted(request)
    one.create()
    one.slow_down(1e-3)
    reader = Reader(one.generate(request), ending)
    wait_until(lambda: one.sessions.get(KEY).position > 6)
    on_disk = own.on_disk()
    restart_with_lost_writes(own, on_disk)
    num_sent = len(reader.text)
    wait_until(one.is_ready)
    wait_until(lambda: one.sessions.get(KEY).position > 6 + num_sent)  # saving goes on
    reader.join()
    assert (reader.text, reader.error) == (whole, None)
    end = one.sessions.get(KEY)
    assert (end.run, end.hidden.tobytes()) == (expected.run, expected.hidden.tobytes())


def restart_with_lost_writes(redis: RedisProcess, on_disk: dict[Path, int]) -> None:
    redis.kill()
    redis.lose_what_was_written_since(on_disk)
    redis.start()


def test_lease__is_still_valid_after_a_save_without_an_answer(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was done or not, the next save follows it."""
    one = replica()
    run = one.store._server._run_script
    for name, is_done in (("done", True), ("lost", False)):
        one.create(name)
        key = SessionKey("", name)
        lease, _ = one.store.begin(key, lambda session: (replace(session), None))
        assert lease is not None

        def lose(*arguments: Any, is_retry: bool = False, is_done: bool = is_done, **limits: Any) -> Any:
            if is_done:
                run(*arguments, is_retry=is_retry, **limits)
            raise errors.TimeoutError

        with monkeypatch.context() as lost:
            lost.setattr(one.store._server, "_run_script", lose)
            with pytest.raises(OutcomeUnknown):
                lease.save(replace(lease.session, seed=8))
        wait_until(one.is_ready)
        lease.save(replace(lease.session, seed=9), release=True)
        saved = one.store.load(key)
        assert (saved.seed, saved.revision) == (9, 4)


def test_registry__starts_no_saver_if_sessions_end_with_the_process(tiny_store: ModelStore) -> None:
    models = LoadedModels(tiny_store, 1, engine_settings())
    before = threading.active_count()
    SessionService(models, MemoryStore(10, 10**7), StateSealer(["0123456789abcdef"]), 60, RETENTION)
    assert threading.active_count() == before
    models.close()


# A server that loses a session while its run is under way


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path) as process:
        yield process


def test_run__outlasts_a_server_that_forgets_everything(
    replica: Callable[..., Replica], own_redis: RedisProcess, ending: ExitStack
) -> None:
    """The session is restored as after a restart. At most the client resumes once."""
    one = replica(own_redis.url)
    text, _ = one.uninterrupted(LONG)
    one.create()
    one.slow_down()
    stream = Reader(one.generate(LONG), ending)
    wait_until(lambda: len(stream.text) > 200)
    with Redis.from_url(own_redis.url) as client:
        client.flushall()
    stream.join()
    assert isinstance(stream.error, StoreUnavailable | None)
    wait_until(one.is_ready)
    rest = Reader(one.sessions.runs.resume(KEY, 6 + len(stream.text)), ending)
    rest.join()
    assert (stream.text + rest.text, rest.error) == (text, None)


@pytest.mark.parametrize("damage", ["deleted", "spoiled"])
def test_run__whose_session_the_server_has_lost_ends_with_that_and_disturbs_no_other(
    replica: Callable[..., Replica], own_redis: RedisProcess, ending: ExitStack, damage: str
) -> None:
    one = replica(own_redis.url)
    one.create()
    one.create("b")
    one.slow_down(2e-3)
    streams = [Reader(one.generate(LONG, session_id), ending) for session_id in "ab"]
    wait_until(lambda: all(len(stream.text) > 50 for stream in streams))
    with Redis.from_url(own_redis.url) as client, capture_logs() as logs:
        (key,) = client.scan_iter("*/a")
        client.delete(key)
        if damage == "spoiled":
            client.set(key, "something else")
        streams[0].join()
        after = one.sessions.get(SessionKey("", "b")).position
        wait_until(lambda: one.sessions.get(SessionKey("", "b")).position > after)  # it is still saved on its way
    assert isinstance(streams[0].error, SessionLost)
    assert [line["event"] for line in logs if "exc_info" in line] == []
    assert streams[1].error is None
