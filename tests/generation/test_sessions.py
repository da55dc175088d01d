"""SessionService: what operations at once, models that vanish and clients that leave do to them: as little as possible."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.engine import Engine
from service.engine.sampling import PLAIN, SamplingSettings
from service.errors import (
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
from service.generation.creation import NewSession
from service.generation.feeding import FeedRequest
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.transcript import Retention
from service.store.model_store import ModelStore
from tests.conftest import engine_settings, publish_tiny

LONG = RunRequest(5000, PLAIN)


class Bench:
    """Sessions over a store of models of its own."""

    def __init__(self, root: Path, max_models: int = 2) -> None:
        self.models_on_disk = ModelStore(root)
        publish_tiny(self.models_on_disk)
        self.models = LoadedModels(self.models_on_disk, max_models, engine_settings())
        self.store = MemoryStore(10_000, 2**30)
        self.sealer = StateSealer(["0123456789abcdef"])
        self.sessions = SessionService(self.models, self.store, self.sealer, 3600, Retention(16, 8192))

    def create(self, session_id: str = "a", text: str = "ROMEO:", **changes: Any) -> None:
        self.sessions.creation.create("", NewSession(session_id, "tiny", text, **({"seed": 7} | changes)))

    def generate(self, session_id: str = "a", request: RunRequest = LONG, position: int | None = None) -> RunStream:
        return self.sessions.runs.generate("", session_id, request, position)

    def state(self, session_id: str = "a") -> bytes:
        return self.sessions.get("", session_id).hidden.tobytes()

    def text(self, session_id: str = "a") -> str:
        return self.sessions.text("", session_id, None, None)[0]

    def replayed(self, text: str, model: str = "tiny") -> bytes:
        """The state after a text, stepped from zero."""
        session, _ = self.sessions.creation.create("", NewSession(None, model, text))
        return session.hidden.tobytes()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.models.close()


def drain(continuation: RunStream) -> str:
    return "".join(piece.text for piece in continuation.chunks(0.0, 20) if piece is not None)


def test_a_session_writes_what_a_completion_writes(bench: Bench) -> None:
    """Same text, seed and settings: the same characters, also for settings that look back on the prompt."""
    model = bench.models.get("tiny")
    for number, sampling in enumerate((PLAIN, SamplingSettings(0.5, repetition_penalty=1.4, presence_penalty=0.5))):
        request = CompletionRequest((model.charset.encode("ROMEO: what"),), 200, 7, sampling, stop=("zz",))
        whole = "".join(item[1].text for item in Completion(model, request).chunks(None, 5) if item is not None)
        bench.create(f"s{number}")
        bench.sessions.feeding.feed("", f"s{number}", FeedRequest(" what"))
        assert drain(bench.generate(f"s{number}", RunRequest(200, sampling, ("zz",)))) == whole


def test_eight_writers_at_one_position(bench: Bench) -> None:
    """Each round one wins and the rest hear of a conflict; the text is what the winners wrote, one after the other."""
    num_writers, num_rounds = 8, 1000
    bench.create(text="")
    outcomes: list[list[str]] = [[] for _ in range(num_rounds)]
    barrier = threading.Barrier(num_writers)

    def write(writer: int) -> None:
        for position in range(num_rounds):
            barrier.wait(30)
            try:
                bench.sessions.feeding.feed("", "a", FeedRequest("abcdefgh"[writer], position))
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


def test_an_operation_under_way_refuses_others_at_once(bench: Bench) -> None:
    bench.create()
    run = bench.generate()
    others: list[Any] = [
        lambda: bench.sessions.feeding.feed("", "a", FeedRequest("a")),
        lambda: bench.generate(),
        lambda: bench.sessions.rewind("", "a", 3),
        lambda: bench.sessions.creation.fork("", "a", None, None, None),
        lambda: bench.sessions.export("", "a", None),
        lambda: bench.sessions.delete("", "a"),
    ]
    for other in others:
        with pytest.raises(SessionBusy):
            other()
    run.close()
    for other in others:
        if isinstance(found := other(), RunStream):
            found.close()


def test_a_run_that_nobody_reads_can_be_taken_over(bench: Bench) -> None:
    """Its thread may be stuck in sending to a connection that is half open: who takes over doesn't need it."""
    bench.create()
    first = bench.generate(request=RunRequest(3000, PLAIN))
    pieces = first.chunks(0.0, 5)
    got = next(pieces)
    assert got is not None
    second = bench.sessions.runs.resume("", "a", got.position)
    rest = drain(second)
    assert len(got.text + rest) == 3000
    with pytest.raises(RunTakenOver):
        list(pieces)
    bench.create("b")
    assert drain(bench.generate("b", RunRequest(3000, PLAIN))) == got.text + rest
    assert bench.state() == bench.state("b")


def test_one_who_waits_for_characters_hears_of_being_taken_over(bench: Bench) -> None:
    bench.create()
    first = bench.generate(request=RunRequest(8000, PLAIN))
    heard: list[object] = []

    def wait() -> None:
        try:
            heard.extend(first.chunks(None, 20))
        except RunTakenOver as error:
            heard.append(error.code)

    thread = threading.Thread(target=wait)
    thread.start()
    rest = drain(bench.sessions.runs.resume("", "a", 6))
    thread.join()
    assert len(rest) == 8000
    assert heard == ["run_taken_over"]


def test_a_retried_generate_takes_over_its_first_attempt(bench: Bench) -> None:
    bench.create()
    request = RunRequest(2000, PLAIN)
    first = bench.generate(request=request, position=6)
    again = bench.generate(request=request, position=6)
    whole = drain(again)
    assert len(whole) == 2000
    assert drain(bench.generate(request=request, position=6)) == whole  # over: told again
    assert bench.sessions.get("", "a").position == 2006
    with pytest.raises(RunTakenOver):
        list(first.chunks(0.0, 5))
    with pytest.raises(PositionConflict) as error:
        bench.generate(request=RunRequest(2000, PLAIN, seed=8), position=6)
    assert error.value.position == 2006


def interrupted(bench: Bench, run: RunStream, flush_interval_s: float | None = 0.0) -> str:
    """What a run says when all of them are interrupted after its first part, which nobody has to take."""
    got, pieces = "", run.chunks(flush_interval_s, 0.001)
    first = next(pieces)
    bench.sessions.runs.interrupt_all(0.05)
    try:
        for piece in itertools.chain([first], pieces):
            got += piece.text if piece is not None else ""
    except Draining:
        return got
    pytest.fail("it was not interrupted")


@pytest.mark.parametrize("stops", [(), ("eqqq",), ("aqqq", "oqqq", " qqq")])
def test_an_interrupted_run_goes_on_elsewhere(bench: Bench, stops: tuple[str, ...]) -> None:
    """Also where the last characters may become a stop string, which is not to be shown."""
    request = RunRequest(8000, PLAIN, stops)
    bench.create()
    whole = drain(bench.generate(request=request))
    bench.sessions.rewind("", "a", 6)
    run = bench.generate(request=request)
    got = interrupted(bench, run)
    assert run.resume_position == 6 + len(got)
    assert len(got) < len(whole)
    saved = bench.sessions.get("", "a")
    assert bench.text() == "ROMEO:" + whole[: saved.position - 6]
    assert saved.position >= run.resume_position
    elsewhere = SessionService(bench.models, bench.store, bench.sealer, 3600, Retention(16, 8192))
    assert got + drain(elsewhere.runs.resume("", "a", run.resume_position)) == whole


def test_an_interrupted_run_that_is_wanted_whole_or_not_at_all_leaves_nothing(bench: Bench) -> None:
    bench.create()
    run = bench.generate(request=RunRequest(8000, PLAIN), position=6)
    assert interrupted(bench, run, flush_interval_s=None) == ""
    assert bench.text() == "ROMEO:"
    elsewhere = SessionService(bench.models, bench.store, bench.sealer, 3600, Retention(16, 8192))
    again = "".join(piece.text for piece in elsewhere.runs.generate("", "a", LONG, 6).chunks(None, 20) if piece)
    assert len(again) == 5000


def test_a_run_that_begins_while_all_are_ended_is_interrupted(bench: Bench) -> None:
    bench.create()
    bench.sessions.runs.interrupt_all(0)
    with pytest.raises(Draining):
        list(bench.generate().chunks(0.0, 20))


def test_two_who_resume_at_once_both_end_in_order(bench: Bench) -> None:
    """Whoever comes last has the text; nobody gets a character twice or a gap."""
    bench.create()
    whole = drain(bench.generate(request=RunRequest(3000, PLAIN)))
    bench.sessions.rewind("", "a", 6)
    bench.generate(request=RunRequest(3000, PLAIN)).close()
    got: list[tuple[str, bool]] = []

    def take() -> None:
        text, over = "", False
        try:
            for piece in bench.sessions.runs.resume("", "a", 6).chunks(0.0, 20):
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


def test_a_client_that_has_gone_holds_nobody_up(bench: Bench) -> None:
    """Its connection is closed, but the thread that would notice is busy: the next operation does it."""
    bench.create()
    gone = threading.Event()
    run = bench.sessions.runs.generate("", "a", LONG, None, gone.is_set)
    with pytest.raises(SessionBusy):
        bench.sessions.feeding.feed("", "a", FeedRequest("a"))
    gone.set()
    fed = bench.sessions.feeding.feed("", "a", FeedRequest("a"))
    assert bench.text().endswith("a")
    assert fed.position == len(bench.text())
    run.close()
    assert bench.state() == bench.replayed(bench.text())


def test_a_run_that_ends_by_a_stop_string_stands_before_it(bench: Bench) -> None:
    """In the full engine too: the text that leaves gives its place to the steps that lead back."""
    bench.create()
    whole = drain(bench.generate(request=RunRequest(400, PLAIN)))
    for stop in (whole[200:203], whole[10], whole[300:340]):
        bench.sessions.rewind("", "a", 6)
        continuation = bench.generate(request=RunRequest(400, PLAIN, (stop,)))
        assert drain(continuation) == whole[: whole.index(stop)]
        assert continuation.finish_reason == "stop"
        assert bench.text() == "ROMEO:" + whole[: whole.index(stop)]
        assert bench.state() == bench.replayed(bench.text())


def test_overload_leaves_a_session_as_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.create()
    before = bench.state()

    def refuse(*_: object, **__: object) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(Engine, "submit", refuse)
    for call in (
        lambda: bench.sessions.feeding.feed("", "a", FeedRequest("abc")),
        lambda: bench.generate(),
        lambda: bench.sessions.rewind("", "a", 3),
    ):
        with pytest.raises(Overloaded):
            call()
    monkeypatch.undo()
    assert (bench.state(), bench.text()) == (before, "ROMEO:")
    assert len(drain(bench.generate(request=RunRequest(10, PLAIN)))) == 10


def test_an_engine_that_dies_leaves_a_session_that_can_be_used(bench: Bench) -> None:
    bench.create()
    run = bench.generate(request=RunRequest(8000, PLAIN))
    bench.models.get("tiny").engine.close()
    with pytest.raises(EngineFailed):
        drain(run)
    assert bench.text() == "ROMEO:"
    bench.store.release(bench.store.lease("", "a"))


# Models that go


def test_a_session_finishes_on_its_version_while_that_is_loaded(bench: Bench) -> None:
    bench.create()
    twin = bench.sessions.creation.fork("", "a", "b", None, None)[0]
    whole = drain(bench.generate("b", RunRequest(50, PLAIN)))
    publish_tiny(bench.models_on_disk, seed=1)
    shutil.rmtree(bench.models_on_disk.root / "tiny" / "1")
    assert drain(bench.generate("a", RunRequest(50, PLAIN))) == whole
    assert twin.model == bench.sessions.get("", "a").model == "tiny@1"
    bench.models.resolver.refresh()
    bench.create("new")
    assert bench.sessions.get("", "new").model == "tiny@2"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_version_that_is_gone_is_said_so_and_the_text_goes_over_to_another(tmp_path: Path, how: str) -> None:
    bench = Bench(tmp_path, max_models=1)
    try:
        bench.create(text="ROMEO: the first of many words, of which there are enough")
        before = bench.state()
        publish_tiny(bench.models_on_disk, seed=1)
        shutil.rmtree(bench.models_on_disk.root / "tiny" / "1")
        if how == "replaced":
            shutil.copytree(bench.models_on_disk.root / "tiny" / "2", bench.models_on_disk.root / "tiny" / "1")
        bench.models.get("tiny@2")  # and the first one isn't loaded any more
        calls: list[Any] = [
            lambda: bench.sessions.feeding.feed("", "a", FeedRequest("a")),
            lambda: bench.generate(),
            lambda: bench.sessions.rewind("", "a", 3),
        ]
        for call in calls:
            with pytest.raises(ModelChanged) as error:
                call()
            assert "rebase" in error.value.message
        assert bench.state() == before
        assert bench.text().startswith("ROMEO:")  # which needs no model

        position = len(bench.text())
        with pytest.raises(PositionConflict):
            bench.sessions.feeding.feed("", "a", FeedRequest(" more", 3, rebase="tiny@2"))
        fed = bench.sessions.feeding.feed("", "a", FeedRequest(" more", position, rebase="tiny@2"))
        assert fed.position == position + 5
        assert bench.sessions.get("", "a").model == "tiny@2"
        assert bench.state() == bench.replayed(bench.text(), "tiny@2")
        # Repeated, it is not done again; and going back works in the new version too.
        assert (
            bench.sessions.feeding.feed("", "a", FeedRequest(" more", position, rebase="tiny@2")).position
            == position + 5
        )
        bench.sessions.rewind("", "a", 21)
        assert bench.state() == bench.replayed(bench.text(), "tiny@2")
    finally:
        bench.models.close()


def test_a_text_goes_over_without_its_last_run_if_that_was_cut(bench: Bench) -> None:
    bench.create()
    bench.generate(request=RunRequest(8000, PLAIN)).close()
    publish_tiny(bench.models_on_disk, seed=1)
    bench.sessions.feeding.feed("", "a", FeedRequest("", rebase="tiny@2"))
    assert bench.state() == bench.replayed(bench.text(), "tiny@2")
    with pytest.raises(GruServeError) as error:
        bench.sessions.runs.resume("", "a", None)
    assert error.value.code == "no_run"


def test_a_model_that_lacks_a_character_of_the_text_is_refused_and_nothing_lost(bench: Bench) -> None:
    publish_tiny(bench.models_on_disk, "other", charset="abc")
    bench.create()
    before = bench.state()
    with pytest.raises(UnknownCharacters):
        bench.sessions.feeding.feed("", "a", FeedRequest("a", rebase="other"))
    assert (bench.state(), bench.sessions.get("", "a").model) == (before, "tiny@1")


# Carried away


def test_a_state_goes_on_elsewhere_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    """On another replica with the same model and key, which has never heard of the session."""
    elsewhere = Bench(tmp_path / "elsewhere")
    try:
        bench.create()
        first = drain(bench.generate(request=RunRequest(40, PLAIN)))
        state, _ = bench.sessions.export("", "a", None)
        elsewhere.sessions.creation.create("", NewSession("b", None, state=state))
        whole = drain(bench.generate(request=RunRequest(300, PLAIN)))
        assert drain(elsewhere.generate("b", RunRequest(300, PLAIN))) == whole
        assert elsewhere.state("b") == bench.state() == bench.replayed("ROMEO:" + first + whole)
        with pytest.raises(GruServeError) as error:
            elsewhere.sessions.rewind("", "b", 45)
        assert error.value.code == "position_gone"
        elsewhere.sessions.rewind("", "b", 47)
    finally:
        elsewhere.models.close()


def test_a_state_is_refused_by_another_model(bench: Bench) -> None:
    publish_tiny(bench.models_on_disk, "other", seed=3)
    bench.create()
    state, _ = bench.sessions.export("", "a", None)
    with pytest.raises(StateModelMismatch):
        bench.sessions.creation.create("", NewSession(None, "other", state=state))


# Forks


def test_a_thousand_forks_cost_a_state_each_and_no_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.create(text="a draft of some length " * 40)
    before = bench.store.num_bytes

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("stepped")

    monkeypatch.setattr(Engine, "submit", refuse)
    for seed in range(1000):
        bench.sessions.creation.fork("", "a", f"f{seed}", None, seed)
    monkeypatch.undo()
    assert bench.store.num_bytes - before < 1000 * 1200  # 16 units: 64 bytes of state, and the record
    texts = {drain(bench.generate(f"f{seed}", RunRequest(30, PLAIN))) for seed in range(20)}
    assert len(texts) == 20


def test_a_fork_has_the_same_past_and_the_same_future(bench: Bench) -> None:
    bench.create()
    whole = drain(bench.generate(request=RunRequest(100, PLAIN)))
    for position in (6, 7, 21, 22, 106):
        fork, _ = bench.sessions.creation.fork("", "a", None, position, None)
        left = 106 - position
        if left:
            assert drain(bench.generate(fork.id, RunRequest(left, PLAIN))) == whole[position - 6 :]
        assert bench.state(fork.id) == bench.state()
    again, is_new = bench.sessions.creation.fork("", "a", "named", 10, None)
    assert is_new
    assert bench.sessions.creation.fork("", "a", "named", 10, None)[1] is False
    assert again.position == 10
    with pytest.raises(GruServeError) as error:
        bench.sessions.creation.fork("", "a", "named", 11, None)
    assert error.value.code == "session_exists"
