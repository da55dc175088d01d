"""Limits how many requests read the model store at the same time.

A network file system may hang for as long as its server is silent, and with it each thread that reads a file. Without
a limit, requests for models that are not in memory would use up the threads that answer all others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded

_MAX_READING = 8
_WAIT_S = 1.0


class StoreReads:
    """Places for requests that read what the model store lists. Loading has places of its own: see `LoadedModels`."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(_MAX_READING)
        self._here = threading.local()  # whether this thread has a place

    @contextmanager
    def place(self) -> Iterator[None]:
        """Have a place during the block; blocks within it share the place. Raises Overloaded after `_WAIT_S`."""
        if getattr(self._here, "is_reading", False):
            yield
            return
        if not self._places.acquire(timeout=_WAIT_S):
            raise Overloaded("the model store answers too slowly: try again in a second, or check its file system")
        self._here.is_reading = True
        try:
            yield
        finally:
            self._here.is_reading = False
            self._places.release()
