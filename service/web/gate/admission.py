"""Admission: limits on the requests that wait for an engine, and on the streams of one client."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded, TooManyStreams


class AdmissionLimit:
    """Limits the requests that hold a thread while they wait for an engine, so that some threads stay free.

    `admit` is the only way in, and its block the only way out. A stream outlives the code that began it, so its answer
    takes the block over (`EventStream`). Any thread may use it.
    """

    def __init__(self, max_requests: int, max_streams_per_client: int = 0) -> None:
        """Admit `max_requests` at the same time, streams included. `max_streams_per_client` 0 sets no limit."""
        self._semaphore = threading.BoundedSemaphore(max_requests)
        self._max_streams_per_client = max_streams_per_client
        self._streams: Counter[str] = Counter()  # open streams of each client key
        self._lock = threading.Lock()  # guards _streams

    @contextmanager
    def admit(self, streaming_client: str | None = None) -> Iterator[None]:
        """Admit a request for as long as the block lasts, or refuse it at once.

        Args:
            streaming_client: Client key that the stream counts against. None if the request is not a stream.

        Raises:
            Overloaded: Too many requests are admitted already.
            TooManyStreams: The client has too many open streams.
        """
        if not self._semaphore.acquire(blocking=False):
            raise Overloaded("the server is handling as many requests as it can: try again in a second")
        try:
            if streaming_client is None:
                yield
            else:
                with self._counted(streaming_client):
                    yield
        finally:
            self._semaphore.release()

    @contextmanager
    def _counted(self, streaming_client: str) -> Iterator[None]:
        """Count an open stream of a client during the block. Raises TooManyStreams."""
        limit = self._max_streams_per_client
        with self._lock:
            if limit and self._streams[streaming_client] >= limit:
                raise TooManyStreams(
                    f"you have {limit} open streams, which is the limit: close a stream, or wait until one ends"
                )
            self._streams[streaming_client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[streaming_client] -= 1
                if not self._streams[streaming_client]:
                    del self._streams[streaming_client]

    @property
    def num_streams(self) -> int:
        """Open streams of all clients."""
        with self._lock:
            return self._streams.total()
