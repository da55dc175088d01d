"""Random sequences of operations on sessions, compared with a simple model: a dict of texts, stepped from zero."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.form import Form
from service.engine.request import Request
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import GruServeError, InvalidValue
from service.generation.automata import automaton_of
from service.generation.candidates import Origin, score_candidates
from service.generation.reader import step, whole
from service.generation.run_stream import RunStream
from service.generation.runs import RunRequest
from service.generation.session_service import FeedRequest, NewSession, SessionService
from service.registry.loaded_models import LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.redis_server import RedisServer
from service.sessions.redis_store import RedisStore
from service.sessions.session import SessionKey
from service.sessions.session_store import SessionStore
from service.sessions.text import Retention
from service.store.model_store import ModelStore
from tests.harness.clock import Clock
from tests.harness.effort import IS_THOROUGH
from tests.harness.models import TINY_CHARSET, engine_settings, publish_tiny
from tests.harness.redis_stores import TIMEOUT_S

NUM_RUNS = int(os.environ.get("SESSION_MACHINE_RUNS", "500" if IS_THOROUGH else "75"))
RETENTION, TTL_S = Retention(8, 64), 100.0
TEXTS = st.text(TINY_CHARSET, max_size=30)
SEEDS = st.integers(-3, 3)
SAMPLING = st.sampled_from(
    [
        PLAIN,
        SamplingSettings(temperature=0),
        SamplingSettings(temperature=0.7, top_k=5),
        SamplingSettings(repetition_penalty=1.5, frequency_penalty=0.3),
        SamplingSettings(allowed=(1, 9, 26, 41), top_p=0.9),
    ]
)
# Some may go on wherever they are complete, some end there, and some need more characters than a run may have.
FORMS = [
    Form("choice", json.dumps(["the ear", "tea", "I", "that table is mine: it"])),
    Form("regex", "([a-z]{1,4}[ ,])*[A-Z]"),
    Form("regex", "[a-e]*"),
    Form("regex", "([AB] ?){3,9}|I|e{20,40}"),
    Form("regex", ""),
]
ANY_RUNS = st.builds(
    RunRequest,
    max_chars=st.integers(1, 32),
    sampling=SAMPLING,
    stops=st.sampled_from([(), ("e",), ("ab", "I", "tt")]),
    seed=st.none() | SEEDS,
    min_chars=st.sampled_from([0, 0, 2, 9]),
    includes_stop=st.booleans(),
)
RUNS = ANY_RUNS | st.builds(
    lambda request, form: replace(request, min_chars=0, form=form), ANY_RUNS, st.sampled_from(FORMS)
)


def has_form(form: Form, text: str) -> bool:
    return text in json.loads(form.value) if form.kind == "choice" else re.fullmatch(form.value, text) is not None


def start_of(position: int) -> int:
    """Return the first retained position of a text of this length, if no more is retained than necessary."""
    return (position - RETENTION.max_chars) // RETENTION.segment_chars * RETENTION.segment_chars


@dataclass
class Ran:
    """A run as the simple model knows it."""

    before: str  # the whole text before the run
    context: str  # the retained part of it
    request: RunRequest
    seed: int
    text: str = ""
    reason: str | None = None  # None while it is unfinished

    @property
    def start(self) -> int:
        return len(self.before)

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass
class Text:
    """A session as the simple model knows it."""

    whole: str  # its text from position 0
    start: int
    seed: int
    expires_at: float
    origin: object = None
    run: Ran | None = None

    @property
    def position(self) -> int:
        return len(self.whole)

    def grow(self, text: str) -> None:
        self.whole += text
        self.start = max(self.start, start_of(self.position))

    def feed(self, text: str) -> None:
        self.grow(text)
        if text and self.run is not None and self.run.reason is None:
            self.run = None

    def begin(self, request: RunRequest) -> Ran:
        seed = request.seed if request.seed is not None else self.seed
        return Ran(self.whole, self.whole[self.start :], request, seed)

    def truncate(self, position: int) -> None:
        if position < self.position:
            self.whole = self.whole[:position]
            if self.run is not None and (self.run.reason is None or self.run.end > position):
                self.run = None


@dataclass
class World:
    """What all machines share: loading a model for each one would take longer than its test."""

    models: LoadedModels
    clock: Clock = field(default_factory=Clock)


WORLD: list[World] = []
REDIS_URL: list[str] = []


@pytest.fixture
def with_redis(redis_url: str) -> Iterator[None]:
    REDIS_URL.append(redis_url)
    yield
    REDIS_URL.clear()


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as root:
        store = ModelStore(Path(root))
        publish_tiny(store)
        models = LoadedModels(store, 1, engine_settings())
        models.get("tiny").engine.submit([Request(models.get("tiny").charset.encode("a"), 1, 0)])[0].wait()
        WORLD.append(World(models))
        yield
        WORLD.clear()
        models.close()


class SessionMachine(RuleBasedStateMachine):
    ids = Bundle("ids")
    states = Bundle("states")
    max_sessions = 5

    @initialize()
    def begin(self) -> None:
        self.models, self.clock = WORLD[0].models, WORLD[0].clock
        self.model = self.models.get("tiny")
        self.all_stores = self.stores()
        self.replicas = [self.replica(store) for store in self.all_stores]
        self.texts: dict[str, Text] = {}  # the least recently used first, except for open ones
        self.open: dict[str, tuple[RunStream, Ran]] = {}
        self.gone: set[str] = set()
        self.deleted: set[str] = set()  # to delete them again changes nothing
        self.ran: list[Ran] = []
        self.num_created = 0

    def stores(self) -> Sequence[SessionStore]:
        """Return stores that share their sessions."""
        return [MemoryStore(self.max_sessions, 10**7, self.clock, self.clock)]

    def replica(self, store: SessionStore) -> SessionService:
        sealer = StateSealer(["0123456789abcdef"], self.clock)
        return SessionService(self.models, store, sealer, TTL_S, RETENTION, self.clock)

    @property
    def sessions(self) -> SessionService:
        """The service for the next operation: each replica in turn."""
        self.replicas.append(self.replicas.pop(0))
        return self.replicas[0]

    # The model

    def use(self, session_id: str) -> None:
        text = self.texts.pop(session_id)
        self.texts[session_id] = text
        text.expires_at = self.clock.now + TTL_S

    def fate(self, session_id: str, *, needs_lease: bool = True) -> str | None:
        """Return the code of the error that an operation on this session must raise, or None."""
        if session_id not in self.texts:
            return "session_gone" if session_id in self.gone else "session_not_found"
        return "session_busy" if needs_lease and session_id in self.open else None

    def admit(self, session_id: str, text: Text) -> str | None:
        """Add a new session to the simple model, evicting another if necessary. Return the expected error."""
        if len(self.texts) == self.max_sessions:
            idle = [other for other in self.texts if other not in self.open]
            if not idle:
                return "overloaded"
            del self.texts[idle[0]]
            self.gone.add(idle[0])
        text.start = max(text.start, start_of(text.position))
        self.texts[session_id] = text
        self.gone.discard(session_id)
        self.deleted.discard(session_id)
        return None

    def further(self, session_id: str, num_chars: int) -> str | None:
        """Return the next num_chars characters of an interrupted run, or None if it hasn't as many or there is none."""
        run = self.texts[session_id].run
        if run is None or run.reason is not None or len(run.text) + num_chars > run.request.max_chars:
            return None
        handle = self.model.engine.submit([self.replayed(run)])[0]
        result, end = whole(handle, None)
        text = self.model.charset.decode(result.chars)
        num_whole = len(text) - (end.num_stop_chars > 0 and not run.request.includes_stop)
        more = text[len(run.text) : len(run.text) + num_chars]
        return more if len(run.text) + num_chars <= num_whole else None

    def replayed(self, ran: Ran) -> Request:
        """Return the engine's request for a run, from the first character of its text."""
        encode = self.model.charset.exact
        return Request(
            encode(ran.before),
            ran.request.max_chars,
            ran.seed,
            ran.request.sampling,
            self.automaton(ran.request),
            min_chars=ran.request.min_chars,
            history_prompt=encode(ran.context),
        )

    def automaton(self, request: RunRequest) -> Automaton | None:
        return automaton_of(self.model.charset, request.form, request.sampling.allowed, request.stops)

    def refusal(self, request: RunRequest) -> str | None:
        """Return the code of the error with which a run of this form is refused, or None."""
        try:
            automaton = self.automaton(request)
        except InvalidValue as error:
            return error.code
        return "out_of_range" if automaton is not None and automaton.fewest[0] > request.max_chars else None

    @contextmanager
    def fails(self, code: str | None) -> Iterator[None]:
        """Assert that the block raises an error with this code, or no error if it is None."""
        found = None
        try:
            yield
        except GruServeError as error:
            found = error.code
        assert found == code

    # Creating, deleting, expiring

    @rule(target=ids, text=TEXTS, seed=SEEDS, name=st.none() | st.sampled_from("abcd"))
    def create(self, text: str, seed: int, name: str | None) -> Any:
        new = NewSession(name, "tiny", text, seed=seed)
        there = self.texts.get(name or "")
        code, is_new = None, there is None
        if there is not None:
            code = None if there.origin == new.origin else "session_exists"
            if code is None and name in self.open:
                is_new = False
        made = Text(text, 0, seed, self.clock.now + TTL_S, new.origin)
        session_id = name
        if there is None and len(self.texts) == self.max_sessions and len(self.open) == self.max_sessions:
            code = "overloaded"
        with self.fails(code):
            session, created = self.sessions.create("", new)
            session_id = session.id
            assert created == is_new
            if created:
                assert session.position == len(text)
                self.admit(session.id, made)
        return multiple() if session_id is None else session_id

    @rule(session_id=ids)
    def delete(self, session_id: str) -> None:
        with self.fails(None if session_id in self.deleted else self.fate(session_id)):
            self.sessions.delete(SessionKey("", session_id))
            self.texts.pop(session_id, None)
            self.deleted.add(session_id)

    @rule(seconds=st.sampled_from([1.0, 49.5, 100.0]), sweep=st.booleans())
    def time_passes(self, seconds: float, sweep: bool) -> None:
        self.clock.now += seconds
        for session_id, text in list(self.texts.items()):
            if session_id not in self.open and text.expires_at <= self.clock.now:
                del self.texts[session_id]
                self.gone.add(session_id)
        for store in self.all_stores:
            while sweep and isinstance(store, MemoryStore) and store.sweep(2):
                pass
        if not sweep:  # an unswept session expires when it is read; before that, eviction would count it
            for session_id in self.gone:
                with self.fails(self.fate(session_id, needs_lease=False)):
                    self.sessions.get(SessionKey("", session_id))

    @rule(session_id=ids)
    def others_see_nothing(self, session_id: str) -> None:
        with self.fails("session_not_found"):
            self.sessions.get(SessionKey("another", session_id))
        with self.fails("session_not_found"):
            self.sessions.runs.resume(SessionKey("another", session_id), None)

    # Feeding

    @rule(session_id=ids, text=TEXTS, says=st.booleans())
    def feed(self, session_id: str, text: str, says: bool) -> None:
        with self.fails(self.fate(session_id)):
            position = self.sessions.get(SessionKey("", session_id)).position if says else None
            fed = self.sessions.feed(
                SessionKey("", session_id), FeedRequest(text, position, num_next=3, num_logprobs=1)
            )
            there = self.texts[session_id]
            there.feed(text)
            assert fed.position == there.position
            assert (fed.scores is not None and len(fed.scores.chosen) == len(text)) or not text
            self.use(session_id)

    @rule(session_id=ids, texts=st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=5))
    def score(self, session_id: str, texts: list[str]) -> None:
        """Candidates follow the text as it was saved last, which they don't change, also while a run is active."""
        key = SessionKey("", session_id)
        with self.fails(self.fate(session_id, needs_lease=False)):
            model, before = self.sessions.reading(key, None)
            origin = Origin.after(model, before, self.model.charset.encode(""))
            found = score_candidates(model, origin, [model.charset.encode(text) for text in texts])
            for text, logprobs in zip(texts, found, strict=True):
                ids = model.charset.encode(text)
                _, scores = step(model, ids, before.hidden, before.position, num_logprobs=0)
                assert scores is not None
                assert logprobs.tobytes() == scores.chosen.tobytes()
            assert self.sessions.get(key).revision == before.revision

    @rule(session_id=ids, back=st.integers(0, 60), num_chars=st.integers(0, 60), wrong=st.booleans())
    def feed_again(self, session_id: str, back: int, num_chars: int, wrong: bool) -> None:
        code = self.fate(session_id)
        text = position = None
        if code is None:
            there = self.texts[session_id]
            position = max(0, there.position - back)
            text = there.whole[position : position + num_chars]
            if wrong:
                text += "z" if there.whole[position + len(text) :][:1] != "z" else "a"
            if position != there.position:
                if position + len(text) > there.position or wrong:
                    code = "position_conflict"
                if position < there.start and position + len(text) <= there.position:
                    code = "position_gone"
        with self.fails(code):
            fed = self.sessions.feed(SessionKey("", session_id), FeedRequest(text or "", position, num_logprobs=0))
            assert position is not None
            assert fed.position == position + len(text or "")
            if position == self.texts[session_id].position and text:
                self.texts[session_id].feed(text)
        if session_id in self.texts and session_id not in self.open:
            self.use(session_id)

    @rule(session_id=ids, ahead=st.integers(1, 3))
    def feed_too_far(self, session_id: str, ahead: int) -> None:
        code, more = self.fate(session_id), None
        if code is None:
            more = self.further(session_id, ahead)
            code = "position_conflict" if more is None else None
            self.use(session_id)
        position = self.texts[session_id].position + ahead if session_id in self.texts else ahead
        with self.fails(code):
            self.sessions.feed(SessionKey("", session_id), FeedRequest("a", position))
            assert more is not None
            self.texts[session_id].grow(more)
            self.texts[session_id].feed("a")

    # Generating

    @rule(session_id=ids, request=RUNS, says=st.booleans())
    def generate(self, session_id: str, request: RunRequest, says: bool) -> None:
        code = self.fate(session_id)
        if session_id in self.texts:  # also while another run is active
            code = self.refusal(request) or code
        position = self.texts[session_id].position if says and session_id in self.texts else None
        if code == "session_busy" and says:
            return  # it may take the run over: see resume
        with self.fails(code):
            continuation = self.sessions.runs.generate(SessionKey("", session_id), request, position)
            there = self.texts[session_id]
            again = there.run is not None and says and there.run.start == position and there.run.request == request
            run = there.run if again and there.run is not None else there.begin(request)
            self.finish(session_id, continuation, run, run.start)
            self.use(session_id)

    @rule(session_id=ids)
    def generate_again(self, session_id: str) -> None:
        """Repeat the request of the last run with its position: nothing is generated twice."""
        there = self.texts.get(session_id)
        if there is None or there.run is None or session_id in self.open or there.run.start < there.start:
            return
        run = there.run
        again = replace(run.request, seed=run.seed)
        self.finish(
            session_id, self.sessions.runs.generate(SessionKey("", session_id), again, run.start), run, run.start
        )
        self.use(session_id)

    @rule(session_id=ids, request=RUNS, num_pieces=st.integers(0, 3))
    def generate_and_leave(self, session_id: str, request: RunRequest, num_pieces: int) -> None:
        request = replace(request, max_chars=30)
        if self.fate(session_id) is not None or self.refusal(request) is not None:
            return
        there = self.texts[session_id]
        run = there.begin(request)
        continuation = self.sessions.runs.generate(SessionKey("", session_id), run.request, None)
        pieces = continuation.chunks(0.0, 20)
        got = "".join(piece.text for piece, _ in zip(pieces, range(num_pieces), strict=False) if piece is not None)
        continuation.close()
        self.stopped(session_id, run)
        assert run.text.startswith(got)
        self.use(session_id)

    @rule(session_id=ids, back=st.integers(-3, 40))
    def resume(self, session_id: str, back: int) -> None:
        code = self.fate(session_id, needs_lease=False)
        if session_id in self.open:  # resume takes it over
            self.close(session_id)
            self.use(session_id)
        there = self.texts.get(session_id)
        after: int | None = None
        if there is not None and there.run is not None:
            end = there.run.end if there.run.reason is not None else there.position
            after = max(0, end - back)
            if after > (end if there.run.reason is not None else there.run.start + there.run.request.max_chars):
                code = "position_conflict"
            elif min(after, there.run.start) < there.start:
                code = "position_gone"
        elif there is not None:
            code = "no_run"
        with self.fails(code):
            continuation = self.sessions.runs.resume(SessionKey("", session_id), after)
            assert there is not None
            assert there.run is not None
            assert after is not None
            self.finish(session_id, continuation, there.run, after)
            self.use(session_id)  # one that is refused has only looked at the session

    def finish(self, session_id: str, continuation: RunStream, run: Ran, after: int) -> None:
        """Read a stream after a position to its end, and note the run in the simple model or compare it."""
        there = self.texts[session_id]
        pieces = [piece for piece in continuation.chunks(0.0, 20) if piece is not None]
        got, position = "", after
        for piece in pieces:
            got, position = got + piece.text, position + len(piece.text)
            assert piece.position == position
        assert got == (run.before + continuation.text)[after:]
        assert continuation.position == run.start + len(continuation.text)
        assert position == max(after, continuation.position)
        assert continuation.finish_reason is not None
        if run.reason is None:
            there.whole = run.before
            there.grow(continuation.text)
            run.text, run.reason, there.run = continuation.text, continuation.finish_reason, run
            self.ran.append(run)
        else:
            assert (continuation.text, continuation.finish_reason) == (run.text, run.reason)

    def stopped(self, session_id: str, run: Ran) -> None:
        """Note a run that was stopped, or had just ended, at the position at which the session is."""
        there, session = self.texts[session_id], self.sessions.get(SessionKey("", session_id))
        assert session.run is not None
        text = session.text.slice(run.start, session.position)
        there.whole = run.before
        there.grow(text)
        run.text, run.reason, there.run = text, session.run.finish_reason, run
        self.ran.append(run)

    # Open runs: the session is leased

    @rule(session_id=ids, request=RUNS)
    def open_run(self, session_id: str, request: RunRequest) -> None:
        request = replace(request, max_chars=24)
        if self.fate(session_id) is None and self.refusal(request) is None:
            run = self.texts[session_id].begin(request)
            self.open[session_id] = self.sessions.runs.generate(SessionKey("", session_id), run.request, None), run

    @rule(session_id=ids)
    def close_run(self, session_id: str) -> None:
        if session_id in self.open:
            self.close(session_id)
            self.use(session_id)

    def close(self, session_id: str) -> None:
        continuation, run = self.open.pop(session_id)
        continuation.close()
        self.stopped(session_id, run)

    # Rewinding, forking, exporting

    @rule(session_id=ids, back=st.integers(-2, 60))
    def rewind(self, session_id: str, back: int) -> None:
        code, position, more = self.fate(session_id), 5, None
        if code is None:
            there = self.texts[session_id]
            position = max(0, there.position - back)
            code = "position_gone" if position < there.start else None
            if back < 0:
                more = self.further(session_id, -back)
                code = "position_conflict" if more is None else None
            self.use(session_id)
        with self.fails(code):
            assert self.sessions.rewind(SessionKey("", session_id), position).position == position
            there = self.texts[session_id]
            if more is not None and there.run is not None:
                there.grow(more)
                there.run.text += more
            there.truncate(position)

    @rule(target=ids, session_id=ids, back=st.none() | st.integers(-2, 60), seed=st.none() | SEEDS)
    def fork(self, session_id: str, back: int | None, seed: int | None) -> Any:
        code = self.fate(session_id)
        position, more = None, ""
        if code is None:
            there = self.texts[session_id]
            if back is not None:
                position = max(0, there.position - back)
                code = "position_gone" if position < there.start else None
            if back is not None and back < 0:
                found = self.further(session_id, -back)
                more, code = found or "", "position_conflict" if found is None else None
            self.use(session_id)
            if code is None and len(self.texts) == self.max_sessions and len(self.open) == self.max_sessions:
                code = "overloaded"
        made = None
        with self.fails(code):
            session, is_new = self.sessions.fork(SessionKey("", session_id), None, position, seed)
            assert is_new
            made = session.id
            there = self.texts[session_id]
            self.admit(
                session.id,
                Text(
                    (there.whole + more)[:position],
                    there.start,
                    seed if seed is not None else there.seed,
                    self.clock.now + TTL_S,
                ),
            )
        return multiple() if made is None else made

    @rule(target=states, session_id=ids, ttl_s=st.none() | st.just(60.0))
    def export(self, session_id: str, ttl_s: float | None) -> Any:
        with self.fails(self.fate(session_id)):
            state, header = self.sessions.export(SessionKey("", session_id), ttl_s)
            there = self.texts[session_id]
            assert header.position == there.position
            self.use(session_id)
            return state, there.whole, there.seed, None if ttl_s is None else self.clock.now + ttl_s
        return multiple()

    @rule(target=ids, exported=states, text=TEXTS, damage=st.booleans())
    def carry(self, exported: tuple[str, str, int, float | None], text: str, damage: bool) -> Any:
        state, whole, seed, expires_at = exported
        code = "state_expired" if expires_at is not None and expires_at <= self.clock.now else None
        if damage:
            code, state = "invalid_state", state[:-7] + state[-6:]
        if code is None and len(self.open) == self.max_sessions == len(self.texts):
            code = "overloaded"
        made = None
        with self.fails(code):
            session, _ = self.sessions.create("", NewSession(None, None, text, state=state))
            made = session.id
            self.admit(made, Text(whole + text, len(whole), seed, self.clock.now + TTL_S))
        return multiple() if made is None else made

    @rule(exported=consumes(states))
    def lose(self, exported: object) -> None:
        """Forget an exported state."""

    # Invariants

    @invariant()
    def texts_match(self) -> None:
        for session_id, text in getattr(self, "texts", {}).items():
            session = self.sessions.get(SessionKey("", session_id))
            if session_id in self.open:
                continue
            assert (session.position, session.text.start, session.seed) == (
                text.position,
                text.start,
                text.seed,
            )
            assert session.text.slice(text.start, text.position) == text.whole[text.start :]
            assert session.expires_at == text.expires_at
        for store in getattr(self, "all_stores", []):
            assert not isinstance(store, MemoryStore) or len(store) >= len(self.texts)

    def teardown(self) -> None:
        try:
            if hasattr(self, "texts"):
                self.replay()
        finally:
            for replica in getattr(self, "replicas", []):
                replica.runs.close()
            for store in getattr(self, "all_stores", []):
                store.close()

    def replay(self) -> None:
        """Compare every session, and every run, with its text stepped from the zero state."""
        for session_id in list(self.open):
            self.close(session_id)
        encode = self.model.charset.exact
        sessions = [(self.sessions.get(SessionKey("", session_id)), text) for session_id, text in self.texts.items()]
        replays = [Request(encode(text.whole), 0, 0) for _, text in sessions]
        replays += [self.replayed(ran) for ran in self.ran]
        handles = self.model.engine.submit(replays)
        for (session, _), handle in zip(sessions, handles, strict=False):
            assert handle.wait().hidden.tobytes() == session.hidden.tobytes()
        for ran, handle in zip(self.ran, handles[len(sessions) :], strict=True):
            result, end = whole(handle, None)
            text = self.model.charset.decode(result.chars)
            if ran.reason is None:
                assert text.startswith(ran.text)
                continue
            form, stops = ran.request.form, [stop for stop in ran.request.stops if text.endswith(stop)]
            longest = max(map(len, stops)) if end.reason == "stop" and form is None else end.num_stop_chars
            if form is not None:
                assert has_form(form, text[: len(text) - longest])
            if not ran.request.includes_stop:
                text = text[: len(text) - longest]
            assert (ran.text, ran.reason) == (text, end.reason)


class ReplicaMachine(SessionMachine):
    """Three replicas that share only a Redis server. Each operation is done by another one."""

    max_sessions = 10**6

    def stores(self) -> Sequence[SessionStore]:
        # Very long leases: the tests' clock jumps, and no lease is renewed according to it.
        prefix, caches = secrets.token_hex(8), (2**20, 20_000, 0)
        servers = [RedisServer(REDIS_URL[0], TIMEOUT_S, 0) for _ in caches]
        return [
            RedisStore(server, RETENTION.segment_chars, cache_bytes, prefix, 10**6, self.clock)
            for server, cache_bytes in zip(servers, caches, strict=True)
        ]

    @property
    def sessions(self) -> SessionService:
        """While a run is open, always the same replica: takeovers need real time (test_replicas.py)."""
        return super().sessions if not self.open else self.replicas[0]


SETTINGS = settings(stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def test_sessions__match_the_simple_model() -> None:
    run_state_machine_as_test(SessionMachine, settings=settings(SETTINGS, max_examples=NUM_RUNS))


@pytest.mark.usefixtures("with_redis")
def test_replicas__match_the_simple_model() -> None:
    run_state_machine_as_test(ReplicaMachine, settings=settings(SETTINGS, max_examples=NUM_RUNS // 5))
