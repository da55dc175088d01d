"""Sends commands to a Redis server and reads its answers, with limits of time and memory.

redis-py's own parsers limit the time of each read from the socket, so that an answer which arrives byte by byte takes
as long as the server likes. They reserve memory for as many elements as the server announces. And they store what the
server sends in excess, which would then be taken for the answer to the next command.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import time
from contextlib import suppress
from typing import Any

from redis import exceptions as errors
from redis._parsers.base import BaseParser

_MAX_BYTES = 2**26  # of the answers to the commands of one exchange
_MAX_ELEMENTS = 2**19  # of all arrays in them; the slots of a cluster may have 300,000
_MAX_LINE_BYTES = 2**14  # of an error, for example
_MAX_DEPTH = 8  # of arrays within arrays
_MAX_DIGITS = 20
_READ_BYTES, _MAX_READ_BYTES = 2**16, 2**20
_MIN_BYTES_PER_S = 2**23  # of what is sent or received: large records may take longer than small ones


class InvalidAnswer(errors.ConnectionError):
    """The server answers with something that no command of this service leads to. The connection is of no use."""


class Exchange(BaseParser):
    """Sends commands and reads answers in RESP2; the parser of redis-py's connections.

    Its methods raise redis-py's TimeoutError and ConnectionError, and InvalidAnswer. The connection has to be closed
    then.
    """

    def __init__(self, socket_read_size: int = _READ_BYTES) -> None:
        self._read_bytes = socket_read_size
        self._sock: Any = None
        self._data, self._at = b"", 0  # what has arrived, and how much of it has been read
        self._left, self._num_elements = _MAX_BYTES, 0  # bytes that may still arrive, elements that were announced
        self._relaxed_until, self._ends_at = 0.0, 0.0  # monotonic

    def on_connect(self, connection: Any) -> None:
        """Use the connection's socket from now on."""
        self._sock, self._data, self._at = connection._sock, b"", 0

    def on_disconnect(self) -> None:
        """Use no socket any more."""
        self._sock, self._data, self._at = None, b"", 0

    def begin(self, timeout_s: float, ends_at: float) -> None:
        """Begin an exchange.

        Args:
            timeout_s: How long it may take, and how long the socket itself waits.
            ends_at: When it has to end at the latest, monotonic.
        """
        now = time.monotonic()
        self._ends_at = min(ends_at, now + timeout_s)
        # Until then the socket's own limit is precise enough, and no `poll` before each read is needed.
        self._relaxed_until = self._ends_at - 0.9 * timeout_s
        self._left, self._num_elements = _MAX_BYTES, 0

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._ends_at += len(data) / _MIN_BYTES_PER_S
        sock = self._open_socket()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.settimeout(self._left_s())
                sock.sendall(data)
                return
            rest = memoryview(data)
            while True:
                with suppress(BlockingIOError):  # the server reads slowly
                    rest = rest[sock.send(rest, socket.MSG_DONTWAIT) :]
                if not rest:
                    return
                self._wait(select.POLLOUT)
        except TimeoutError:
            raise errors.TimeoutError("the server did not read the commands in time") from None
        except OSError as error:
            raise errors.ConnectionError(f"can't send: {error.strerror}") from error

    def read_response(self, disable_decoding: bool = False, **_options: Any) -> Any:  # noqa: ARG002
        """Return the next answer; a RedisError for an error."""
        answer = self._answer(0)
        if isinstance(answer, errors.ConnectionError):
            raise answer
        return answer

    def can_read(self, timeout: float = 0) -> bool:
        """Return whether something has arrived."""
        return self.has_more() or self._polls(select.POLLIN, timeout)

    def has_more(self) -> bool:
        """Return whether more has been received than the answers that were read."""
        return self._at < len(self._data)

    def _answer(self, depth: int) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            length = _number(rest)
            return None if length == -1 else self._bulk(length)
        if kind == b"*":
            length = _number(rest)
            if length == -1:
                return None
            self._num_elements += length
            if length < 0 or self._num_elements > _MAX_ELEMENTS or depth == _MAX_DEPTH:
                raise InvalidAnswer("an answer has too many elements, or too many arrays within arrays")
            return [self._answer(depth + 1) for _ in range(length)]
        if kind == b":":
            return _number(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return _error(rest)
        raise InvalidAnswer("an answer does not follow Redis' protocol")

    def _line(self) -> bytes:
        searched = self._at
        while (end := self._data.find(b"\r\n", searched)) < 0:
            if len(self._data) - self._at > _MAX_LINE_BYTES:
                raise InvalidAnswer("an answer has a line that is too long")
            data = self._receive(self._read_bytes)
            searched = max(0, len(self._data) - self._at - 1)
            self._data, self._at = self._data[self._at :] + data, 0
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _bulk(self, length: int) -> bytes:
        """Return a string of `length` bytes."""
        missing = length + 2 - (len(self._data) - self._at)
        if length < 0 or missing > self._left:
            raise InvalidAnswer("an answer is too large")
        if missing > 0:
            pieces = [self._data[self._at :]]
            while missing > 0:
                pieces.append(self._receive(min(max(missing, self._read_bytes), _MAX_READ_BYTES)))
                missing -= len(pieces[-1])
            self._data, self._at = b"".join(pieces), 0
        end = self._at + length
        text = self._data[self._at : end]
        if self._data[end : end + 2] != b"\r\n":
            raise InvalidAnswer("an answer does not follow Redis' protocol")
        self._at = end + 2
        return text

    def _receive(self, num_bytes: int) -> bytes:
        sock = self._open_socket()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.settimeout(self._left_s())
            elif time.monotonic() > self._relaxed_until:
                self._wait(select.POLLIN)
            data: bytes = sock.recv(num_bytes)
        except (TimeoutError, BlockingIOError):  # the latter is the kernel's time-out
            raise errors.TimeoutError("the server did not answer in time") from None
        except OSError as error:
            raise errors.ConnectionError(f"can't receive: {error.strerror}") from error
        if not data:
            raise errors.ConnectionError("the server has closed the connection")
        self._left -= len(data)
        if self._left < 0:
            raise InvalidAnswer("an answer is too large")
        self._ends_at += len(data) / _MIN_BYTES_PER_S
        return data

    def _open_socket(self) -> Any:
        if self._sock is None:
            raise errors.ConnectionError("the connection is closed")
        return self._sock

    def _left_s(self) -> float:
        """Return how many seconds are left, at least a moment.

        Afterwards only what has arrived already is read: on a busy machine, this thread may be late and not the server.
        """
        return max(0.001, self._ends_at - time.monotonic())

    def _wait(self, event: int) -> None:
        if not self._polls(event, self._left_s()):
            raise TimeoutError

    def _polls(self, event: int, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._sock, event)
        return bool(poll.poll(math.ceil(1000 * timeout_s)))


def _number(digits: bytes) -> int:
    try:
        if len(digits) <= _MAX_DIGITS:
            return int(digits)
    except ValueError:
        pass
    raise InvalidAnswer("an answer has a number that can't be read")


def _error(text: bytes) -> Any:
    try:
        return BaseParser.parse_error(text.decode(errors="replace"))  # type: ignore[no-untyped-call]
    except (ValueError, IndexError, TypeError):  # it names no slot or no address after MOVED
        raise InvalidAnswer("an answer has an error that can't be read") from None
