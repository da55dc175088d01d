"""Admission: limits on the requests that wait for an engine, by client."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from service.errors import Overloaded, TooManyStreams
from service.shares import SharedCapacity, current_client


class AdmissionLimit:
    """Limits the requests that hold a thread while they wait for an engine, so that some threads stay free.

    As a context manager it admits one request that is not a stream, of the current client. Any thread may use it.
    """

    def __init__(self, max_requests: int, max_per_client: int = 0, num_reserved: int = 0) -> None:
        """Share places between clients as `SharedCapacity` does.

        Args:
            max_requests: Requests that are admitted at the same time, streams included.
            max_per_client: Streams of one client, and also its requests that are not streams. 0 sets no limit.
            num_reserved: Further requests for clients that hold few places.
        """
        self._places = SharedCapacity(max_requests, num_reserved)
        self._max_per_client = max_per_client
        self._streams: Counter[str] = Counter()  # open streams of each client that has one
        self._lock = threading.Lock()  # guards both

    def acquire(self, streaming_client: str | None = None) -> None:
        """Admit a request, or refuse it at once.

        Args:
            streaming_client: Client key that the stream counts against. None if the request is not a stream; it counts
                against the current client.

        Raises:
            Overloaded: Too many requests are admitted already.
            TooManyStreams: The client has too many open streams, or too many other requests.
        """
        client, limit = _client(streaming_client), self._max_per_client
        with self._lock:
            num_streams = self._streams[client]
            if streaming_client is not None and limit and num_streams >= limit:
                raise TooManyStreams(
                    f"you have {limit} open streams, which is the limit: close a stream, or wait until one ends"
                )
            if streaming_client is None and limit and self._places.held_by(client) - num_streams >= limit:
                raise TooManyStreams(
                    f"you have {limit} requests in progress that are not streams, which is the limit: wait until one "
                    "is answered"
                )
            if not self._places.has_room(client):
                raise Overloaded("the server is handling as many requests as it can: try again in a second")
            self._places.take(client)
            if streaming_client is not None:
                self._streams[client] += 1

    def release(self, streaming_client: str | None = None) -> None:
        """Undo one successful `acquire`, which was called on this thread with the same `streaming_client`."""
        client = _client(streaming_client)
        with self._lock:
            self._places.give_back(client)
            if streaming_client is not None:
                self._streams[client] -= 1
                if not self._streams[client]:
                    del self._streams[client]

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


def _client(streaming_client: str | None) -> str:
    return streaming_client if streaming_client is not None else current_client()
