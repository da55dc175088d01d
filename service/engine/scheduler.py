"""Who is in the batch. Plain Python: no numbers, no threads, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Text = TypeVar("Text")


class Scheduler(Generic[Text]):
    """Texts come in, wait their turn, run, and leave; first come, first served, at any character.

    max_running: how many are stepped side by side.
    """

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []

    @property
    def has_work(self) -> bool:
        """Somebody runs or waits."""
        return bool(self.running or self.waiting)

    def add(self, texts: Iterable[Text]) -> None:
        """Let texts wait, in this order, behind those that wait already."""
        self.waiting.extend(texts)

    def admit(self) -> list[Text]:
        """Fill the free places with those that wait longest; who they are."""
        admitted = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.max_running - len(self.running)))]
        self.running.extend(admitted)
        return admitted

    def remove(self, texts: Iterable[Text]) -> None:
        """Forget these, wherever they are; the others keep their order."""
        gone = set(map(id, texts))
        if gone:
            self.running = [text for text in self.running if id(text) not in gone]
            self.waiting = deque(text for text in self.waiting if id(text) not in gone)
