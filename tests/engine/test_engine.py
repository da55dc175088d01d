"""The engine: each text gets what it would get alone; callers see overload, cancellation, failure and stalls."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.stops import with_stops
from service.engine.counters import SubmittedBatch
from service.engine.engine import Engine
from service.engine.handle import End, Handle
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.pace import SHARED_TICK_S, Pace, flush_interval
from service.engine.request import Request
from service.engine.sampling_settings import SamplingSettings
from service.engine.short_text import ReadText, ShortText
from service.engine.stepper import InvalidRows, Row, Stepper, StepResult, Steps
from service.engine.texts import JobBatch, Text
from service.engine.torch_stepper import TorchStepper
from service.errors import EngineFailed, InvalidValue, Overloaded
from service.shares import SharedBudget
from tests.harness.automata import random_automaton
from tests.harness.rows import CHARSET, EMPTY, changed, quantized
from tests.harness.wait import wait_until

STEPPER = TorchStepper(quantized())
STEPPERS: dict[str, Callable[[], Stepper]] = {"torch": lambda: STEPPER}
if variants():
    STEPPERS["native"] = lambda: NativeStepper(quantized())
    STEPPERS["native, two threads"] = lambda: NativeStepper(quantized(), 2, always_together=True)


@pytest.fixture(params=STEPPERS, scope="module")
def stepper(request: pytest.FixtureRequest) -> Stepper:
    """Each implementation, for tests in which texts join and leave."""
    return STEPPERS[request.param]()


@contextmanager
def running(
    stepper: Stepper = STEPPER, max_running: int = 8, max_waiting: int = 1000, **changes: Any
) -> Iterator[Engine]:
    engine = Engine(stepper, len(CHARSET), max_running, max_waiting, **changes)
    try:
        yield engine
    finally:
        engine.close()


def request(prompt: str = "ROMEO:", max_chars: int = 30, seed: int = 7, **changes: Any) -> Request:
    return Request(CHARSET.encode(prompt), max_chars, seed, **changes)


def result(handle: Handle) -> list[Any]:
    """Wait for the end of a text. Everything that it brought, comparable to the bit."""
    chars: list[int] = []
    scores: list[bytes] = []
    among: list[bytes] = []
    while True:
        part, end = handle.read(0.0, 10)
        chars += part.chars.tolist()
        for some in (part.prompt_scores, part.scores):
            if some is not None:
                scores.append(some.chosen.tobytes())
                among += [] if some.allowed is None else [some.allowed.tobytes()]
        if end is not None:
            ends = [b"".join(among), end.num_stop_chars, None if end.next is None else end.next.logprobs.tobytes()]
            checkpoints = [(position, hidden.tobytes()) for position, hidden in end.checkpoints.items()]
            return [chars, b"".join(scores), end.reason, end.position, end.hidden.tobytes(), checkpoints, ends]


KINDS: list[tuple[str, int, dict[str, Any]]] = [
    ("ROMEO:", 40, {"checkpoint_positions": (6, 30, 60)}),
    ("", 25, {"sampling": SamplingSettings(temperature=0.6)}),
    ("the lady of the house " * 6, 3, {"num_logprobs": 2, "score_prompt": True}),
    ("I", 60, {"sampling": SamplingSettings(top_k=4, repetition_penalty=1.2), "num_logprobs": 0}),
    ("a", 50, {"automaton": with_stops(None, [CHARSET.encode("e")], len(CHARSET))}),
    ("b", 0, {}),
]
REQUESTS = [request(prompt, max_chars, seed, **changes) for seed, (prompt, max_chars, changes) in enumerate(KINDS)]


@pytest.fixture(scope="module")
def alone() -> list[list[Any]]:
    """What the torch stepper gives each request alone. The other steppers must give the same."""
    with running(max_running=1) as engine:
        return [result(engine.submit([request])[0]) for request in REQUESTS]


def test_engine__texts_that_join_and_leave_at_random_get_what_each_gets_alone(
    stepper: Stepper, alone: list[list[Any]]
) -> None:
    """Several threads submit hundreds of texts, and cancel some."""
    wrong: list[int] = []

    def submit_some(seed: int, engine: Engine) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            which = rng.integers(len(REQUESTS), size=rng.integers(1, 4)).tolist()
            handles = engine.submit([REQUESTS[i] for i in which])
            if rng.random() < 0.3:
                handles.pop().cancel()
            wrong.extend(i for i, handle in zip(which, handles, strict=False) if result(handle) != alone[i])

    for max_running in (2, 7, 64):
        with running(stepper, max_running) as engine:
            threads = [threading.Thread(target=submit_some, args=(seed, engine)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: engine.num_open == 0)  # cancelled texts leave at the next tick
    assert wrong == []


def test_engine__request_continues_from_a_state(stepper: Stepper, alone: list[list[Any]]) -> None:
    with running(stepper) as engine:
        prompt = engine.submit([request(max_chars=0)])[0].wait()
        assert alone[0][5][0] == (6, prompt.hidden.tobytes())
        rest = request("", 40, seed=0, hidden=prompt.hidden, position=prompt.position)
        assert result(engine.submit([rest])[0])[:5] == alone[0][:5]
        assert alone[0][5][0] == (6, prompt.hidden.tobytes())  # the state was copied, not modified


@pytest.mark.parametrize("length", [1, 12, 29])
def test_engine__request_continues_an_interrupted_run(stepper: Stepper, length: int) -> None:
    """Penalties count what the run generated, and a stop string may begin there."""
    sampling = SamplingSettings(repetition_penalty=1.3, frequency_penalty=0.4)
    how: dict[str, Any] = {"sampling": sampling, "history_prompt": CHARSET.encode("ROMEO:")}
    with running(stepper) as engine:
        whole = result(engine.submit([request("ROMEO:", 40, **how)])[0])
        chars = np.array(whole[0], np.int64)
        stop = chars[length - 1 : length + 1]
        first = engine.submit([request("ROMEO:", length, **how)])[0].wait()
        rest: dict[str, Any] = {"hidden": first.hidden, "position": first.position, "generated": chars[:length]} | how
        assert result(engine.submit([request("", 40 - length, **rest)])[0])[0] == whole[0][length:]
        stopped = engine.submit([request("", 40 - length, automaton=with_stops(None, [stop], len(CHARSET)), **rest)])[0]
        assert result(stopped)[0] == whole[0][length : length + 1]


class _Gate:
    """A stepper that waits before every tick until the test allows it."""

    def __init__(self, stepper: Stepper = STEPPER) -> None:
        self.stepper = stepper
        self.entered, self.allowed = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        self.entered.release()
        assert self.allowed.acquire(timeout=60)
        return self.stepper.advance(rows, num_chars)

    def initial_hidden(self) -> Any:
        return self.stepper.initial_hidden()

    def open(self) -> None:
        self.allowed.release(10_000)


def test_submit__full_queue_refuses_all_requests_of_a_call() -> None:
    gate = _Gate()
    with running(gate, max_running=2, max_waiting=3) as engine:
        handles = engine.submit([request()])
        assert gate.entered.acquire(timeout=60)
        handles += engine.submit([request()] * 3)
        with pytest.raises(Overloaded):
            engine.submit([request()] * 2)
        handles += engine.submit([request()])
        with pytest.raises(Overloaded):
            engine.submit([request()])
        gate.open()
        assert len({tuple(result(handle)[0]) for handle in handles}) == 1
        assert len(result(engine.submit([request()])[0])[0]) == 30


def test_engine__place_is_free_before_the_end_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that submits again as soon as its text has ended must not be refused."""
    open_at_end: list[int] = []
    publish_end = Handle.publish_end

    def note(handle: Handle, end: End) -> None:
        open_at_end.append(engine.num_open)
        publish_end(handle, end)

    monkeypatch.setattr(Handle, "publish_end", note)
    with running(max_running=1, max_waiting=0) as engine:
        engine.submit([request()])[0].wait()
        handle = engine.submit([request(max_chars=100_000)])[0]
        handle.cancel()
        handle.wait()
    assert open_at_end == [0, 0]


def test_submit__already_admitted_work_is_not_refused_for_lack_of_room() -> None:
    gate = _Gate()
    with running(gate, max_running=1, max_waiting=0) as engine:
        running_text = engine.submit([request()])[0]
        with pytest.raises(Overloaded):
            engine.submit([request()])
        following = engine.submit([request(max_chars=0)], already_admitted=True)[0]
        gate.open()
        assert running_text.wait().position == following.wait().position + 30


def test_submit__short_text_is_stepped_by_the_caller_if_the_engine_is_idle(stepper: Stepper) -> None:
    """With the same result beside other texts and from many threads."""
    short, long = request("ROMEO", 0, checkpoint_positions=(2, 5), num_next=3), request("ROMEO" * 7, 0)
    with running(stepper) as engine:
        before = threading.active_count()
        alone = engine.submit([short])[0]
        assert alone.end is not None
        assert threading.active_count() == before  # the engine's thread was not started
        assert alone.end.next is not None
        assert len(alone.end.next.ids) == 3
        expected = result(alone)
        engine.submit([long])[0].wait()
        running_text = engine.submit([request(max_chars=3000)])[0]
        beside = engine.submit([short])[0]
        assert result(beside) == expected
        running_text.cancel()
        results: list[list[Any]] = []

        def submit_many() -> None:
            results.extend(result(engine.submit([short])[0]) for _ in range(50))

        threads = [threading.Thread(target=submit_many) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 300


@pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")
def test_read_at_once__reads_short_texts_if_the_engine_is_idle_and_has_room() -> None:
    native = NativeStepper(quantized())
    state = native.initial_hidden()
    short = ShortText(state, 3, CHARSET.encode("ROMEO"), wants_next=True)
    expected = native.read([short])[0]
    with running(native, max_running=2, max_waiting=0, memory=SharedBudget(1_000_000)) as engine:
        read = engine.read_at_once([short])
        assert read is not None
        assert (read[0].hidden == expected.hidden).all()
        assert (engine.num_open, engine.memory_usage, engine.counters.num_read) == (0, 0, 5)
        assert engine.read_at_once([replace(short, ids=CHARSET.encode("a" * 33))]) is None  # too long
        assert engine.read_at_once([short] * 5) is None  # more than have room
        for invalid in ({"position": -1}, {"ids": np.array([99])}, {"hidden": state[:, :5]}):
            with pytest.raises(InvalidValue):
                engine.read_at_once([replace(short, **invalid)])
        with pytest.raises(InvalidValue):
            engine.read_at_once([replace(short, hidden=state + 2, is_root=True)])
        text = engine.submit([request(max_chars=100_000)])[0]
        assert engine.read_at_once([short]) is None
        text.cancel()
        text.wait()
        wait_until(lambda: engine.read_at_once([short]) is not None)
    assert engine.read_at_once([short]) is None  # `submit` refuses it
    with running(_Gate()) as other:  # its stepper reads no short texts
        assert other.read_at_once([short]) is None
    with running(native, memory=SharedBudget(100)) as small:
        assert small.read_at_once([short]) is None


@pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")
def test_read_at_once__failure_fails_the_engine() -> None:
    class Failing(NativeStepper):
        def read(self, texts: Sequence[ShortText]) -> list[ReadText]:
            raise MemoryError

    native = Failing(quantized())
    with running(native) as engine:
        engine.submit([request(max_chars=5)])[0].wait()  # starts the engine's thread
        wait_until(lambda: engine.num_open == 0)
        for _ in range(2):
            with pytest.raises(EngineFailed):
                engine.read_at_once([ShortText(native.initial_hidden(), 0, CHARSET.encode("a"))])
        with pytest.raises(EngineFailed):
            engine.submit([request()])


def test_engine__failure_on_a_callers_thread_fails_all_texts(stepper: Stepper) -> None:
    class Failing(_Gate):
        def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
            if len(rows[0].request.prompt) == 1:
                raise MemoryError
            return self.stepper.advance(rows, num_chars)

    with running(Failing(stepper)) as engine:
        engine.submit([request(max_chars=5)])[0].wait()  # starts the engine's thread
        with pytest.raises(EngineFailed):
            engine.submit([request("a", 0)])
        for _ in range(2):
            with pytest.raises(EngineFailed):
                engine.submit([request()])[0].wait()
    with running(Failing(stepper)) as engine:
        with pytest.raises(EngineFailed):
            engine.submit([request("a", 0)])
        with pytest.raises(EngineFailed):
            engine.check()


def test_engine__first_come_first_served() -> None:
    order: list[int] = []

    class Noting(_Gate):
        def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
            order.extend(row.request.seed for row in rows if row.request.seed not in order)
            return super().advance(rows, num_chars)

    gate = Noting()
    with running(gate, max_running=1) as engine:
        handles = [engine.submit([request(seed=seed, max_chars=2)])[0] for seed in range(5)]
        gate.open()
        for handle in handles:
            handle.wait()
    assert order == list(range(5))


@pytest.mark.parametrize("moment", ["waiting", "running"])
def test_cancel__text_leaves_at_the_next_tick_with_its_state(moment: str) -> None:
    gate = _Gate()
    with running(gate, max_running=1) as engine:
        first, second = engine.submit([request(max_chars=100_000), request()])
        assert gate.entered.acquire(timeout=60)
        (first if moment == "running" else second).cancel()
        if moment == "waiting":
            gate.allowed.release()
            assert gate.entered.acquire(timeout=60)
            gate.allowed.release()
            end = second.wait()
            assert (end.reason, end.position) == ("cancelled", 0)
            first.cancel()
        gate.open()
        end = first.wait()
        chars = result(first)[0]
        assert end.reason == "cancelled"
        assert len(chars) == max(0, end.position - 6)
        text = ("ROMEO:" + CHARSET.decode(chars))[: end.position]
        assert engine.submit([request(text, 0)])[0].wait().hidden.tobytes() == end.hidden.tobytes()


class _Failing(_Gate):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
        self.entered.release()
        assert self.allowed.acquire(timeout=60)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), MemoryError(), SystemExit()], ids=repr)
def test_engine__failure_of_the_stepper_reaches_every_waiting_caller(error: BaseException) -> None:
    failing = _Failing(error)
    with running(failing, max_running=2) as engine:
        handles = engine.submit([request()] * 5)
        caught: list[Exception] = []

        def wait(handle: Handle, how: Callable[[Handle], object]) -> None:
            try:
                how(handle)
            except EngineFailed as failed:
                caught.append(failed)

        ways: list[Callable[[Handle], object]] = [Handle.wait, lambda handle: handle.read(0.0)]
        ways += [Handle.read_whole, Handle.wait, Handle.wait]
        threads = [threading.Thread(target=wait, args=pair) for pair in zip(handles, ways, strict=True)]
        for thread in threads:
            thread.start()
        failing.open()
        for thread in threads:
            thread.join(60)
        assert len(caught) == 5
        assert "out of luck" not in str(caught[0])
        with pytest.raises(EngineFailed):
            engine.check()
        with pytest.raises(EngineFailed):
            engine.submit([request()])


def test_engine__stuck_step_fails_waiting_callers_and_the_check() -> None:
    gate, now = _Gate(), [0.0]
    with running(gate, stall_s=5, clock=lambda: now[0]) as engine:
        handle = engine.submit([request()])[0]
        assert gate.entered.acquire(timeout=60)
        engine.check()
        now[0] = 6.0
        with pytest.raises(EngineFailed):
            engine.check()
        with pytest.raises(EngineFailed):
            handle.wait()
        with pytest.raises(EngineFailed):
            engine.submit([request()])
        gate.open()
        wait_until(lambda: handle.end is not None)  # the step returns, and the engine recovers
        engine.check()
        assert len(result(handle)[0]) == 30


def test_close__fails_open_texts() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handles = engine.submit([request(max_chars=100_000)] * 10)
        assert gate.entered.acquire(timeout=60)
        gate.open()
        engine.close()
        for handle in handles:
            with pytest.raises(EngineFailed):
                handle.wait()
            with pytest.raises(EngineFailed):
                handle.read_whole()
        assert engine.num_open == 0
        with pytest.raises(EngineFailed):
            engine.submit([request()])


def test_retire__thread_ends_when_idle_and_the_engine_stays_usable() -> None:
    with running() as engine:
        handle = engine.submit([request()])[0]
        engine.retire()
        first = result(handle)
        for _ in range(3):
            wait_until(lambda: engine._thread is None)
            assert result(engine.submit([request()])[0]) == first


def test_retire__text_submitted_while_the_thread_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the thread's last look at the inbox and its end, a new text may arrive. It gets a new thread."""
    late: list[Handle] = []
    with running() as engine:
        wait_for_work = engine._wait_for_work

        def submit_as_it_ends() -> bool:
            has_work = wait_for_work()
            if not has_work and not late:
                late.extend(engine.submit([request(max_chars=5000)]))
            return has_work

        monkeypatch.setattr(engine, "_wait_for_work", submit_as_it_ends)
        engine.retire()
        engine.submit([request()])[0].wait()
        wait_until(lambda: bool(late))
        assert late[0].wait().reason == "length"


def test_read__returns_everything_once_and_in_order() -> None:
    with running() as engine:
        whole = result(engine.submit([request(max_chars=3000)])[0])[0]
        handle = engine.submit([request(max_chars=3000)])[0]
        parts: list[int] = []
        end = None
        while end is None:
            part, end = handle.read(0.001, 1)
            parts += part.chars.tolist()
        assert parts == whole
        for again in (handle.read(0.0), handle.read_whole()):
            assert (again.result.is_empty, again.end) == (True, end)


def test_read__loses_nothing_while_results_are_added() -> None:
    """The reader reads all the time, and results are joined in between."""
    handle, num_parts = Handle(request(), lambda: None), 50_000

    def publish() -> None:
        for i in range(num_parts):
            part = np.array([2 * i, 2 * i + 1])
            handle.publish(part if i % 3 else StepResult(part))
        handle.publish_end(End("length", np.zeros((1, 1), np.float32), 0, {}))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=publish)
        thread.start()
        chars, end = list[int](), None
        while end is None:
            part, end = handle.read(0.0, 10)
            chars += part.chars.tolist()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert chars == [*range(2 * num_parts)]


def test_read__of_a_batch_finds_everything_while_calls_are_added() -> None:
    """One text is read all the time, one now and then, and one at the end. Calls draw all or some characters."""
    rng = np.random.default_rng(5)
    handles = [Handle(request(), lambda: None) for _ in range(3)]
    texts = [
        Text(handle, Row(handle.request, np.zeros((1, 1), np.float32)), SubmittedBatch(1), 0, 0) for handle in handles
    ]
    expected: list[list[int]] = [[], [], []]
    found: list[list[int]] = [[], [], []]

    def read_all() -> None:
        end = None
        while end is None:
            part, end = handles[0].read(0.0, 10)
            found[0].extend(part.chars.tolist())

    thread = threading.Thread(target=read_all)
    thread.start()
    for _ in range(4):
        batch = JobBatch(texts)
        for call in range(150):
            num_chars = int(rng.integers(1, 5))
            drawn, num_withheld = rng.integers(0, 60, (3, num_chars)), rng.integers(0, 3, 3)
            is_partial = call % 100 > 70
            num_drawn = rng.integers(0, num_chars + 1, 3) if is_partial else np.full(3, num_chars)
            batch.add(Steps(drawn, num_drawn if is_partial else None, num_withheld, {}, [], 0, int(num_drawn.sum())))
            for chars, row, count in zip(expected, drawn.tolist(), num_drawn.tolist(), strict=True):
                chars += row[:count]
            handles[0].wake()
            if call % 40 == 0:
                found[1].extend(handles[1].read(0.0, 0.0).result.chars.tolist())
        batch.dissolve()
    for handle in handles:
        handle.publish_end(End("length", np.zeros((1, 1), np.float32), 0, {}))
    thread.join()
    last = [handle.read_whole().result for handle in handles]
    assert [chars + one.chars.tolist() for chars, one in zip(found, last, strict=True)] == expected
    assert last[2].num_withheld == (num_withheld[2] if num_drawn[2] else last[2].num_withheld)


def test_engine__retains_nothing_of_texts_that_have_ended(stepper: Stepper) -> None:
    with running(stepper) as engine:
        handles = engine.submit([request(max_chars=300, seed=seed) for seed in range(3)])
        handles.append(engine.submit([request(max_chars=10**7)])[0])
        handles[-1].cancel()
        for handle in handles:
            handle.wait()
            handle.request_snapshot()  # too late
        wait_until(lambda: engine.num_open == 0)
        assert not engine._wishes.snapshots
        assert not engine._wishes.results
        references = [weakref.ref(handle) for handle in handles]
        del handle, handles
        wait_until(lambda: gc.collect() >= 0 and [reference() for reference in references] == [None] * 4)


def test_cancel__before_the_thread_has_taken_the_text_in(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Handle] = []
    drop_cancelled = Engine._drop_cancelled

    def submit_another(engine: Engine) -> None:
        if not late:  # after the thread has taken in what was new
            late.extend(engine.submit([request(max_chars=20_000)]))
            late[0].cancel()
        drop_cancelled(engine)

    monkeypatch.setattr(Engine, "_drop_cancelled", submit_another)
    with running() as engine:
        assert engine.submit([request()])[0].wait().reason == "length"
        assert late[0].wait().reason == "cancelled"


def test_read__is_empty_after_its_timeout() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handle = engine.submit([request()])[0]
        for update in (handle.read(0.0, 0.01), handle.read_whole(0.01)):
            assert (update.result.is_empty, update.end) == (True, None)
        gate.open()
        whole = handle.read_whole()
        assert whole.end is not None
        assert len(whole.result.chars) == 30


def test_pace__keeps_ticks_to_their_length() -> None:
    pace = Pace()
    for _ in range(50):
        pace.measured(1, pace.num_chars(1), pace.num_chars(1) * 100e-6)
    assert 45 <= pace.num_chars(1) <= 50
    assert 22 <= pace.num_chars(1, SHARED_TICK_S) <= 25
    assert pace.num_chars(64) == 4  # the minimum: a batch that has grown is assumed to take as much time for each row
    for _ in range(50):
        pace.measured(64, pace.num_chars(64), pace.num_chars(64) * 0.5e-3)
    assert 9 <= pace.num_chars(64) <= 11
    pace.measured(256, 1, 1.0)
    assert pace.num_chars(256) == 4
    assert pace.num_chars(1) == 50  # batches of other sizes have not changed this
    for _ in range(50):
        pace.measured(1, 1, 1e-9)
    assert pace.num_chars(1) == 256


def test_pace__limits_the_rows_of_a_short_tick() -> None:
    pace = Pace()
    pace.measured(1, 100, 0.005)
    assert pace.num_rows(0.005) == 25
    assert pace.num_rows(0.001) == 16
    pace.measured(256, 4, 256 * 4 * 25e-6)
    assert pace.num_rows(0.005) == 50  # of four characters: 5 ms
    pace.measured(1, 100, 0.005)
    assert pace.num_rows(0.005) == 50  # what a large batch costs, not a single text


def test_engine__a_full_queue_of_one_client_does_not_refuse_others() -> None:
    gate = _Gate()
    with running(gate, max_running=4, max_waiting=4) as engine:
        handles = engine.submit([request(client="greedy")] * 8)
        with pytest.raises(Overloaded):
            engine.submit([request(client="greedy")])
        handles += engine.submit([request(client="b")] * 4)
        with pytest.raises(Overloaded):
            engine.submit([request(client="b")])  # it holds as many places as are free
        handles += engine.submit([request(client="c")] * 2)
        handles += engine.submit([request(client="d")])
        with pytest.raises(Overloaded):
            engine.submit([request(client="greedy")])
        gate.open()
        assert len({tuple(result(handle)[0]) for handle in handles}) == 1
        assert engine.num_open == 0
        assert len(engine.submit([request(client="greedy")] * 8)) == 8  # all places are free again


def test_engine__a_text_does_not_wait_for_the_end_of_another_clients_texts() -> None:
    with running(max_running=4) as engine:
        endless = engine.submit([request(max_chars=10**7, client="greedy")] * 100)
        for handle in engine.submit([request(client="other", seed=seed) for seed in range(10)]):
            handle.wait()
        assert all(handle.end is None for handle in endless)
        for handle in endless:
            handle.cancel()


def test_crowd__is_what_a_client_would_see_if_all_were_like_it() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handles = engine.submit([request(client="greedy")] * 100) + engine.submit([request(client="other")] * 2)
        assert [engine.crowd_of(client) for client in ("greedy", "other", "nobody")] == [200, 4, 0]
        gate.open()
        for handle in handles:
            handle.wait()


def test_flush_interval__grows_with_the_number_of_open_texts() -> None:
    assert flush_interval(1, 0.025) == 0.025
    assert flush_interval(40, 0.025) == 0.025
    assert flush_interval(256, 0.025) == 0.16


HUGE = 2**63 - 1
LONE = np.array([len(CHARSET)])  # an id that the model doesn't have
_NONE = np.zeros(1, np.int32)
ANY = Automaton(np.zeros(len(CHARSET), np.int32), np.zeros((1, 1), np.int32), _NONE, _NONE, _NONE)  # allows everything
UNREPRESENTABLE: dict[str, dict[str, Any]] = {
    "position after the last one": {"position": HUGE},
    "end after the last one": {"position": 2**53 - 35},
    "position below 0": {"position": -1},
    "no number of characters": {"max_chars": -1},
    "too many characters": {"max_chars": HUGE},
    "bias of an unknown character": {"sampling": SamplingSettings(logit_bias=((len(CHARSET), 1.0),))},
    "bias of a negative id": {"sampling": SamplingSettings(logit_bias=((-1, 1.0),))},
    "infinite bias": {"sampling": SamplingSettings(logit_bias=((1, float("inf")),))},
    "too many biases": {"sampling": SamplingSettings(logit_bias=((1, 1.0),) * 1025)},
    "temperature that is no number": {"sampling": SamplingSettings(temperature=float("nan"))},
    "negative temperature": {"sampling": SamplingSettings(temperature=-1.0)},
    "top_k above its limit": {"sampling": SamplingSettings(top_k=HUGE)},
    "infinite penalty": {"sampling": SamplingSettings(repetition_penalty=float("inf"))},
    "state of another shape": {"hidden": np.zeros((1, 63), np.float32)},
    "state of another dtype": {"hidden": np.zeros((1, 64))},
    "state that is no number": {"hidden": np.full((1, 64), np.nan, np.float32)},
    "infinite state": {"hidden": np.full((1, 64), np.inf, np.float32)},
    "state above 1": {"hidden": np.full((1, 64), 1.5, np.float32)},
    "automaton of another charset": {"automaton": with_stops(None, [np.array([0])], len(CHARSET) + 1)},
    "automaton that leaves its tables": {"automaton": replace(ANY, transitions=np.array([[1]], np.int32))},
    "automaton with a class that it lacks": {"automaton": replace(ANY, classes=ANY.classes + np.int32(1))},
    "automaton of other numbers": {"automaton": replace(ANY, transitions=np.array([[0]]))},
    "automaton with more classes than characters": {
        "automaton": replace(ANY, transitions=np.zeros((1, len(CHARSET) + 1), np.int32))
    },
    "completed before its end": {"num_left": 10},
    "unknown characters before it": {"generated": LONE, "sampling": SamplingSettings(presence_penalty=1.0)},
    "unknown characters in its history": {"history_prompt": LONE, "sampling": SamplingSettings(presence_penalty=1.0)},
    "negative number of alternatives": {"num_logprobs": -1},
    "negative number of next characters": {"num_next": -1},
    "checkpoint before it": {"checkpoint_positions": (0, 3)},
    "checkpoints that fall": {"checkpoint_positions": (3, 2)},
}


@pytest.mark.parametrize("fault", UNREPRESENTABLE)
def test_submit__refuses_a_request_that_no_row_can_represent(stepper: Stepper, fault: str) -> None:
    """On the caller's thread, whether the engine is idle or busy; other texts don't notice."""
    with running(stepper) as engine:
        for max_chars in (UNREPRESENTABLE[fault].get("max_chars", 30), 0):
            changes = UNREPRESENTABLE[fault] | ({"max_chars": max_chars} if "end" not in fault else {})
            if fault in ("no number of characters", "too many characters") and max_chars == 0:
                continue
            beside = engine.submit([request(max_chars=200)])[0]
            with pytest.raises(InvalidValue):
                engine.submit([request(), request(**changes)])
            assert beside.wait().position == 206
            with pytest.raises(InvalidValue):
                engine.submit([request(**changes)])
        for ids in (LONE, LONE - len(CHARSET) - 1, np.array([[1]]), np.array([1.0])):
            with pytest.raises(InvalidValue):
                engine.submit([Request(ids, 5, 0)])
        assert engine.num_open == 0
        assert engine.submit([request(max_chars=0)])[0].wait().position == 6


def test_engine__text_that_the_stepper_refuses_fails_alone(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a fault of ours lets a row pass that the stepper can't represent: neighbours get what they get alone."""
    bias = SamplingSettings(logit_bias=((len(CHARSET), 1.0),))
    make_row = Row.of

    def unchecked(request: Request, *arguments: Any) -> Row:
        row = make_row(request, *arguments)
        return changed(row, sampling=bias) if request.seed == 666 else row

    monkeypatch.setattr(Row, "of", unchecked)
    with running(stepper, max_running=4) as engine:
        expected = result(engine.submit([request(max_chars=300)])[0])
        for num_bad in (1, 2, 4):
            bad = [request(seed=666)] * num_bad
            handles = engine.submit([request(max_chars=300), *bad, request(max_chars=300)])
            for handle in handles[1:-1]:
                with pytest.raises(EngineFailed):
                    handle.wait()
                with pytest.raises(EngineFailed):
                    handle.read_whole()
            assert [result(handles[0]), result(handles[-1])] == [expected] * 2
        at_once = engine.submit([request(max_chars=0, num_next=1, seed=seed) for seed in (1, 666, 2)])
        with pytest.raises(EngineFailed):
            at_once[1].wait()
        assert [at_once[place].wait().position for place in (0, 2)] == [6, 6]
        engine.check()
        assert engine.num_open == 0
        assert result(engine.submit([request(max_chars=300)])[0]) == expected


def test_failed_engine__raises_a_new_exception_each_time() -> None:
    """One that is raised again gathers the tracebacks of all callers, and with them whatever their frames hold."""
    failing = _Failing(RuntimeError())
    with running(failing) as engine:
        handle = engine.submit([request()])[0]
        failing.open()
        ways: list[Callable[[], object]] = [handle.wait, handle.read_whole, engine.check]
        ways += [lambda: engine.submit([request()]), lambda: engine.submit([request(max_chars=0)])]
        for way in ways:
            raised = []
            for _ in range(3):
                with pytest.raises(EngineFailed) as caught:
                    way()
                raised.append(caught.value)
            assert len(set(map(id, raised))) == 3


def test_memory__of_all_open_texts_has_a_budget() -> None:
    """Engines share it. One client has half of it at most, and it is free again however a text ends."""
    memory, gate = SharedBudget(800_000), _Gate()
    prompt = CHARSET.encode("a" * 10_000)  # 80 KB, which continuations share
    long = [Request(prompt, 1, seed) for seed in range(20)]
    with running(gate, memory=memory, max_running=100) as engine, running(memory=memory) as other:
        first = engine.submit(long)
        used = memory.num_taken
        assert 80_000 < used < 150_000
        engine.submit([Request(CHARSET.encode("b" * 20_000), 1, 0)])
        for refusing in (engine, other):
            with pytest.raises(Overloaded):
                refusing.submit([Request(CHARSET.encode("c" * 20_000), 1, 0)])
        engine.submit([Request(CHARSET.encode("c" * 20_000), 1, 0, client="another one")])
        with pytest.raises(InvalidValue):
            engine.submit([Request(prompt, -1, 0)])
        assert other.submit([request()])[0].wait().position == 36
        other.submit([request(max_chars=0)])[0].wait()
        first[0].cancel()
        gate.open()
        for handle in first:
            handle.wait()
        wait_until(lambda: engine.num_open == 0)
        assert memory.num_taken == 0
        assert other.submit([Request(CHARSET.encode("d" * 45_000), 0, 0)])[0].wait().position == 45_000
        with pytest.raises(InvalidValue, match="400000"):
            other.submit([Request(CHARSET.encode("d" * 50_000), 0, 0)])
    gate = _Gate()
    with running(gate, memory=memory) as engine:
        engine.submit([request(max_chars=10_000)])
        assert gate.entered.acquire(timeout=60)
        gate.open()
        engine.close()
        assert memory.num_taken == 0


def choices(num: int, prompt: str = "ROMEO: what light is it " * 5, **changes: Any) -> list[Request]:
    """Requests for several choices of one prompt, as a completion makes them: with one array for all."""
    ids = CHARSET.encode(prompt)
    fields: dict[str, Any] = {"max_chars": 30, "checkpoint_positions": (7, len(ids), len(ids) + 9)} | changes
    return [Request(ids, seed=seed, **fields) for seed in range(num)]


CHOICES: list[dict[str, Any]] = [
    {},
    {"num_logprobs": 2, "score_prompt": True},
    {"num_logprobs": 0, "sampling": SamplingSettings(repetition_penalty=1.3, presence_penalty=0.2)},
    {"max_chars": 0, "num_next": 3},
    {"position": 50, "checkpoint_positions": (60,), "automaton": with_stops(None, [CHARSET.encode("e")], len(CHARSET))},
    {"prompt": ""},
    {"automaton": random_automaton(2, len(CHARSET)), "num_logprobs": 1},
    {"automaton": EMPTY, "num_next": 2},
]


@pytest.mark.parametrize("kind", CHOICES, ids=lambda kind: " ".join(kind) or "plain")
def test_choices__of_one_prompt_read_it_once_and_get_what_each_gets_alone(
    stepper: Stepper, kind: dict[str, Any]
) -> None:
    if not kind.get("prompt", "x"):
        kind = kind | {"checkpoint_positions": (9,)}
    requests = choices(5, **kind)
    with running(stepper) as engine:
        alone = [result(engine.submit([one])[0]) for one in requests]
        num_read, num_ends = engine.counters.num_read, engine.counters.prompt_chars.total
        assert [result(handle) for handle in engine.submit(requests)] == alone
        assert engine.counters.num_read == num_read + len(requests[0].prompt)
        if requests[0].max_chars:
            assert engine.counters.prompt_chars.total == num_ends + len(requests[0].prompt)
        assert engine.num_open == 0


def test_choices__that_are_cancelled_while_the_prompt_is_read_leave_with_its_state() -> None:
    """The others get all they asked for; when the last has left, the prompt is not read any further."""
    memory, gate = SharedBudget(10**6), _Gate()
    with running(gate, memory=memory) as engine:
        first, second, third = engine.submit(choices(3, prompt="the lady of the house " * 100, checkpoint_positions=()))
        assert gate.entered.acquire(timeout=60)
        second.cancel()
        gate.allowed.release()
        end = second.wait()
        assert end.reason == "cancelled"
        assert 0 < end.position < 2200
        read = CHARSET.encode("the lady of the house " * 100)[: end.position]
        first.cancel()
        gate.open()
        expected = engine.submit([Request(read, 0, 0)])[0].wait()
        assert expected.hidden.tobytes() == end.hidden.tobytes()
        assert first.wait().reason == "cancelled"
        assert third.wait().position == 2230
        assert (engine.num_open, memory.num_taken) == (0, 0)
        fourth, fifth = engine.submit(choices(2, prompt="a" * 10**4, checkpoint_positions=()))
        fourth.cancel()
        fifth.cancel()
        assert {fourth.wait().reason, fifth.wait().reason} == {"cancelled"}
        assert (engine.num_open, memory.num_taken) == (0, 0)


def test_choices__fail_together_when_their_prompt_can_not_be_read() -> None:
    memory, failing = SharedBudget(10**6), _Failing(InvalidRows({}))
    with running(failing, memory=memory) as engine:

        def refuse(rows: Sequence[Row], num_chars: int) -> Steps:
            if any(row.is_reading for row in rows):
                raise InvalidRows({row: ValueError() for row in rows if row.is_reading})
            return STEPPER.advance(rows, num_chars)

        failing.advance = refuse  # type: ignore[method-assign]
        for handle in engine.submit(choices(3)):
            with pytest.raises(EngineFailed):
                handle.wait()
        assert len(result(engine.submit([request("")])[0])[0]) == 30
        assert (engine.num_open, memory.num_taken) == (0, 0)


def test_choices__take_the_place_of_their_prompt_before_texts_that_were_submitted_later() -> None:
    order: list[int] = []

    class Noting(_Gate):
        def advance(self, rows: Sequence[Row], num_chars: int) -> Steps:
            order.extend(row.request.seed for row in rows if not row.is_reading and row.request.seed not in order)
            return super().advance(rows, num_chars)

    gate = Noting()
    with running(gate, max_running=1) as engine:
        handles = engine.submit(choices(3, max_chars=2, checkpoint_positions=()))
        handles += engine.submit([request("", seed=9)])
        gate.open()
        for handle in handles:
            handle.wait()
    assert order == [0, 1, 2, 9]


def test_choices__a_snapshot_while_the_prompt_is_read_is_the_state_of_the_reading() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handle = engine.submit(choices(2, prompt="the lady " * 100, checkpoint_positions=()))[1]
        handle.request_snapshot()
        gate.allowed.release()
        wait_until(lambda: handle.snapshot is not None)
        snapshot = handle.snapshot
        gate.open()
        assert snapshot is not None
        assert 0 < snapshot.position < 900
        read = CHARSET.encode("the lady " * 100)[: snapshot.position]
        assert engine.submit([Request(read, 0, 0)])[0].wait().hidden.tobytes() == snapshot.hidden.tobytes()


def test_submit__several_short_texts_are_stepped_by_the_caller_and_more_are_not(stepper: Stepper) -> None:
    """Candidates for scoring: also with one prompt, and the state is that of a text that is read alone."""
    texts = ["ROMEO"[:length] for length in range(1, 6)] * 20
    with running(stepper, max_running=256) as engine:
        before = threading.active_count()
        handles = engine.submit([request(text, 0, num_logprobs=0, score_prompt=True) for text in texts])
        assert all(handle.end is not None for handle in handles)
        assert threading.active_count() == before
        expected = {
            text: result(engine.submit([request(text, 0, num_logprobs=0, score_prompt=True)])[0]) for text in texts
        }
        assert [result(handle) for handle in handles] == [expected[text] for text in texts]
        assert engine._thread is None
        for many in ([request("a", 0)] * 129, [request("a" * 32, 0) for _ in range(65)], [request("a" * 33, 0)]):
            handles = engine.submit(many)
            assert [handle.wait().position for handle in handles] == [len(one.prompt) for one in many]
            assert engine._thread is not None


def test_read__gives_the_last_characters_and_the_end_together() -> None:
    """However the reader and the engine interleave: no character arrives after the end."""
    with running(max_running=64) as engine:
        for seed in range(60):
            handle = engine.submit([request(max_chars=40, seed=seed)])[0]
            chars, end = 0, None
            while end is None:
                part, end = handle.read(0.0, 5)
                chars += len(part.chars)
            assert chars == 40


def test_memory__of_an_automaton_counts_once_in_a_submission() -> None:
    size, none = 10_000, np.zeros(10_000, np.int32)
    ring = (np.arange(size, dtype=np.int32)[:, None] + 1) % size
    large = Automaton(np.zeros(len(CHARSET), np.int32), ring, none, none, none)
    assert large.num_bytes > 200_000
    memory, gate = SharedBudget(2_000_000), _Gate()
    with running(gate, memory=memory, max_running=100) as engine:
        handles = engine.submit([request(automaton=large, seed=seed) for seed in range(20)])
        assert large.num_bytes < memory.num_taken < large.num_bytes + 100_000
        handles += engine.submit([request(automaton=large)])
        assert memory.num_taken > 2 * large.num_bytes
        with pytest.raises(InvalidValue, match="memory"):
            engine.submit([request(automaton=replace(large)) for _ in range(10)])
        gate.open()
        for handle in handles:
            handle.wait()
        assert memory.num_taken == 0


def test_read__says_how_many_characters_may_belong_to_a_stop_string() -> None:
    """With every result, also an empty one, and before the first one of a run that another request began."""
    with running() as engine:
        whole = np.array(result(engine.submit([request(max_chars=30)])[0])[0], np.int64)
        stop = np.append(whole[27:30], (whole[29] + 1) % len(CHARSET))
        automaton = with_stops(None, [stop], len(CHARSET))
        assert automaton is not None
        handle = engine.submit([request(max_chars=30, automaton=automaton)])[0]
        expected = int(automaton.withheld[automaton.walk(0, whole)])
        assert expected == 3
        for update in (handle.read_whole(), handle.read(0.0)):
            assert update.result.num_withheld == expected
        resumed = engine.submit([request("", 5, automaton=automaton, generated=whole)])[0]
        assert resumed.num_withheld_before == expected
        stopped = with_stops(None, [whole[27:30], whole[28:30]], len(CHARSET))
        end = engine.submit([request(max_chars=40, automaton=stopped, min_chars=29)])[0].wait()
        assert (end.reason, end.position, end.num_stop_chars) == ("stop", 36, 3)


def test_submit__is_refused_while_the_system_refuses_a_thread_and_works_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container at its limit of processes: nothing of the refused text is left."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with running(max_running=1, max_waiting=0) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(EngineFailed, match="limit of processes"):
                engine.submit([request()])
        assert engine.num_open == 0
        (handle,) = engine.submit([request()])
        assert len(result(handle)[0]) == 30
