"""Versions with equal weights: a session continues with any of them, and moves between them without a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.engine import Engine
from service.engine.sampling_settings import PLAIN
from service.errors import ModelChanged, PositionConflict
from service.generation.inspector import InspectionRequest, Inspector
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

KEY = SessionKey("", "a")
TEXT = "ROMEO: the first of many words"
RUN = RunRequest(7000, PLAIN)  # long enough to be interrupted


class Bench:
    """A session on `tiny@1`, which is then deleted and no longer in memory; `tiny@2` has the same weights."""

    def __init__(self, root: Path) -> None:
        self.on_disk = ModelStore(root)
        publish_tiny(self.on_disk)
        publish_tiny(self.on_disk, facts={"published_at": 1_800_000_000})
        publish_tiny(self.on_disk, seed=1)
        self.models = LoadedModels(self.on_disk, 1, engine_settings())
        self.sealer = StateSealer(["0123456789abcdef"])
        store = MemoryStore(10_000, 2**30)
        self.sessions = SessionService(self.models, store, self.sealer, 3600, Retention(16, 8192))
        self.inspector = Inspector(self.models, store.load, self.sealer)
        self.sessions.create("", NewSession("a", "tiny@1", TEXT, seed=7))
        self.sessions.create("", NewSession("other", "tiny@1", TEXT, seed=7))
        self.expected = drain(self.sessions.runs.generate(SessionKey("", "other"), RUN, None))
        self.state, _ = self.sessions.export(KEY, None)

    def lose_version(self) -> None:
        """Delete `tiny@1`, and drop it from memory in favour of a version with other weights."""
        self.models.get("tiny@3")
        self.on_disk.delete("tiny@1")


def drain(stream: RunStream) -> str:
    return "".join(piece.text for piece in stream.chunks(0.0, 20) if piece is not None)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.lose_version()
    yield bench
    bench.models.close()


def test_session__continues_with_a_loaded_version_of_equal_weights(bench: Bench) -> None:
    with pytest.raises(ModelChanged):
        bench.sessions.feed(KEY, FeedRequest("a"))
    bench.models.get("tiny@2")
    fed = bench.sessions.feed(KEY, FeedRequest(" and", len(TEXT), num_logprobs=0))
    assert (fed.model.version.ref, fed.position) == ("tiny@2", len(TEXT) + 4)
    bench.sessions.rewind(KEY, len(TEXT))
    assert drain(bench.sessions.runs.generate(KEY, RUN, len(TEXT))) == bench.expected
    assert bench.sessions.get(KEY).model == "tiny@1"


def test_session__uses_no_loaded_version_of_other_weights(bench: Bench) -> None:
    bench.models.get("tiny@3")
    with pytest.raises(ModelChanged) as error:
        bench.sessions.feed(KEY, FeedRequest("a"))
    assert "rebase" in error.value.message


def test_rebase__to_equal_weights_changes_only_the_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.sessions.get(KEY)
    submit, requests = Engine.submit, []

    def submit_and_record(*arguments: Any, **options: Any) -> Any:
        requests.extend(arguments[1])
        return submit(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit", submit_and_record)
        bench.sessions.feed(KEY, FeedRequest("", rebase="tiny@2"))
    assert [(len(request.prompt), request.max_chars) for request in requests] == [(0, 0)]  # what may follow, no step
    after = bench.sessions.get(KEY)
    assert (after.model, after.revision) == ("tiny@2", before.revision + 1)
    assert after.hidden.tobytes() == before.hidden.tobytes()
    assert (after.position, after.identity, after.run) == (before.position, before.identity, before.run)
    assert bench.sessions.text(KEY, None, None)[0] == TEXT
    assert drain(bench.sessions.runs.generate(KEY, RUN, len(TEXT))) == bench.expected


def test_rebase__to_equal_weights_can_be_repeated(bench: Bench) -> None:
    request = FeedRequest(" and", len(TEXT), rebase="tiny@2")
    assert [bench.sessions.feed(KEY, request).position for _ in range(2)] == [len(TEXT) + 4] * 2
    assert bench.sessions.get(KEY).revision == 2
    assert bench.sessions.text(KEY, None, None)[0] == f"{TEXT} and"


def test_rebase__to_equal_weights_at_a_wrong_position_changes_nothing(bench: Bench) -> None:
    with pytest.raises(PositionConflict):
        bench.sessions.feed(KEY, FeedRequest(" and", 3, rebase="tiny@2"))
    assert bench.sessions.get(KEY).model == "tiny@1"


def test_rebase__to_equal_weights_keeps_an_interrupted_run(tmp_path: Path) -> None:
    """Its characters after the saved position are generated again in the new version."""
    bench = Bench(tmp_path)
    try:
        stream = bench.sessions.runs.generate(KEY, RUN, None)
        next(stream.chunks(0.0, 5))
        bench.sessions.runs.interrupt_all(5)
        bench.sessions.runs.is_draining = False
        stream.close()
        bench.lose_version()
        saved = bench.sessions.get(KEY)
        assert saved.run is not None
        assert not saved.run.is_finished
        position = max(saved.position, len(TEXT) + 20)  # the client may have received more than was saved
        bench.sessions.feed(KEY, FeedRequest("", position, rebase="tiny@2"))
        assert bench.sessions.get(KEY).model == "tiny@2"
        assert drain(bench.sessions.runs.resume(KEY, len(TEXT))) == bench.expected
    finally:
        bench.models.close()


def test_state__is_read_by_a_loaded_version_of_equal_weights(bench: Bench) -> None:
    bench.models.get("tiny@2")
    session, _ = bench.sessions.create("", NewSession("b", None, state=bench.state))
    assert session.model == "tiny@2"
    assert drain(bench.sessions.runs.generate(session.key, RUN, None)) == bench.expected
    result = bench.inspector.inspect("", InspectionRequest(text="a", state=bench.state))
    assert result.model.version.ref == "tiny@2"
