"""A proxy to a Redis server that delays, loses or replaces answers."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit


class LossyProxy(socketserver.ThreadingTCPServer):
    """A proxy to a Redis server that delays or loses one answer, after the operation was done."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        self.upstream = (urlsplit(url).hostname, urlsplit(url).port)
        self._operation = b""
        self._meanwhile: Callable[[], Any] = lambda: None
        self._loses = False
        # Sends to a client what the server has answered. A test may put another function in its place.
        self.deliver: Callable[[socket.socket, bytes], Any] = socket.socket.sendall
        self.num_intercepted = 0
        self.forwarding = threading.Lock()  # held while data is neither in a client's socket nor in the server's
        self._clients: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Forwarding)
        self.url = f"redis://127.0.0.1:{self.server_address[1]}/0"

    def is_idle(self) -> bool:
        """Whether it has forwarded all that clients have sent, also those that wait no longer for an answer."""
        with self.forwarding:
            return not select.select([self.socket, *self._clients], [], [], 0)[0]

    def get_request(self) -> tuple[Any, Any]:
        with self.forwarding:
            client, address = super().get_request()
            self._clients.add(client)
            return client, address

    def shutdown_request(self, request: Any) -> None:
        with self.forwarding:
            self._clients.discard(request)
        super().shutdown_request(request)

    def lose_answer(self, operation: str, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Break the connection instead of answering the operation's next call. Between the two, call `meanwhile`."""
        self._operation, self._meanwhile, self._loses = b"\r\n%b\r\n" % operation.encode(), meanwhile, True

    def delay_answer(self, operation: str, meanwhile: Callable[[], Any]) -> None:
        """Call `meanwhile` when the operation's next call is done and not yet answered."""
        self.lose_answer(operation, meanwhile)
        self._loses = False

    def intercepts(self, command: bytes) -> bool:
        """Whether this is the call whose answer is to be delayed or lost. Only the first one is."""
        if not self._operation or self._operation not in command:
            return False
        self._operation = b""
        return True

    def intercept(self) -> bool:
        """Do what is to be done before the answer; return whether to break the connection instead of answering."""
        self.num_intercepted += 1
        self._meanwhile()
        return self._loses


class _Forwarding(socketserver.BaseRequestHandler):
    server: LossyProxy

    def handle(self) -> None:
        intercepts = False
        with suppress(OSError), socket.create_connection(self.server.upstream) as upstream:
            while True:
                for ready in select.select([self.request, upstream], [], [])[0]:
                    if ready is self.request:
                        with self.server.forwarding:
                            data = self.request.recv(2**16)
                            intercepts = intercepts or self.server.intercepts(data)
                            upstream.sendall(data)
                        if not data:
                            return
                        continue
                    data = upstream.recv(2**16)
                    if not data:
                        return
                    if intercepts and self.server.intercept():
                        return
                    intercepts = False
                    self.server.deliver(self.request, data)


@contextmanager
def lossy_proxy(url: str) -> Iterator[LossyProxy]:
    with LossyProxy(url) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
