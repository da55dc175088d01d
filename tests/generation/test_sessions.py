"""SessionService: simultaneous operations, vanishing models, clients that leave, and takeovers harm no session."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engine.automaton.form import Form
from service.engine.engine import Engine
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import (
    ClientGone,
    Draining,
    EngineFailed,
    GruServeError,
    ModelChanged,
    Overloaded,
    PositionConflict,
    RunTakenOver,
    SessionBusy,
    StateModelMismatch,
    UnknownCharacters,
)
from service.generation.completion import Completion, CompletionRequest
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.session import SessionKey
from service.sessions.text import Retention
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings, publish_tiny

LONG = RunRequest(5000, PLAIN)


class Bench:
    """A SessionService with its own stores of models and sessions."""

    def __init__(self, root: Path, max_models: int = 2) -> None:
        self.models_on_disk = ModelStore(root)
        publish_tiny(self.models_on_disk)
        self.models = LoadedModels(self.models_on_disk, max_models, engine_settings())
        self.store = MemoryStore(10_000, 2**30)
        self.sealer = StateSealer(["0123456789abcdef"])
        self.sessions = SessionService(self.models, self.store, self.sealer, 3600, Retention(16, 8192))

    def create(self, session_id: str = "a", text: str = "ROMEO:", **changes: Any) -> None:
        self.sessions.create("", NewSession(session_id, "tiny", text, **({"seed": 7} | changes)))

    def generate(self, session_id: str = "a", request: RunRequest = LONG, position: int | None = None) -> RunStream:
        return self.sessions.runs.generate(SessionKey("", session_id), request, position)

    def state(self, session_id: str = "a") -> bytes:
        return self.sessions.get(SessionKey("", session_id)).hidden.tobytes()

    def text(self, session_id: str = "a") -> str:
        return self.sessions.text(SessionKey("", session_id), None, None)[0]

    def replayed(self, text: str, model: str = "tiny") -> bytes:
        """Return the state after a text, stepped from the zero state."""
        session, _ = self.sessions.create("", NewSession(None, model, text))
        return session.hidden.tobytes()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.models.close()


def drain(continuation: RunStream) -> str:
    return "".join(piece.text for piece in continuation.chunks(0.0, 20) if piece is not None)


def test_generate__writes_the_text_of_a_completion(bench: Bench) -> None:
    """Same text, seed and settings give the same characters, also with settings that depend on the prompt."""
    model = bench.models.get("tiny")
    for number, sampling in enumerate((PLAIN, SamplingSettings(0.5, repetition_penalty=1.4, presence_penalty=0.5))):
        request = CompletionRequest((model.charset.encode("ROMEO: what"),), 200, 7, sampling, stop=("zz",))
        whole = "".join(item[1].text for item in Completion(model, request).wholes(5) if item is not None)
        bench.create(f"s{number}")
        bench.sessions.feed(SessionKey("", f"s{number}"), FeedRequest(" what"))
        assert drain(bench.generate(f"s{number}", RunRequest(200, sampling, ("zz",)))) == whole


def test_feed__succeeds_for_one_of_eight_writers_at_one_position(bench: Bench) -> None:
    """In each round one succeeds and the others get a conflict. The text is what the successful ones wrote."""
    num_writers, num_rounds = 8, 1000
    bench.create(text="")
    outcomes: list[list[str]] = [[] for _ in range(num_rounds)]
    barrier = threading.Barrier(num_writers)

    def write(writer: int) -> None:
        for position in range(num_rounds):
            barrier.wait(30)
            try:
                bench.sessions.feed(SessionKey("", "a"), FeedRequest("abcdefgh"[writer], position))
                outcomes[position].append("abcdefgh"[writer])
            except (SessionBusy, PositionConflict) as error:
                outcomes[position].append(error.code)
            barrier.wait(30)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [[one for one in round_ if len(one) == 1] for round_ in outcomes]
    assert all(len(round_) == num_writers for round_ in outcomes)
    assert all(len(winner) == 1 for winner in winners)
    assert bench.text() == "".join(winner[0] for winner in winners)
    assert bench.state() == bench.replayed(bench.text())


def test_run__makes_other_operations_busy(bench: Bench) -> None:
    bench.create()
    run = bench.generate()
    others: list[Any] = [
        lambda: bench.sessions.feed(SessionKey("", "a"), FeedRequest("a")),
        lambda: bench.generate(),
        lambda: bench.sessions.runs.generate(SessionKey("", "a"), RunRequest(9, PLAIN), None, as_whole=True),
        lambda: bench.sessions.rewind(SessionKey("", "a"), 3),
        lambda: bench.sessions.fork(SessionKey("", "a"), None, None, None),
        lambda: bench.sessions.export(SessionKey("", "a"), None),
        lambda: bench.sessions.delete(SessionKey("", "a")),
    ]
    for other in others:
        with pytest.raises(SessionBusy):
            other()
    run.close()
    for other in others:
        if isinstance(found := other(), RunStream):
            found.close()


def test_resume__takes_over_a_run_that_nobody_reads(bench: Bench) -> None:
    """The thread that streams it may be blocked on a half-open connection, and is not needed for the takeover."""
    bench.create()
    first = bench.generate(request=RunRequest(3000, PLAIN))
    pieces = first.chunks(0.0, 5)
    got = next(pieces)
    assert got is not None
    second = bench.sessions.runs.resume(SessionKey("", "a"), got.position)
    rest = drain(second)
    assert len(got.text + rest) == 3000
    with pytest.raises(RunTakenOver):
        list(pieces)
    bench.create("b")
    assert drain(bench.generate("b", RunRequest(3000, PLAIN))) == got.text + rest
    assert bench.state() == bench.state("b")


def test_resume__raises_in_a_thread_that_waits_for_the_run(bench: Bench) -> None:
    bench.create()
    first = bench.generate(request=RunRequest(8000, PLAIN))
    heard: list[object] = []

    def wait() -> None:
        try:
            heard.extend(first.whole(20))
        except RunTakenOver as error:
            heard.append(error.code)

    thread = threading.Thread(target=wait)
    thread.start()
    rest = drain(bench.sessions.runs.resume(SessionKey("", "a"), 6))
    thread.join()
    assert len(rest) == 8000
    assert heard == ["run_taken_over"]


def test_resume__without_takeover_leaves_the_run_to_a_client_that_is_there(bench: Bench) -> None:
    bench.create()
    has_left = False
    key, request = SessionKey("", "a"), RunRequest(3000, PLAIN)
    first = bench.sessions.runs.generate(key, request, None, lambda: has_left)
    pieces = first.chunks(0.0, 5)
    got = next(pieces)
    assert got is not None
    with pytest.raises(SessionBusy):
        bench.sessions.runs.resume(key, got.position, take_over=False)
    has_left = True
    assert len(got.text + drain(bench.sessions.runs.resume(key, got.position, take_over=False))) == 3000
    with pytest.raises(RunTakenOver):
        list(pieces)
    assert len(drain(bench.sessions.runs.resume(key, 6, take_over=False))) == 3000  # it is finished


def test_generate__repeated_takes_over_its_first_attempt(bench: Bench) -> None:
    bench.create()
    request = RunRequest(2000, PLAIN)
    first = bench.generate(request=request, position=6)
    again = bench.generate(request=request, position=6)
    whole = drain(again)
    assert len(whole) == 2000
    assert drain(bench.generate(request=request, position=6)) == whole  # finished: sent again from the record
    assert bench.sessions.get(SessionKey("", "a")).position == 2006
    with pytest.raises(RunTakenOver):
        list(first.chunks(0.0, 5))
    with pytest.raises(PositionConflict) as error:
        bench.generate(request=RunRequest(2000, PLAIN, seed=8), position=6)
    assert error.value.position == 2006


def interrupted(bench: Bench, run: RunStream, *, as_whole: bool = False) -> str:
    """Interrupt all runs after the first characters of this one, and return what it sent until Draining.

    Meanwhile the engine is so slow that this thread may be delayed for seconds.
    """
    stepper = bench.models.get("tiny").engine._stepper
    advance = stepper.advance

    def slowly(rows: Any, num_chars: int) -> Any:
        time.sleep(2e-3 * num_chars)
        return advance(rows, num_chars)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepper, "advance", slowly)
        got, pieces = "", run.whole(0.001) if as_whole else run.chunks(0.0, 0.001)
        for piece in itertools.islice(pieces, 1) if as_whole else pieces:
            got += piece.text if piece is not None else ""
            if len(got) >= 100:
                break
        bench.sessions.runs.interrupt_all(0.05)
        try:
            for piece in pieces:
                got += piece.text if piece is not None else ""
        except Draining:
            return got
    pytest.fail("it was not interrupted")


@pytest.mark.parametrize("form", [None, Form("regex", "(?:[A-Z]?[a-z]{1,9}[ ,.\n])*")], ids=["any text", "a form"])
# The form has their characters too: a text that has begun one can continue without it, so texts are long.
@pytest.mark.parametrize("stops", [(), ("eqqq",), ("aqqq", "oqqq", "sqqq")])
def test_interrupt_all__lets_a_run_be_resumed_elsewhere(
    bench: Bench, stops: tuple[str, ...], form: Form | None
) -> None:
    """Also if the last characters may be the beginning of a stop string, which must not be sent."""
    request = RunRequest(3000, PLAIN, stops, form=form)
    bench.create()
    whole = drain(bench.generate(request=request))
    bench.sessions.rewind(SessionKey("", "a"), 6)
    run = bench.generate(request=request)
    got = interrupted(bench, run)
    assert run.resume_position == 6 + len(got)
    assert len(got) < len(whole)
    saved = bench.sessions.get(SessionKey("", "a"))
    assert bench.text() == "ROMEO:" + whole[: saved.position - 6]
    assert saved.position >= run.resume_position
    elsewhere = SessionService(bench.models, bench.store, bench.sealer, 3600, Retention(16, 8192))
    assert got + drain(elsewhere.runs.resume(SessionKey("", "a"), run.resume_position)) == whole


def test_interrupt_all__while_nobody_reads_sends_no_beginning_of_a_stop_string(bench: Bench) -> None:
    """Every character may be such a beginning. Another thread reads the rest of the run, and ends it."""
    charset = bench.models.get("tiny").charset.characters
    request = RunRequest(8000, PLAIN, tuple(char + "qqq" for char in charset))
    bench.create()
    run = bench.generate(request=request)
    pieces = run.chunks(0.0, 5)
    first = next(pieces)
    assert first is not None
    bench.sessions.runs.interrupt_all(0)
    assert bench.sessions.runs._active == {}
    later: list[Any] = []
    with pytest.raises(Draining):
        later.extend(pieces)
    assert not [piece for piece in later if piece is not None and piece.text]
    assert run.resume_position == first.position
    assert bench.sessions.get(SessionKey("", "a")).position > first.position


def test_interrupt_all__discards_a_run_that_is_read_as_a_whole(bench: Bench) -> None:
    bench.create()
    run = bench.generate(request=RunRequest(8000, PLAIN), position=6)
    assert interrupted(bench, run, as_whole=True) == ""
    assert bench.text() == "ROMEO:"
    elsewhere = SessionService(bench.models, bench.store, bench.sealer, 3600, Retention(16, 8192))
    again = "".join(piece.text for piece in elsewhere.runs.generate(SessionKey("", "a"), LONG, 6).whole(20) if piece)
    assert len(again) == 5000


def test_interrupt_all__interrupts_a_run_that_starts_later(bench: Bench) -> None:
    bench.create()
    bench.sessions.runs.interrupt_all(0)
    with pytest.raises(Draining):
        list(bench.generate().chunks(0.0, 20))


def test_resume__by_several_at_once_repeats_and_skips_nothing(bench: Bench) -> None:
    """The last one to take over gets the whole text. The others get a beginning of it."""
    bench.create()
    whole = drain(bench.generate(request=RunRequest(3000, PLAIN)))
    bench.sessions.rewind(SessionKey("", "a"), 6)
    bench.generate(request=RunRequest(3000, PLAIN)).close()
    got: list[tuple[str, bool]] = []

    def take() -> None:
        text, over = "", False
        try:
            for piece in bench.sessions.runs.resume(SessionKey("", "a"), 6).chunks(0.0, 20):
                text += piece.text if piece is not None else ""
            over = True
        except (RunTakenOver, SessionBusy):
            pass
        got.append((text, over))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(whole.startswith(text) for text, _ in got)
    assert any(over for _, over in got)
    assert all(text == whole for text, over in got if over)
    assert bench.text() == "ROMEO:" + whole


def test_feed__stops_the_run_of_a_client_that_has_left(bench: Bench) -> None:
    """The client's connection is closed, but the thread that streams to it has not noticed yet."""
    bench.create()
    gone = threading.Event()
    run = bench.sessions.runs.generate(SessionKey("", "a"), LONG, None, gone.is_set)
    with pytest.raises(SessionBusy):
        bench.sessions.feed(SessionKey("", "a"), FeedRequest("a"))
    gone.set()
    fed = bench.sessions.feed(SessionKey("", "a"), FeedRequest("a"))
    assert bench.text().endswith("a")
    assert fed.position == len(bench.text())
    run.close()
    assert bench.state() == bench.replayed(bench.text())


def test_stop__leaves_the_session_before_the_string(bench: Bench) -> None:
    """Also if the engine is full: the steps back to that position use the place of the text that just ended."""
    bench.create()
    whole = drain(bench.generate(request=RunRequest(400, PLAIN)))
    for stop in (whole[200:203], whole[10], whole[300:340]):
        bench.sessions.rewind(SessionKey("", "a"), 6)
        continuation = bench.generate(request=RunRequest(400, PLAIN, (stop,)))
        assert drain(continuation) == whole[: whole.index(stop)]
        assert continuation.finish_reason == "stop"
        assert bench.text() == "ROMEO:" + whole[: whole.index(stop)]
        assert bench.state() == bench.replayed(bench.text())


@pytest.mark.parametrize("includes_stop", [False, True])
@pytest.mark.parametrize("num_chars", [200, 400])  # a short run, as a change; a longer one, on the engine
def test_stop__after_min_chars_ends_a_run_however_it_is_read(bench: Bench, num_chars: int, includes_stop: bool) -> None:
    """Streamed, as a whole, after an interruption, and sent again from the record."""
    bench.create("plain")
    plain = drain(bench.generate("plain", RunRequest(num_chars, PLAIN)))
    early, late = plain[10:13], plain[150:154]
    request = RunRequest(num_chars, PLAIN, (early, late), min_chars=100, includes_stop=includes_stop)
    end = next(end for end in range(101, num_chars + 1) if plain[:end].endswith((early, late)))
    expected = plain[: end if includes_stop else end - (4 if plain[:end].endswith(late) else 3)]
    for name, interrupted, as_whole in (
        ("s", False, False),
        ("w", False, True),
        ("si", True, False),
        ("wi", True, True),
    ):
        bench.create(name)
        if interrupted:
            bench.generate(name, request, 6).close()
        run = bench.sessions.runs.generate(SessionKey("", name), request, 6, as_whole=as_whole)
        assert drain(run) == run.text == expected
        assert (run.finish_reason, bench.text(name)) == ("stop", "ROMEO:" + expected)
        assert bench.state(name) == bench.replayed(bench.text(name))
        assert drain(bench.generate(name, request, 6)) == expected
        with pytest.raises(PositionConflict):  # another request, so the run of the first is not sent again
            bench.generate(name, replace(request, min_chars=99), 6)


def test_short_run__as_a_whole_has_the_text_of_a_stream(bench: Bench) -> None:
    """With every sampling setting, stop string and earlier interruption; and the state after it is that of its text."""
    difficult = replace(PLAIN, temperature=0.8, repetition_penalty=1.4, presence_penalty=0.5)
    bench.create("stream", "ROMEO: what")
    streamed = drain(bench.generate("stream", RunRequest(200, difficult)))
    for number, stop in enumerate(("", streamed[100:103], streamed[0], streamed[:30])):
        request = RunRequest(200, difficult, (stop,) if stop else ())
        expected = streamed[: streamed.index(stop)] if stop else streamed
        for interrupted in (False, True):
            name = f"{number}{interrupted}"
            bench.create(name, "ROMEO: what")
            if interrupted:
                bench.generate(name, request, 11).close()
            run = bench.sessions.runs.generate(SessionKey("", name), request, 11, as_whole=True)
            assert drain(run) == run.text == expected
            assert (run.finish_reason, run.position) == ("stop" if stop else "length", 11 + len(expected))
            assert bench.text(name) == "ROMEO: what" + expected
            assert bench.state(name) == bench.replayed(bench.text(name))
            assert drain(bench.generate(name, request, 11)) == expected  # sent again


def test_overload__leaves_the_session_unchanged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.create()
    before = bench.state()

    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(Engine, "submit", refuse)
    for call in (
        lambda: bench.sessions.feed(SessionKey("", "a"), FeedRequest("abc")),
        lambda: bench.generate(),
        lambda: bench.sessions.runs.generate(SessionKey("", "a"), RunRequest(9, PLAIN), None, as_whole=True),
        lambda: bench.sessions.rewind(SessionKey("", "a"), 3),
    ):
        with pytest.raises(Overloaded):
            call()
    monkeypatch.undo()
    assert (bench.state(), bench.text()) == (before, "ROMEO:")
    assert len(drain(bench.generate(request=RunRequest(10, PLAIN)))) == 10


def test_engine_failure__leaves_the_session_usable(bench: Bench) -> None:
    bench.create()
    run = bench.generate(request=RunRequest(8000, PLAIN))
    bench.models.get("tiny").engine.close()
    with pytest.raises(EngineFailed):
        drain(run)
    assert bench.text() == "ROMEO:"
    bench.store.update(SessionKey("", "a"), lambda session: (session, None))


# Models that vanish


def test_session__keeps_its_version_while_that_is_loaded(bench: Bench) -> None:
    bench.create()
    twin = bench.sessions.fork(SessionKey("", "a"), "b", None, None)[0]
    whole = drain(bench.generate("b", RunRequest(50, PLAIN)))
    publish_tiny(bench.models_on_disk, seed=1)
    shutil.rmtree(bench.models_on_disk.root / "tiny" / "1")
    assert drain(bench.generate("a", RunRequest(50, PLAIN))) == whole
    assert twin.model == bench.sessions.get(SessionKey("", "a")).model == "tiny@1"
    bench.models.resolver.refresh()
    bench.create("new")
    assert bench.sessions.get(SessionKey("", "new")).model == "tiny@2"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_rebase__continues_a_session_whose_version_vanished(tmp_path: Path, how: str) -> None:
    bench = Bench(tmp_path, max_models=1)
    try:
        bench.create(text="ROMEO: the first of many words, of which there are enough")
        before = bench.state()
        publish_tiny(bench.models_on_disk, seed=1)
        shutil.rmtree(bench.models_on_disk.root / "tiny" / "1")
        if how == "replaced":
            shutil.copytree(bench.models_on_disk.root / "tiny" / "2", bench.models_on_disk.root / "tiny" / "1")
        bench.models.get("tiny@2")  # evicts the first one
        calls: list[Any] = [
            lambda: bench.sessions.feed(SessionKey("", "a"), FeedRequest("a")),
            lambda: bench.generate(),
            lambda: bench.sessions.rewind(SessionKey("", "a"), 3),
        ]
        for call in calls:
            with pytest.raises(ModelChanged) as error:
                call()
            assert "rebase" in error.value.message
        assert bench.state() == before
        assert bench.text().startswith("ROMEO:")  # which needs no model

        position = len(bench.text())
        with pytest.raises(PositionConflict):
            bench.sessions.feed(SessionKey("", "a"), FeedRequest(" more", 3, rebase="tiny@2"))
        fed = bench.sessions.feed(SessionKey("", "a"), FeedRequest(" more", position, rebase="tiny@2"))
        assert fed.position == position + 5
        assert bench.sessions.get(SessionKey("", "a")).model == "tiny@2"
        assert bench.state() == bench.replayed(bench.text(), "tiny@2")
        # A repetition changes nothing; and rewinding works in the new version too.
        assert (
            bench.sessions.feed(SessionKey("", "a"), FeedRequest(" more", position, rebase="tiny@2")).position
            == position + 5
        )
        bench.sessions.rewind(SessionKey("", "a"), 21)
        assert bench.state() == bench.replayed(bench.text(), "tiny@2")
    finally:
        bench.models.close()


def test_rebase__forgets_an_interrupted_run(bench: Bench) -> None:
    bench.create()
    bench.generate(request=RunRequest(8000, PLAIN)).close()
    publish_tiny(bench.models_on_disk, seed=1)
    bench.sessions.feed(SessionKey("", "a"), FeedRequest("", rebase="tiny@2"))
    assert bench.state() == bench.replayed(bench.text(), "tiny@2")
    with pytest.raises(GruServeError) as error:
        bench.sessions.runs.resume(SessionKey("", "a"), None)
    assert error.value.code == "no_run"


def test_rebase__to_a_model_that_lacks_a_character_changes_nothing(bench: Bench) -> None:
    publish_tiny(bench.models_on_disk, "other", charset="abc")
    bench.create()
    before = bench.state()
    with pytest.raises(UnknownCharacters):
        bench.sessions.feed(SessionKey("", "a"), FeedRequest("a", rebase="other"))
    assert (bench.state(), bench.sessions.get(SessionKey("", "a")).model) == (before, "tiny@1")


# Portable states


def test_export__continues_elsewhere_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    """The other replica has the same model and key, and doesn't know the session."""
    elsewhere = Bench(tmp_path / "elsewhere")
    try:
        bench.create()
        first = drain(bench.generate(request=RunRequest(40, PLAIN)))
        state, _ = bench.sessions.export(SessionKey("", "a"), None)
        elsewhere.sessions.create("", NewSession("b", None, state=state))
        whole = drain(bench.generate(request=RunRequest(300, PLAIN)))
        assert drain(elsewhere.generate("b", RunRequest(300, PLAIN))) == whole
        assert elsewhere.state("b") == bench.state() == bench.replayed("ROMEO:" + first + whole)
        with pytest.raises(GruServeError) as error:
            elsewhere.sessions.rewind(SessionKey("", "b"), 45)
        assert error.value.code == "position_gone"
        elsewhere.sessions.rewind(SessionKey("", "b"), 47)
    finally:
        elsewhere.models.close()


def test_create__refuses_the_state_of_another_model(bench: Bench) -> None:
    publish_tiny(bench.models_on_disk, "other", seed=3)
    bench.create()
    state, _ = bench.sessions.export(SessionKey("", "a"), None)
    with pytest.raises(StateModelMismatch):
        bench.sessions.create("", NewSession(None, "other", state=state))


# Forks


def test_fork__costs_a_state_and_no_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.create(text="a draft of some length " * 40)
    before = bench.store.num_bytes

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("stepped")

    monkeypatch.setattr(Engine, "submit", refuse)
    for seed in range(1000):
        bench.sessions.fork(SessionKey("", "a"), f"f{seed}", None, seed)
    monkeypatch.undo()
    assert bench.store.num_bytes - before < 1000 * 1200  # 16 units: 64 bytes of state, and the record
    texts = {drain(bench.generate(f"f{seed}", RunRequest(30, PLAIN))) for seed in range(20)}
    assert len(texts) == 20


def test_fork__has_the_same_past_and_future(bench: Bench) -> None:
    bench.create()
    whole = drain(bench.generate(request=RunRequest(100, PLAIN)))
    for position in (6, 7, 21, 22, 106):
        fork, _ = bench.sessions.fork(SessionKey("", "a"), None, position, None)
        left = 106 - position
        if left:
            assert drain(bench.generate(fork.id, RunRequest(left, PLAIN))) == whole[position - 6 :]
        assert bench.state(fork.id) == bench.state()
    again, is_new = bench.sessions.fork(SessionKey("", "a"), "named", 10, None)
    assert is_new
    assert bench.sessions.fork(SessionKey("", "a"), "named", 10, None)[1] is False
    assert again.position == 10
    with pytest.raises(GruServeError) as error:
        bench.sessions.fork(SessionKey("", "a"), "named", 11, None)
    assert error.value.code == "session_exists"


def test_work__whose_client_has_left_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeds, creations, and short runs whose client wants the whole text."""
    bench.create()
    before = bench.state()
    stepper, request = bench.models.get("tiny").engine._stepper, RunRequest(256, PLAIN)
    advance = stepper.advance

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2)
        return advance(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stepper, "advance", slowly)
        patch.setattr("service.generation.reader._POLL_S", 0.001)
        with pytest.raises(ClientGone):
            bench.sessions.runs.generate(SessionKey("", "a"), request, 6, lambda: True, as_whole=True)
    assert (bench.state(), bench.text()) == (before, "ROMEO:")
    with pytest.raises(ClientGone):
        bench.sessions.feed(SessionKey("", "a"), FeedRequest("a" * 500_000, 6), lambda: True)
    assert (bench.state(), bench.text()) == (before, "ROMEO:")
    assert bench.sessions.feed(SessionKey("", "a"), FeedRequest("a", 6), lambda: False).position == 7
    with pytest.raises(ClientGone):
        bench.sessions.create("", NewSession("b", "tiny", "a" * 500_000), lambda: True)
    assert [session.id for session in bench.sessions.page("", "", 10)] == ["a"]
