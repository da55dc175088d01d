"""How many requests may hold a thread while the engine works for them."""

from __future__ import annotations

import threading
from types import TracebackType

from service.errors import Overloaded


class Places:
    """So many, shared by everything that waits for an engine: what is left of the threads answers the rest."""

    def __init__(self, num_places: int) -> None:
        self._semaphore = threading.BoundedSemaphore(num_places)

    def take(self) -> None:
        """Raises Overloaded if there is none."""
        if not self._semaphore.acquire(blocking=False):
            raise Overloaded("the server is answering as many requests as it can: try again in a second")

    def give_back(self) -> None:
        """To be called once for each that was taken."""
        self._semaphore.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()
