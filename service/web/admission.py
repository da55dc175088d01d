"""How many requests may hold a thread while the engine works for them, and how many streams one caller may have."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from service.errors import Overloaded, TooManyStreams


class AdmissionLimit:
    """So many, shared by everything that waits for an engine: what is left of the threads answers the rest.

    max_streams: of one caller at a time; 0: as many as there are places.
    """

    def __init__(self, num_places: int, max_streams: int = 0) -> None:
        self._semaphore = threading.BoundedSemaphore(num_places)
        self._max_streams = max_streams
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the streams

    def acquire(self, stream_key: str | None = None) -> None:
        """stream_key: whose stream it is for, if it is for one. Raises Overloaded, TooManyStreams."""
        if not self._semaphore.acquire(blocking=False):
            raise Overloaded("the server is answering as many requests as it can: try again in a second")
        if stream_key is None:
            return
        with self._lock:
            if not self._max_streams or self._streams[stream_key] < self._max_streams:
                self._streams[stream_key] += 1
                return
        self._semaphore.release()
        raise TooManyStreams(f"{self._max_streams} streams are open already: close one, or wait until one has ended")

    def release(self, stream_key: str | None = None) -> None:
        """To be called once for each that was taken, with the same stream_key."""
        if stream_key is not None:
            with self._lock:
                self._streams[stream_key] -= 1
                if not self._streams[stream_key]:
                    del self._streams[stream_key]
        self._semaphore.release()

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        with self._lock:
            return self._streams.total()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
