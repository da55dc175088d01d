"""Replicas that share a Redis server: sessions move between them, and nothing is lost, repeated or changed."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import exceptions as errors

from service.engine.automaton.form import Form
from service.engine.sampling_settings import PLAIN
from service.errors import (
    GruServeError,
    ModelChanged,
    OutcomeUnknown,
    Overloaded,
    PositionConflict,
    RevisionConflict,
    RunTakenOver,
    SessionBusy,
    SessionGone,
    SessionLost,
    SessionNotFound,
    StoreUnavailable,
)
from service.generation.candidates import Origin, score_candidates
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.portable import StateSealer
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import SessionKey
from service.sessions.session_store import Lease, Operation
from service.sessions.text import Retention
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings
from tests.harness.redis_process import RedisProcess, redis_process
from tests.harness.redis_stores import TIMEOUT_S, when_served

Replica = tuple[SessionService, RedisStore]
LEASE_S = 0.6
NO_IDS = np.empty(0, np.int64)
LONG = RunRequest(5000, replace(PLAIN, temperature=0.9))
FORMED = replace(LONG, form=Form("regex", "([A-Z][a-z]{0,7}[,.?] |[a-z]{3}\n)*[A-Z]+!"))


@pytest.fixture(scope="module")
def url(redis_url: str) -> str:
    return redis_url


@pytest.fixture
def replicas(url: str, tiny_store: ModelStore) -> Iterator[Callable[..., Replica]]:
    """Return a function that makes replicas of one deployment."""
    prefix = secrets.token_hex(8)
    with ExitStack() as ending:

        def make(
            at: str = url, published: ModelStore = tiny_store, lease_s: float = LEASE_S, **engine: object
        ) -> Replica:
            retention = Retention(16, 10_000)
            store = RedisStore(RedisServer(at, TIMEOUT_S, 0.3), retention.segment_chars, prefix=prefix, lease_s=lease_s)
            ending.callback(store.close)
            models = LoadedModels(published, 1, engine_settings(**engine))
            ending.callback(models.close)
            when_served(lambda: store.page("", "", 1))
            sealer = StateSealer(["0123456789abcdef"])
            sessions = SessionService(models, store, sealer, 60, retention)
            ending.callback(sessions.runs.close)
            return sessions, store

        yield make


def lease_of(store: RedisStore, session_id: str = "a", *, take_over: bool = False) -> Lease:
    """Lease a session. Beginning saves it once."""
    lease, _ = store.begin(SessionKey("", session_id), lambda session: (replace(session), None), take_over=take_over)
    assert lease is not None
    return lease


def create(replica: Replica, session_id: str = "a", text: str = "ROMEO:") -> None:
    replica[0].create("", NewSession(session_id, "tiny", text, seed=7))


def take(continuation: RunStream, num_chars: int = 10**9) -> str:
    """Return the text of a stream, or as soon as there are num_chars characters, its beginning."""
    text = ""
    for piece in continuation.chunks(0.0, 20):
        text += piece.text if piece is not None else ""
        if len(text) >= num_chars:
            break
    return text


def uninterrupted(replica: Replica, request: RunRequest = LONG) -> str:
    create(replica, "other")
    return take(replica[0].runs.generate(SessionKey("", "other"), request, None))


def text_of(replica: Replica, session_id: str = "a") -> str:
    return replica[0].text(SessionKey("", session_id), None, None)[0]


def dies(replica: Replica) -> None:
    """Keep a replica from renewing its leases, saving and releasing, as if its process were dead."""
    store = replica[1]
    store._renewer.close()
    store._server.call = lambda *_: (_ for _ in ()).throw(StoreUnavailable("dead"))  # type: ignore[method-assign]


def test_replicas__see_each_others_saves(replicas: Callable[[], Replica]) -> None:
    one, two = replicas(), replicas()
    create(one)
    for number in range(20):
        replica = (one, two)[number % 2]
        replica[0].feed(SessionKey("", "a"), FeedRequest("to be ", 6 + 6 * number))
    assert text_of(one) == text_of(two) == "ROMEO:" + "to be " * 20
    states = {replica[0].get(SessionKey("", "a")).hidden.tobytes() for replica in (one, two)}
    alone = replicas()
    create(alone, "b", "ROMEO:" + "to be " * 20)
    assert states == {alone[0].get(SessionKey("", "b")).hidden.tobytes()}
    two[0].delete(SessionKey("", "a"))
    with pytest.raises((SessionNotFound, SessionGone)):
        one[0].get(SessionKey("", "a"))
    with pytest.raises(SessionNotFound):
        one[0].get(SessionKey("", "a"))


@contextmanager
def exchanges(replica: Replica) -> Iterator[list[Operation]]:
    """Return the list to which the operations of the replica's store are appended during the block."""
    server, operations = replica[1]._server, []
    call = server.call

    def listen(operation: Operation, key: str, *arguments: Any) -> list[Any]:
        operations.append(operation)
        return call(operation, key, *arguments)

    server.call = listen  # type: ignore[method-assign]
    yield operations
    server.call = call  # type: ignore[method-assign]


def test_cached_copy__saves_exchanges_with_redis(replicas: Callable[[], Replica]) -> None:
    one, two = replicas(), replicas()
    create(one)
    with exchanges(one) as operations:
        one[0].feed(SessionKey("", "a"), FeedRequest("to be "))
        assert operations == ["claim"]
        first = take(one[0].runs.generate(SessionKey("", "a"), RunRequest(20, PLAIN), 12))
        assert operations == ["claim", "claim", "save"]
    with exchanges(two) as operations:  # it has no cached copy
        two[0].feed(SessionKey("", "a"), FeedRequest("x", 32))
        assert operations == ["lease", "save"]
    with exchanges(one) as operations:  # its cached copy is stale
        one[0].feed(SessionKey("", "a"), FeedRequest("y"))
        assert operations == ["claim", "lease", "save"]
    two[0].feed(SessionKey("", "a"), FeedRequest("z"))
    with exchanges(one) as operations:
        second = take(one[0].runs.generate(SessionKey("", "a"), RunRequest(20, PLAIN), 35))
        assert operations == ["lease", "save", "save"]  # its cached copy is not at the caller's position
    two[0].feed(SessionKey("", "a"), FeedRequest("z"))
    with exchanges(one) as operations:
        third = take(one[0].runs.generate(SessionKey("", "a"), RunRequest(20, PLAIN), None))
        assert operations == ["claim", "lease", "save", "save"]
    text = f"ROMEO:to be {first}xyz{second}z"
    assert text_of(one) == text_of(two) == text + third
    create(one, "alone", text)
    assert take(one[0].runs.generate(SessionKey("", "alone"), RunRequest(20, PLAIN), None)) == third


def whole(replica: Replica, request: RunRequest, position: int | None = None) -> str:
    """Generate for a client that wants the text when it is complete."""
    return take(replica[0].runs.generate(SessionKey("", "a"), request, position, as_whole=True))


def test_short_run__as_a_whole_is_saved_once(replicas: Callable[[], Replica]) -> None:
    """Its text is that of a stream. A run that may be long begins with a save, as a stream does."""
    one, two = replicas(), replicas()
    create(one)
    short, long = replace(LONG, max_chars=256), replace(LONG, max_chars=257)
    with exchanges(one) as operations:
        text = whole(one, short, 6)
        assert operations == ["claim"]
        assert whole(one, short, 6) == text  # sent again
        assert operations == ["claim", "lease", "release"]
    with exchanges(one) as operations:
        whole(one, long)
        assert operations == ["claim", "save"]
    assert text == uninterrupted(two, short)
    with exchanges(two) as operations:  # it has no cached copy
        whole(two, short)
        assert operations == ["lease", "save"]
    lease_of(two[1])
    with pytest.raises(SessionBusy):
        whole(one, short)
    assert two[0].get(SessionKey("", "a")).position == 6 + 256 + 257 + 256


def test_short_run__continues_what_others_have_saved_meanwhile(
    replicas: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed again after their text. At a position, it isn't, unless they sent the same request."""
    one, two = replicas(), replicas()
    create(one)
    short, finish = replace(LONG, max_chars=20), one[0]._reader.generate

    def first(call: Callable[[], object]) -> None:
        """Let another replica save after the run was computed, and before it is saved."""

        def generate(*arguments: Any) -> Any:
            monkeypatch.undo()
            answer = finish(*arguments)
            call()
            return answer

        monkeypatch.setattr(one[0]._reader, "generate", generate)

    first(lambda: two[0].feed(SessionKey("", "a"), FeedRequest("to be ")))
    text = whole(one, short)
    assert text_of(two) == "ROMEO:to be " + text
    first(lambda: two[0].feed(SessionKey("", "a"), FeedRequest("x")))
    with pytest.raises(PositionConflict):
        whole(one, short, 32)
    answers: list[str] = []
    first(lambda: answers.append(whole(two, short, 33)))
    answers.append(whole(one, short, 33))
    assert answers[0] == answers[1]
    assert text_of(one) == text_of(two) == "ROMEO:to be " + text + "x" + answers[0]
    create(one, "alone", "ROMEO:to be " + text + "x")
    assert take(one[0].runs.generate(SessionKey("", "alone"), short, None)) == answers[0]


@pytest.mark.parametrize("position", [None, 6])
def test_short_run__whose_answer_was_lost_is_not_done_twice(
    replicas: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch, position: int | None
) -> None:
    """Without a position the outcome is unknown; with one it is safe to repeat."""
    one, two = replicas(), replicas()
    create(one)
    run, short = one[1]._server._run_script, replace(LONG, max_chars=20)

    def lose(*arguments: Any, is_retry: bool = False, **limits: Any) -> Any:
        run(*arguments, is_retry=is_retry, **limits)
        raise errors.TimeoutError

    with monkeypatch.context() as lost:
        lost.setattr(one[1]._server, "_run_script", lose)
        with pytest.raises(
            OutcomeUnknown if position is None else StoreUnavailable,
            match="may or may not have been done" if position is None else "safe",
        ):
            whole(one, short, position)
    when_served(one[1].check)
    text = text_of(two)
    assert len(text) == 26
    if position is not None:
        assert whole(one, short, position) == text[6:]
    assert text_of(two) == text


@pytest.mark.parametrize("position", [None, 6])
@pytest.mark.parametrize("someone_goes_on", [False, True])
def test_feed__whose_answer_was_lost_is_not_done_twice(
    replicas: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch, someone_goes_on: bool, position: int | None
) -> None:
    """It is tried again on another connection. If another replica has saved since, the outcome is unknown."""
    one, two = replicas(), replicas()
    create(one)
    run = one[1]._server._run_script

    def lose(*arguments: Any, is_retry: bool = False, **limits: Any) -> Any:
        answer = run(*arguments, is_retry=is_retry, **limits)
        if not is_retry:
            if someone_goes_on:
                two[0].feed(SessionKey("", "a"), FeedRequest("b"))
            raise errors.ConnectionError
        return answer

    with monkeypatch.context() as lost, ExitStack() as expecting:
        lost.setattr(one[1]._server, "_run_script", lose)
        if someone_goes_on:
            error = OutcomeUnknown if position is None else StoreUnavailable
            expecting.enter_context(
                pytest.raises(error, match="may or may not have been done" if position is None else "safe")
            )
        one[0].feed(SessionKey("", "a"), FeedRequest("a", position))
    if position is not None:
        one[0].feed(SessionKey("", "a"), FeedRequest("a", position))
    assert text_of(two) == ("ROMEO:ab" if someone_goes_on else "ROMEO:a")


def test_generate__whose_start_was_lost_can_be_repeated(
    replicas: Callable[[], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = replicas(), replicas()
    request = replace(LONG, max_chars=50)
    create(one)
    run = one[1]._server._run_script

    def lose(*arguments: Any, is_retry: bool = False, **limits: Any) -> Any:
        run(*arguments, is_retry=is_retry, **limits)
        raise errors.TimeoutError

    for replica, position in ((one, 6), (one, None)):
        with monkeypatch.context() as lost:
            lost.setattr(one[1]._server, "_run_script", lose)
            with pytest.raises(StoreUnavailable, match="safe"):
                replica[0].runs.generate(SessionKey("", "a"), request, position)
        assert text_of(two) == "ROMEO:"
        when_served(one[1].check)
        time.sleep(2 * LEASE_S)
    text = take(two[0].runs.generate(SessionKey("", "a"), request, None))
    assert text_of(one) == "ROMEO:" + text
    assert text == uninterrupted(two, request)


@pytest.mark.parametrize("request_", [LONG, FORMED], ids=["any text", "a form"])
def test_resume__generates_again_what_a_dead_replica_sent(
    replicas: Callable[[], Replica], request_: RunRequest
) -> None:
    one, two = replicas(), replicas()
    whole = uninterrupted(one, request_)
    create(one)
    continuation = one[0].runs.generate(SessionKey("", "a"), request_, None)
    got = take(continuation, 700)
    dies(one)
    rest = take(two[0].runs.resume(SessionKey("", "a"), 6 + len(got)))
    assert got + rest == whole
    assert text_of(two) == "ROMEO:" + whole
    assert request_.form is None or re.fullmatch(request_.form.value, whole)
    continuation.close()


@pytest.mark.parametrize("request_", [LONG, FORMED], ids=["any text", "a form"])
@pytest.mark.parametrize("operation", ["feed", "rewind", "fork", "generate"])
def test_operations__continue_from_what_a_dead_replica_sent(
    replicas: Callable[[], Replica], operation: str, request_: RunRequest
) -> None:
    """The stream need not be resumed first: the client's position says how far it was sent."""
    one, two = replicas(), replicas()
    create(one)
    continuation = one[0].runs.generate(SessionKey("", "a"), request_, None)
    got = take(continuation, 100)
    dies(one)
    position, sessions = 6 + len(got), two[0]
    time.sleep(2 * LEASE_S)
    with pytest.raises(PositionConflict):
        sessions.feed(SessionKey("", "a"), FeedRequest("x", 6 + 5001))
    if operation == "feed":
        sessions.feed(SessionKey("", "a"), FeedRequest("xyz", position))
        assert text_of(two) == f"ROMEO:{got}xyz"
    elif operation == "rewind":
        sessions.rewind(SessionKey("", "a"), position)
        assert text_of(two) == f"ROMEO:{got}"
    elif operation == "fork":
        sessions.fork(SessionKey("", "a"), "b", position, None)
        assert text_of(two, "b") == f"ROMEO:{got}"
    else:
        more = take(sessions.runs.generate(SessionKey("", "a"), RunRequest(10, PLAIN), position))
        assert text_of(two) == f"ROMEO:{got}{more}"
    continuation.close()


def test_candidates__follow_what_a_dead_replica_sent_and_change_nothing(replicas: Callable[[], Replica]) -> None:
    one, two = replicas(), replicas()
    key = SessionKey("", "a")
    create(one)
    continuation = one[0].runs.generate(key, LONG, None)
    got = take(continuation, 100)
    model, during = two[0].reading(key, None)
    assert during.text.slice(0, 6) == "ROMEO:"  # as it was saved last, while the run is active
    dies(one)
    before = two[0].get(key)
    with pytest.raises(PositionConflict):
        two[0].reading(key, 6 + 5001)
    model, session = two[0].reading(key, 6 + len(got))
    found = score_candidates(model, Origin.after(model, session, NO_IDS), [model.charset.encode("what")])
    create(two, "b", f"ROMEO:{got}")
    model, session = two[0].reading(SessionKey("", "b"), None)
    expected = score_candidates(model, Origin.after(model, session, NO_IDS), [model.charset.encode("what")])
    assert found[0].tobytes() == expected[0].tobytes()
    assert two[0].get(key).revision == before.revision
    continuation.close()


def test_resume__takes_over_from_a_living_replica(replicas: Callable[[], Replica]) -> None:
    """The balancer has sent the client to another replica, which continues after the client's position."""
    one, two = replicas(), replicas()
    request = replace(LONG, max_chars=1_000_000)
    create(one)
    first = one[0].runs.generate(SessionKey("", "a"), request, None)
    got = take(first, 300)
    second = two[0].runs.resume(SessionKey("", "a"), 6 + len(got))
    more = take(second, 300)
    with pytest.raises(RunTakenOver):
        take(first)
    second.close()
    third = one[0].runs.resume(SessionKey("", "a"), 6 + len(got) + len(more))
    rest = take(third, 300)
    third.close()
    assert text_of(one).startswith("ROMEO:" + got + more + rest)
    create(one, "other")
    assert take(
        one[0].runs.generate(SessionKey("", "other"), replace(LONG, max_chars=len(got + more + rest)), None)
    ) == (got + more + rest)


def test_resume__that_is_refused_leaves_the_stream_to_the_connection_that_has_it(
    replicas: Callable[..., Replica], tmp_path: Path
) -> None:
    one, two, full = replicas(), replicas(), replicas(max_running=1, max_waiting=0)
    lacking = replicas(published=ModelStore(tmp_path))
    key, request = SessionKey("", "a"), replace(LONG, max_chars=1_000_000)
    create(one)
    first = one[0].runs.generate(key, request, 6)
    take(first, 50)
    create(full, "busy")
    busy = full[0].runs.generate(SessionKey("", "busy"), request, 6)
    refused: dict[str, tuple[type[GruServeError], Callable[[], RunStream]]] = {
        "the model is missing": (ModelChanged, lambda: lacking[0].runs.resume(key, 6)),
        "the model is missing, for a repeated request": (
            ModelChanged,
            lambda: lacking[0].runs.generate(key, request, 6),
        ),
        "the position is beyond the run": (PositionConflict, lambda: two[0].runs.resume(key, 2_000_000)),
        "the same, on the same replica": (PositionConflict, lambda: one[0].runs.resume(key, 2_000_000)),
        "the engine is full": (Overloaded, lambda: full[0].runs.resume(key, 6)),
    }
    for why, (error, resume) in refused.items():
        with pytest.raises(error):
            resume()
        assert len(take(first, 50)) >= 50, why
    busy.close()
    second = full[0].runs.resume(key, 6)
    take(second, 50)
    with pytest.raises(RunTakenOver):
        take(first)
    take(full[0].runs.resume(key, 6), 50)  # the stream that it ends makes room
    second.close()


def test_resume__is_handed_over_as_the_package_docstring_says(replicas: Callable[[], Replica]) -> None:
    """The taker loads the session, and repeats its lease request until the holder saves and releases in one exchange.

    The holder does so at its next renewal.
    """
    one, two = replicas(), replicas()
    create(one)
    first = one[0].runs.generate(SessionKey("", "a"), replace(LONG, max_chars=1_000_000), None)
    position = 6 + len(take(first, 50))
    with exchanges(one) as holder, exchanges(two) as taker:
        second = two[0].runs.resume(SessionKey("", "a"), position)
    assert holder == ["save"]
    assert len(taker) > 3
    assert taker == ["load"] + ["lease"] * (len(taker) - 2) + ["save"]
    second.close()


def test_feed__succeeds_once_if_two_replicas_feed_at_one_position(replicas: Callable[[], Replica]) -> None:
    both = [replicas(), replicas()]
    create(both[0], text="")
    barrier, rounds = threading.Barrier(2), 1000
    texts = ["", ""]

    def write(number: int) -> list[str]:
        outcomes = []
        for turn in range(rounds):
            barrier.wait(60)
            try:
                both[number][0].feed(SessionKey("", "a"), FeedRequest("ab"[number], turn))
                outcomes.append("won")
                texts[number] += "ab"[number]
            except (SessionBusy, PositionConflict, RevisionConflict) as error:
                outcomes.append(error.code)
                texts[number] += "."
        return outcomes

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(write, range(2)))
    assert all(sorted(pair)[1] == "won" != sorted(pair)[0] for pair in zip(*outcomes, strict=True))
    final = "".join(a if a != "." else b for a, b in zip(*texts, strict=True))
    assert text_of(both[0]) == text_of(both[1]) == final
    create(both[0], "serial", final)
    assert (
        both[0][0].get(SessionKey("", "serial")).hidden.tobytes()
        == both[1][0].get(SessionKey("", "a")).hidden.tobytes()
    )


def test_save__is_refused_after_the_lease_was_lost(replicas: Callable[[], Replica]) -> None:
    (_, one), (sessions, two) = replicas(), replicas()
    sessions.create("", NewSession("a", "tiny", "x", seed=7))
    slept = lease_of(one)
    one._renewer.close()  # it is paused for longer than a lease lasts
    time.sleep(2 * LEASE_S)
    lease = lease_of(two)
    lease.save(replace(lease.session, seed=8), release=True)
    with pytest.raises(RevisionConflict):
        slept.save(replace(slept.session, seed=9))
    assert one.load(SessionKey("", "a")).seed == two.load(SessionKey("", "a")).seed == 8


def test_lease__lasts_until_it_is_released(replicas: Callable[..., Replica]) -> None:
    lease_s = 4.0  # longer than a machine stalls
    (_, one), (_, two) = replicas(lease_s=lease_s), replicas(lease_s=lease_s)
    create((_, one))
    requested = threading.Event()
    lease = lease_of(one)
    lease.on_takeover = requested.set
    time.sleep(1.2 * lease_s)  # the subject is what the other thread does in this time
    with pytest.raises(SessionBusy):
        lease_of(two)
    assert not requested.is_set()
    got: list[Lease] = []
    other = threading.Thread(target=lambda: got.append(lease_of(two, take_over=True)))
    other.start()
    assert requested.wait(60)
    lease.release()
    other.join()
    got[0].release()


# Redis fails and restarts


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with redis_process(tmp_path, "--appendonly", "yes", "--appendfsync", "everysec") as process:
        yield process


def test_operations__fail_fast_without_redis(replicas: Callable[..., Replica], own_redis: RedisProcess) -> None:
    replica = replicas(own_redis.url)
    when_served(lambda: create(replica))
    continuation = replica[0].runs.generate(SessionKey("", "a"), LONG, None)
    got = take(continuation, 50)
    own_redis.kill()
    with pytest.raises((StoreUnavailable, OutcomeUnknown)):
        got += take(continuation)
    for call in (
        lambda: replica[0].get(SessionKey("", "a")),
        lambda: replica[0].feed(SessionKey("", "a"), FeedRequest("x")),
        lambda: replica[0].page("", "", 10),
        lambda: create(replica, "b"),
        replica[1].check,
    ):
        with pytest.raises(StoreUnavailable):
            call()
    own_redis.start()
    when_served(lambda: replica[1].page("", "", 1))
    rest = take(replica[0].runs.resume(SessionKey("", "a"), 6 + len(got)))
    assert got + rest == uninterrupted(replica)


def test_restart__restores_lost_writes(replicas: Callable[..., Replica], own_redis: RedisProcess) -> None:
    """Redis is killed right after the writes, which are not yet on disk: the replica that wrote them restores them."""
    replica = replicas(own_redis.url)
    when_served(lambda: create(replica, "deleted"))
    create(replica)
    on_disk = own_redis.on_disk()
    for number in range(5):
        replica[0].feed(SessionKey("", "a"), FeedRequest("ab", 6 + 2 * number))
    create(replica, "new")
    replica[0].delete(SessionKey("", "deleted"))
    lease = lease_of(replica[1], "new")
    before = replica[0].get(SessionKey("", "a"))
    own_redis.kill()
    own_redis.lose_what_was_written_since(on_disk)
    own_redis.start()
    when_served(lambda: replica[1].page("", "", 1))
    after = replica[0].get(SessionKey("", "a"))
    assert after.revision >= before.revision
    assert text_of(replica) == "ROMEO:" + "ab" * 5
    assert text_of(replica, "new") == "ROMEO:"
    with pytest.raises(GruServeError, match="no such session"):
        replica[0].get(SessionKey("", "deleted"))
    with pytest.raises(SessionBusy):  # it is still leased
        lease_of(replicas(own_redis.url)[1], "new")
    lease.save(replace(lease.session, seed=8), release=True)
    assert replica[0].get(SessionKey("", "new")).seed == 8


def test_restart__never_serves_an_older_save_than_was_acknowledged(
    replicas: Callable[..., Replica], own_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replicas(own_redis.url)
    when_served(lambda: create(replica))
    on_disk = own_redis.on_disk()
    replica[0].feed(SessionKey("", "a"), FeedRequest("ab"))
    renewer = replica[1]._renewer
    monkeypatch.setattr(renewer, "_restoring", lambda key, _: renewer._command("lacks", key, b"", 0, b""))
    own_redis.kill()
    own_redis.lose_what_was_written_since(on_disk)
    own_redis.start()
    when_served(lambda: replica[1].page("", "", 1))
    for call in (
        lambda: replica[0].get(SessionKey("", "a")),
        lambda: replica[0].feed(SessionKey("", "a"), FeedRequest("x")),
        lambda: replica[0].runs.generate(SessionKey("", "a"), LONG, None),
    ):
        with pytest.raises(SessionLost):
            call()
