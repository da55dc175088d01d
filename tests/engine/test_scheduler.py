"""Who is in the batch: first come, first served, at most so many, nobody lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.scheduler import Scheduler


class _Text:
    def __init__(self, number: int) -> None:
        self.number = number


class Scheduling(RuleBasedStateMachine):
    """Texts come and go at random; a list of who is there is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[_Text] = Scheduler(max_running=3)
        self.there: list[_Text] = []
        self.num_added = 0

    @rule(count=st.integers(0, 5))
    def add(self, count: int) -> None:
        texts = [_Text(self.num_added + index) for index in range(count)]
        self.num_added += count
        self.scheduler.add(texts)
        self.there += texts

    @rule()
    def admit(self) -> None:
        before = list(self.scheduler.running)
        admitted = self.scheduler.admit()
        assert self.scheduler.running == before + admitted
        assert len(self.scheduler.running) == min(3, len(self.there))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(self.there), max_size=3))
        self.scheduler.remove(gone)
        self.there = [text for text in self.there if text not in gone]

    @invariant()
    def nobody_is_lost_doubled_or_overtaken(self) -> None:
        order = [text.number for text in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == [text.number for text in self.there] == sorted(order)
        assert len(self.scheduler.running) <= 3
        assert self.scheduler.has_work == bool(self.there)


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
