"""Admission: limits on the requests that wait for an engine, and on the streams of one client."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from service.errors import Overloaded, TooManyStreams


class AdmissionLimit:
    """Limits the requests that hold a thread while they wait for an engine, so that some threads stay free.

    As a context manager it admits one request that is not a stream. Any thread may use it.
    """

    def __init__(self, max_requests: int, max_streams_per_client: int = 0) -> None:
        """Admit `max_requests` at the same time, streams included. `max_streams_per_client` 0 sets no limit."""
        self._semaphore = threading.BoundedSemaphore(max_requests)
        self._max_streams_per_client = max_streams_per_client
        self._streams: Counter[str] = Counter()  # open streams of each client key
        self._lock = threading.Lock()  # guards _streams

    def acquire(self, streaming_client: str | None = None) -> None:
        """Admit a request, or refuse it at once.

        Args:
            streaming_client: Client key that the stream counts against. None if the request is not a stream.

        Raises:
            Overloaded: Too many requests are admitted already.
            TooManyStreams: The client has too many open streams.
        """
        if not self._semaphore.acquire(blocking=False):
            raise Overloaded("the server is handling as many requests as it can: try again in a second")
        if streaming_client is None:
            return
        limit = self._max_streams_per_client
        with self._lock:
            if not limit or self._streams[streaming_client] < limit:
                self._streams[streaming_client] += 1
                return
        self._semaphore.release()
        raise TooManyStreams(
            f"you have {limit} open streams, which is the limit: close a stream, or wait until one ends"
        )

    def release(self, streaming_client: str | None = None) -> None:
        """Undo one successful `acquire`, which was called with the same `streaming_client`."""
        if streaming_client is not None:
            with self._lock:
                self._streams[streaming_client] -= 1
                if not self._streams[streaming_client]:
                    del self._streams[streaming_client]
        self._semaphore.release()

    @property
    def num_streams(self) -> int:
        """Open streams of all clients."""
        with self._lock:
            return self._streams.total()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
