"""The scheduler: clients share the time, each client's texts keep their order, and no text is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.scheduler import Scheduler

ROW_S = 1e-4  # what a text adds to a tick in these tests


class _Text:
    def __init__(self, number: int, client: str = "") -> None:
        self.number, self.client = number, client


def scheduler_with(max_running: int = 256, **num_texts: int) -> Scheduler[_Text]:
    """Return a scheduler with this many texts of each client."""
    scheduler: Scheduler[_Text] = Scheduler(max_running)
    for client, count in num_texts.items():
        scheduler.add([_Text(number, client) for number in range(count)])
    return scheduler


def test_replace__others_take_the_place_and_their_turn_is_before_those_that_wait() -> None:
    scheduler = scheduler_with(2, a=4, b=1)
    first = next(text for text in scheduler.choose(3) if text.client == "a")
    others = [_Text(number, "a") for number in (10, 11, 12)]
    scheduler.replace(first, others)
    assert first not in (*scheduler.running, *scheduler.waiting)
    assert [text.number for text in scheduler.waiting if text.client == "a"] == [10, 11, 12, 2, 3]
    chosen = [text for text in scheduler.choose(4) if text.client == "a"]
    assert others[0] in scheduler.running
    assert len(chosen) >= 1
    scheduler.remove([*scheduler.running, *scheduler.waiting])
    assert not scheduler.has_work


def clients(texts: Iterable[_Text]) -> dict[str, int]:
    """Return how many of the texts each client has."""
    return dict(Counter(text.client for text in texts))


def used_s(scheduler: Scheduler[_Text], num_ticks: int, num_texts: int = 64) -> dict[str, float]:
    """Return the time of each client in a number of ticks: its part of each one, by its texts."""
    used: Counter[str] = Counter()
    for _ in range(num_ticks):
        chosen = scheduler.choose(num_texts)
        assert chosen
        scheduler.charge(len(chosen) * ROW_S)
        for client, count in clients(chosen).items():
            used[client] += count * ROW_S  # type: ignore[assignment]
    return dict(used)


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, advances and removes texts of some clients at random. The model is a list of the texts in the scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[_Text] = Scheduler(max_running=3)
        self.present: list[_Text] = []
        self.advanced: set[_Text] = set()
        self.num_added = 0

    @rule(count=st.integers(0, 5), client=st.sampled_from("abc"))
    def add(self, count: int, client: str) -> None:
        texts = [_Text(self.num_added + index, client) for index in range(count)]
        self.num_added += count
        self.scheduler.add(texts)
        self.present += texts

    @rule(num_texts=st.integers(1, 4), duration_s=st.floats(0, 0.1))
    def tick(self, num_texts: int, duration_s: float) -> None:
        chosen = self.scheduler.choose(num_texts)
        assert len(set(chosen)) == len(chosen) <= 3
        assert bool(chosen) == bool(self.present)
        self.scheduler.charge(duration_s)
        self.advanced |= set(chosen)
        for client in "abc":  # a text begins only when those before it have ended, or have a place beside it
            places = [text in self.advanced for text in self.present if text.client == client]
            assert not any(places[3:])

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        removed = data.draw(st.lists(st.sampled_from(self.present), max_size=3))
        self.scheduler.remove(removed)
        self.present = [text for text in self.present if text not in removed]
        self.advanced -= set(removed)

    @invariant()
    def no_text_is_lost_duplicated_or_overtaken(self) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert sorted(text.number for text in running + waiting) == [text.number for text in self.present]
        assert self.scheduler.has_work == bool(self.present)
        assert self.scheduler.num_clients == len({text.client for text in self.present})
        assert self.scheduler.num_running == len(running)
        for client in "abc":
            own = [text.number for text in waiting if text.client == client]
            assert own == sorted(own)
            assert all(text.number < min(own, default=text.number + 1) for text in running if text.client == client)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=30)


def test_choose__one_client_has_the_whole_batch() -> None:
    scheduler = scheduler_with(4, a=6)
    for _ in range(3):
        assert [text.number for text in scheduler.choose(4)] == [0, 1, 2, 3]
        scheduler.charge(1.0)
    scheduler.remove(scheduler.running[:1])
    assert [text.number for text in scheduler.choose(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("num_others", [1, 5, 100])
def test_choose__a_client_with_many_texts_gets_no_more_time_than_others(num_others: int) -> None:
    scheduler = scheduler_with(greedy=256, **{f"other{number}": 1 for number in range(num_others)})
    used = used_s(scheduler, 3000)
    fair = sum(used.values()) / (num_others + 1)
    assert all(0.9 * fair < share < 1.1 * fair for share in used.values()), used


def test_choose__a_newcomer_is_in_the_next_tick_and_has_no_credit() -> None:
    scheduler = scheduler_with(a=256)
    used_s(scheduler, 1000)
    scheduler.add([_Text(0, "b")])
    assert clients(scheduler.choose(64)) == {"a": 63, "b": 1}
    used = used_s(scheduler, 1000)
    assert used["a"] == pytest.approx(used["b"], rel=0.1)


def test_choose__clients_with_equal_shares_are_advanced_together() -> None:
    scheduler = scheduler_with(a=20, b=20, c=20)
    for _ in range(10):
        assert clients(scheduler.choose(64)) == {"a": 20, "b": 20, "c": 20}
        scheduler.charge(0.005)


def test_choose__texts_that_do_not_fit_take_turns() -> None:
    scheduler = scheduler_with(a=100, b=100)
    seen: Counter[_Text] = Counter()
    for _ in range(100):
        chosen = scheduler.choose(50)
        assert clients(chosen) == {"a": 25, "b": 25}
        scheduler.charge(0.005)
        seen.update(chosen)
    assert set(seen.values()) == {25}
    assert len(seen) == 200


def test_choose__more_clients_than_texts_fit_take_turns() -> None:
    scheduler = scheduler_with(4, **{f"c{number}": 2 for number in range(10)})
    used = used_s(scheduler, 500, 4)
    assert len(used) == 10
    assert max(used.values()) < 1.3 * min(used.values())


def test_remove__a_client_without_texts_leaves_nothing_behind() -> None:
    scheduler = scheduler_with(a=3)
    for number in range(1000):
        scheduler.add([_Text(number, f"stranger{number}")])
        scheduler.remove([text for text in scheduler.waiting if text.client != "a"])
    assert scheduler.num_clients == 1
