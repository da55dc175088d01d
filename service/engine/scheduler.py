"""Which texts are in the batch. Plain Python: no arrays, no threads, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Text = TypeVar("Text")


class Scheduler(Generic[Text]):
    """Admits texts to the batch, first come, first served. Texts may join and leave at any character."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running  # texts in the batch at most
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []

    @property
    def has_work(self) -> bool:
        """Whether a text is running or waiting."""
        return bool(self.running or self.waiting)

    def add(self, texts: Iterable[Text]) -> None:
        """Append texts to the waiting queue, in their order."""
        self.waiting.extend(texts)

    def admit(self) -> list[Text]:
        """Move waiting texts to the free places of the batch, the oldest first. Return those moved."""
        admitted = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.max_running - len(self.running)))]
        self.running.extend(admitted)
        return admitted

    def remove(self, texts: Iterable[Text]) -> None:
        """Remove running or waiting texts. The others keep their order."""
        removed = set(map(id, texts))
        if removed:
            self.running = [text for text in self.running if id(text) not in removed]
            self.waiting = deque(text for text in self.waiting if id(text) not in removed)
