"""Admission: limits on the requests that wait for an engine, and on the streams of one client."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded, TooManyStreams, plural
from service.shares import SharedCapacity, current_client


class AdmissionLimit:
    """Limits the requests that hold a thread while they wait for an engine, so that some threads stay free.

    `admit` is the only way in, and its block the only way out. A stream outlives the code that began it, so its answer
    takes the block over (`EventStream`). Any thread may use it.
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

    @contextmanager
    def admit(self, *, is_stream: bool = False) -> Iterator[None]:
        """Admit a request of the current client for as long as the block lasts, or refuse it at once.

        The block may end on another thread, which works for another client.

        Raises:
            Overloaded: Too many requests are admitted already.
            TooManyStreams: The client has too many open streams, or too many other requests.
        """
        client = current_client()
        self._take(client, is_stream)
        try:
            yield
        finally:
            with self._lock:
                self._places.give_back(client)
                self._streams[client] -= is_stream
                if not self._streams[client]:
                    del self._streams[client]

    def _take(self, client: str, is_stream: bool) -> None:
        limit = self._max_per_client
        with self._lock:
            num_streams = self._streams.get(client, 0)
            if is_stream and limit and num_streams >= limit:
                raise TooManyStreams(
                    f"you have {plural(limit, 'open stream')}, which is the limit: close a stream, or wait "
                    "until one ends"
                )
            if not is_stream and limit and self._places.held_by(client) - num_streams >= limit:
                raise TooManyStreams(
                    f"you have {plural(limit, 'request')} in progress beside your streams, which is the limit: "
                    "wait until one "
                    "is answered"
                )
            if not self._places.has_room(client):
                raise Overloaded("the server is handling as many requests as it can: try again in a second")
            self._places.take(client)
            self._streams[client] += is_stream

    @property
    def num_streams(self) -> int:
        """Open streams of all clients."""
        with self._lock:
            return self._streams.total()
