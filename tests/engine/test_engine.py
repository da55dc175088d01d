"""The engine: everybody gets what they would get alone; overload, cancellation, failure and stalls reach everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from service.engine.engine import Engine
from service.engine.native.binding import variants
from service.engine.native.native_stepper import NativeStepper
from service.engine.pace import Pace
from service.engine.request import End, Handle, Request
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import Row, Stepper, StepResult
from service.engine.torch_stepper import TorchStepper
from service.errors import EngineFailed, Overloaded
from tests.harness.rows import CHARSET, quantized

STEPPER = TorchStepper(quantized())
STEPPERS: dict[str, Callable[[], Stepper]] = {"torch": lambda: STEPPER}
if variants():
    STEPPERS["native"] = lambda: NativeStepper(quantized())
    STEPPERS["native, two threads"] = lambda: NativeStepper(quantized(), 2, always_together=True)


@pytest.fixture(params=STEPPERS, scope="module")
def stepper(request: pytest.FixtureRequest) -> Stepper:
    """What the engine does while others come and go is tried with each."""
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
    """All that a request brings, comparable to the bit. Waits for its end."""
    chars, scores = [], []
    while True:
        end = handle.end
        part = handle.read(0.0, 10)
        if part is not None:
            chars += part.chars.tolist()
            for some in (part.prompt_scores, part.scores):
                if some is not None:
                    scores.append(some.chosen.tobytes())
        elif end is not None:
            kept = [(position, hidden.tobytes()) for position, hidden in end.checkpoints.items()]
            return [chars, b"".join(scores), end.reason, end.position, end.hidden.tobytes(), kept]


KINDS: list[tuple[str, int, dict[str, Any]]] = [
    ("ROMEO:", 40, {"checkpoint_positions": (6, 30, 60)}),
    ("", 25, {"sampling": SamplingSettings(temperature=0.6)}),
    ("the lady of the house " * 6, 3, {"num_logprobs": 2, "score_prompt": True}),
    ("I", 60, {"sampling": SamplingSettings(top_k=4, repetition_penalty=1.2), "num_logprobs": 0}),
    ("a", 50, {"stops": (CHARSET.encode("e"),)}),
    ("b", 0, {}),
]
REQUESTS = [request(prompt, max_chars, seed, **changes) for seed, (prompt, max_chars, changes) in enumerate(KINDS)]


@pytest.fixture(scope="module")
def alone() -> list[list[Any]]:
    """By torch: the other steppers have to give the same."""
    with running(max_running=1) as engine:
        return [result(engine.submit([request])[0]) for request in REQUESTS]


def test_everybody_gets_what_they_get_alone_however_they_come_and_go(stepper: Stepper, alone: list[list[Any]]) -> None:
    """Needles in a crowd: hundreds of texts join and leave at random moments, submitted by many threads."""
    wrong: list[int] = []

    def submit_some(seed: int, engine: Engine) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
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
            deadline = time.monotonic() + 10  # cancelled ones leave at the next tick
            while engine.num_open and time.monotonic() < deadline:
                time.sleep(0.001)
            assert engine.num_open == 0
    assert wrong == []


def test_a_request_goes_on_from_a_state(stepper: Stepper, alone: list[list[Any]]) -> None:
    with running(stepper) as engine:
        prompt = engine.submit([request(max_chars=0)])[0].wait()
        assert alone[0][5][0] == (6, prompt.hidden.tobytes())
        rest = request("", 40, seed=0, hidden=prompt.hidden, position=prompt.position)
        assert result(engine.submit([rest])[0])[:5] == alone[0][:5]
        assert alone[0][5][0] == (6, prompt.hidden.tobytes())  # which was copied, not used up


@pytest.mark.parametrize("cut", [1, 17, 29])
def test_a_run_that_is_cut_goes_on_with_what_it_generated(stepper: Stepper, cut: int) -> None:
    """Penalties count it, and a stop string may lie on both sides of the cut."""
    sampling = SamplingSettings(repetition_penalty=1.3, frequency_penalty=0.4)
    how: dict[str, Any] = {"sampling": sampling, "history_prompt": CHARSET.encode("ROMEO:")}
    with running(stepper) as engine:
        whole = result(engine.submit([request("ROMEO:", 40, **how)])[0])
        chars = np.array(whole[0], np.int64)
        stop = chars[cut - 1 : cut + 1]
        first = engine.submit([request("ROMEO:", cut, **how)])[0].wait()
        rest: dict[str, Any] = {"hidden": first.hidden, "position": first.position, "generated": chars[:cut]} | how
        assert result(engine.submit([request("", 40 - cut, **rest)])[0])[0] == whole[0][cut:]
        assert result(engine.submit([request("", 40 - cut, stops=(stop,), **rest)])[0])[0] == whole[0][cut : cut + 1]


class _Gate:
    """A stepper that waits for leave before every tick."""

    def __init__(self, stepper: Stepper = STEPPER) -> None:
        self.stepper = stepper
        self.entered, self.leave = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        self.entered.release()
        assert self.leave.acquire(timeout=20)
        return self.stepper.advance(rows, num_chars)

    def initial_hidden(self) -> Any:
        return self.stepper.initial_hidden()

    def open(self) -> None:
        self.leave.release(10_000)


def test_overload_is_refused_at_once_and_whole() -> None:
    gate = _Gate()
    with running(gate, max_running=2, max_waiting=3) as engine:
        handles = engine.submit([request()])
        assert gate.entered.acquire(timeout=10)
        handles += engine.submit([request()] * 3)
        with pytest.raises(Overloaded):
            engine.submit([request()] * 2)
        handles += engine.submit([request()])
        with pytest.raises(Overloaded):
            engine.submit([request()])
        gate.open()
        assert len({tuple(result(handle)[0]) for handle in handles}) == 1
        assert len(result(engine.submit([request()])[0])[0]) == 30


def test_a_place_is_free_before_anybody_hears_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes back as soon as a text is over is not to be refused."""
    open_at_end: list[int] = []
    publish = Handle.publish

    def note(handle: Handle, part: StepResult | None, end: End | None) -> None:
        if end is not None:
            open_at_end.append(engine.num_open)
        publish(handle, part, end)

    monkeypatch.setattr(Handle, "publish", note)
    with running(max_running=1, max_waiting=0) as engine:
        engine.submit([request()])[0].wait()
        handle = engine.submit([request(max_chars=100_000)])[0]
        handle.cancel()
        handle.wait()
    assert open_at_end == [0, 0]


def test_what_follows_an_ended_text_is_not_refused_for_lack_of_a_place() -> None:
    gate = _Gate()
    with running(gate, max_running=1, max_waiting=0) as engine:
        running_text = engine.submit([request()])[0]
        with pytest.raises(Overloaded):
            engine.submit([request()])
        following = engine.submit([request(max_chars=0)], already_admitted=True)[0]
        gate.open()
        assert running_text.wait().position == following.wait().position + 30


def test_a_few_characters_are_read_at_once_by_who_asks_if_nothing_else_is_going_on(stepper: Stepper) -> None:
    """And beside others, and in any number of threads: it makes no difference but in time."""
    short, long = request("ROMEO", 0, checkpoint_positions=(2, 5), num_next=3), request("ROMEO" * 7, 0)
    with running(stepper) as engine:
        before = threading.active_count()
        alone = engine.submit([short])[0]
        assert alone.end is not None
        assert threading.active_count() == before  # the engine's thread has not even begun
        assert alone.end.next is not None
        assert len(alone.end.next.ids) == 3
        expected = result(alone)
        engine.submit([long])[0].wait()
        running_text = engine.submit([request(max_chars=3000)])[0]
        beside = engine.submit([short])[0]
        assert result(beside) == expected
        running_text.cancel()
        found: list[list[Any]] = []

        def ask() -> None:
            found.extend(result(engine.submit([short])[0]) for _ in range(50))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 300


def test_what_fails_at_once_fails_for_everybody(stepper: Stepper) -> None:
    class Failing(_Gate):
        def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
            if len(rows[0].prompt) == 1:
                raise MemoryError
            return self.stepper.advance(rows, num_chars)

    with running(Failing(stepper)) as engine:
        engine.submit([request(max_chars=5)])[0].wait()  # its thread is there
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


def test_first_come_first_served() -> None:
    order: list[int] = []

    class Noting(_Gate):
        def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
            order.extend(row.seed for row in rows if row.seed not in order)
            return super().advance(rows, num_chars)

    gate = Noting()
    with running(gate, max_running=1) as engine:
        handles = [engine.submit([request(seed=seed, max_chars=2)])[0] for seed in range(5)]
        gate.open()
        for handle in handles:
            handle.wait()
    assert order == list(range(5))


@pytest.mark.parametrize("moment", ["waiting", "running"])
def test_a_cancelled_text_leaves_at_the_next_tick_and_says_where_it_stands(moment: str) -> None:
    gate = _Gate()
    with running(gate, max_running=1) as engine:
        first, second = engine.submit([request(max_chars=100_000), request()])
        assert gate.entered.acquire(timeout=10)
        (first if moment == "running" else second).cancel()
        if moment == "waiting":
            gate.leave.release()
            assert gate.entered.acquire(timeout=10)
            gate.leave.release()
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

    def advance(self, rows: Sequence[Row], num_chars: int) -> list[StepResult]:
        self.entered.release()
        assert self.leave.acquire(timeout=20)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), MemoryError(), SystemExit()], ids=repr)
def test_when_the_stepper_fails_nobody_waits_for_ever(error: BaseException) -> None:
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
        ways += [lambda handle: handle.read(None), Handle.wait, Handle.wait]
        threads = [threading.Thread(target=wait, args=pair) for pair in zip(handles, ways, strict=True)]
        for thread in threads:
            thread.start()
        failing.open()
        for thread in threads:
            thread.join(10)
        assert len(caught) == 5
        assert "out of luck" not in str(caught[0])
        with pytest.raises(EngineFailed):
            engine.check()
        with pytest.raises(EngineFailed):
            engine.submit([request()])


def test_a_wedged_step_is_noticed_by_those_who_wait_and_by_the_readiness_check() -> None:
    gate, now = _Gate(), [0.0]
    with running(gate, stall_s=5, clock=lambda: now[0]) as engine:
        handle = engine.submit([request()])[0]
        assert gate.entered.acquire(timeout=10)
        engine.check()
        now[0] = 6.0
        with pytest.raises(EngineFailed):
            engine.check()
        with pytest.raises(EngineFailed):
            handle.wait()
        with pytest.raises(EngineFailed):
            engine.submit([request()])
        gate.open()
        deadline = time.monotonic() + 10
        while handle.end is None and time.monotonic() < deadline:  # it comes round: so does everybody else
            time.sleep(0.001)
        engine.check()
        assert len(result(handle)[0]) == 30


def test_closing_fails_what_is_open_so_that_nothing_looks_complete() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handles = engine.submit([request(max_chars=100_000)] * 10)
        assert gate.entered.acquire(timeout=10)
        gate.open()
        engine.close()
        for handle in handles:
            with pytest.raises(EngineFailed):
                handle.wait()
            with pytest.raises(EngineFailed):
                handle.read(None)
        assert engine.num_open == 0
        with pytest.raises(EngineFailed):
            engine.submit([request()])


def test_a_retired_engine_ends_its_thread_when_idle_and_still_serves_who_holds_it() -> None:
    with running() as engine:
        handle = engine.submit([request()])[0]
        engine.retire()
        first = result(handle)
        for _ in range(3):
            deadline = time.monotonic() + 10
            while engine._thread is not None and time.monotonic() < deadline:
                time.sleep(0.001)
            assert engine._thread is None
            assert result(engine.submit([request()])[0]) == first


def test_a_text_that_comes_as_a_retired_engines_thread_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the thread's last look and its end there is room for a new text, with a thread of its own."""
    late: list[Handle] = []
    with running() as engine:
        take_in = engine._wait_for_work

        def submit_as_it_ends() -> bool:
            goes_on = take_in()
            if not goes_on and not late:
                late.extend(engine.submit([request(max_chars=5000)]))
            return goes_on

        monkeypatch.setattr(engine, "_wait_for_work", submit_as_it_ends)
        engine.retire()
        engine.submit([request()])[0].wait()
        deadline = time.monotonic() + 10
        while not late and time.monotonic() < deadline:
            time.sleep(0.001)
        assert late[0].wait().reason == "length"


def test_a_taker_is_given_everything_once_in_order() -> None:
    with running() as engine:
        whole = result(engine.submit([request(max_chars=3000)])[0])[0]
        handle = engine.submit([request(max_chars=3000)])[0]
        parts: list[int] = []
        while handle.end is None:
            part = handle.read(0.001, 1)
            parts += [] if part is None else part.chars.tolist()
        rest = handle.read(0.0)
        assert parts + ([] if rest is None else rest.chars.tolist()) == whole
        assert handle.read(0.0) is None
        assert handle.read(None) is None


def test_nothing_comes_of_an_impatient_taker() -> None:
    gate = _Gate()
    with running(gate) as engine:
        handle = engine.submit([request()])[0]
        assert handle.read(0.0, 0.01) is None
        assert handle.read(None, 0.01) is None
        gate.open()
        assert handle.read(None) is not None


def test_ticks_are_kept_to_their_length() -> None:
    pace = Pace(tick_s=0.004)
    for _ in range(50):
        pace.measured(1, pace.num_chars(1), pace.num_chars(1) * 100e-6)
    assert 35 <= pace.num_chars(1) <= 40
    assert pace.num_chars(64) == 4  # the least; a batch that has grown is not trusted to share anything
    for _ in range(50):
        pace.measured(64, pace.num_chars(64), pace.num_chars(64) * 0.5e-3)
    assert 7 <= pace.num_chars(64) <= 9
    pace.measured(256, 1, 1.0)
    assert pace.num_chars(256) == 4
    pace.measured(1, 1, 1e-9)
    assert pace.num_chars(1) == 256
