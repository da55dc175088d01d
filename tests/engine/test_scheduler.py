"""The scheduler: first come, first served, never more than max_running, and no text is lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.scheduler import Scheduler


class _Text:
    def __init__(self, number: int) -> None:
        self.number = number


class SchedulerMachine(RuleBasedStateMachine):
    """Adds and removes texts at random. The model is a list of the texts in the scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[_Text] = Scheduler(max_running=3)
        self.present: list[_Text] = []
        self.num_added = 0

    @rule(count=st.integers(0, 5))
    def add(self, count: int) -> None:
        texts = [_Text(self.num_added + index) for index in range(count)]
        self.num_added += count
        self.scheduler.add(texts)
        self.present += texts

    @rule()
    def admit(self) -> None:
        before = list(self.scheduler.running)
        admitted = self.scheduler.admit()
        assert self.scheduler.running == before + admitted
        assert len(self.scheduler.running) == min(3, len(self.present))

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        removed = data.draw(st.lists(st.sampled_from(self.present), max_size=3))
        self.scheduler.remove(removed)
        self.present = [text for text in self.present if text not in removed]

    @invariant()
    def no_text_is_lost_duplicated_or_overtaken(self) -> None:
        order = [text.number for text in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == [text.number for text in self.present] == sorted(order)
        assert len(self.scheduler.running) <= 3
        assert self.scheduler.has_work == bool(self.present)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
