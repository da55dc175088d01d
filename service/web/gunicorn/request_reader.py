"""Requests from the bytes of a connection, as they arrive: nothing here waits."""

from __future__ import annotations

import io
import re
import secrets
import string
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gunicorn.http import errors
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import Unreader

MAX_HEAD_BYTES = 32_768
_MAX_FRAMING_BYTES = 131_072  # of a chunked body, without its data: parsing millions of tiny chunks would take seconds
_MAX_LINE_BYTES = 8_192  # of a chunk's size or of a trailer
_SKIP_BYTES = 32 * 1024 * 1024  # of a body that is not needed; then the connection is closed
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?")
_STATUS_OF_ERROR: dict[type[Exception], HTTPStatus] = {
    errors.LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.NoMoreData: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,  # the head is longer than MAX_HEAD_BYTES
    errors.ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    errors.UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
    errors.InvalidHTTPVersion: HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
}
_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "the request is not valid HTTP/1.1: it begins with a line such as `GET /version HTTP/1.1`, "
    "and all lines of its head end with CR LF",
    HTTPStatus.REQUEST_URI_TOO_LONG: "the request line is longer than 4,094 bytes",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "the head of the request is too long: it may have 100 fields, of up to "
    "8,190 bytes each, and 32,768 bytes in total",
    HTTPStatus.EXPECTATION_FAILED: "the only expectation that the server knows is 100-continue",
    HTTPStatus.NOT_IMPLEMENTED: "the only transfer coding that the server knows is chunked",
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: "the server speaks HTTP/1.1 and HTTP/1.0",
}
# What is wrong with a request of the status 400, where the error tells more than that it is not valid.
_FAULTS: dict[type[Exception], str] = {
    errors.InvalidRequestMethod: "the method is not valid: methods are written in capital letters, such as POST",
    errors.InvalidHeaderName: "the name of a header is not valid: a name has no spaces, and a colon follows it at once",
    errors.ObsoleteFolding: "a header continues on a second line: write it on one line",
    errors.InvalidHeader: "a header is not valid: it has no colon or a control character, it may be sent only once, "
    "such as Host, Content-Type and Content-Length, or it may not be sent, such as Transfer-Encoding with "
    "Content-Length or in HTTP/1.0",
}
_PATH = "the path of the request is not valid: write {} in it as {}"
_TLS_HANDSHAKES = (0x16, 0x80)  # the first byte of a connection of TLS, and of SSL 2
_METHOD_BYTES = frozenset(
    b"!#$%&'*+-.^_`|~" + string.digits.encode() + string.ascii_letters.encode()
)  # RFC 9110, 5.6.2
_HTTP_2 = b"PRI * HTTP/2"  # the beginning of a connection of HTTP/2


class Refusal(Exception):
    """A request that is refused before it reaches the application. The connection can't be used again."""

    def __init__(self, status: HTTPStatus, code: str, message: str, cause: str = "") -> None:
        """`cause` is for the log. It must not quote the request."""
        super().__init__(message)
        self.status, self.code, self.message, self.cause = status, code, message, cause
        self.request_id = secrets.token_hex(8)  # not the client's, which may not have arrived


class RequestReader:
    """Splits the bytes that arrive on one connection into requests.

    gunicorn parses the heads. A request is complete when its whole body has arrived. It is handed out earlier, without
    its body or with the beginning of it, if the application refuses it in any case; the rest is then skipped.
    """

    def __init__(self, cfg: Any, client: Any, max_body_bytes: int, may_send_body: Callable[[Any], bool]) -> None:
        """Begin with the first request of a connection.

        Args:
            cfg: gunicorn's configuration.
            client: The client's address.
            max_body_bytes: A longer body is not waited for.
            may_send_body: Whether to wait for the body of a request, of which the head has arrived.
        """
        self._cfg, self._client, self._max_body_bytes = cfg, client, max_body_bytes
        self._may_send_body = may_send_body
        self._received = bytearray()  # what has arrived and is not part of a request yet
        self._searched = 0  # bytes of it that contain no end of a head
        self._request: Any = None  # whose body has not arrived completely
        self._body = bytearray()
        self._num_handed_out = 0  # bytes of the body of the request that is being answered
        self._framing: _Length | _Chunks = _Length(0)  # of the body that is being read or skipped
        self._num_skipped = 0
        self._num_requests = 0

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next request has arrived."""
        return self._request is not None or (bool(self._received) and not self.is_skipping)

    @property
    def has_head(self) -> bool:
        """Whether the next request's head has arrived, and its body has not."""
        return self._request is not None

    @property
    def is_skipping(self) -> bool:
        """Whether the rest of the last request's body has still to arrive."""
        return self._request is None and not self._framing.is_complete

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, with the body of the request that was handed out last, until the next one is read."""
        return len(self._received) + len(self._body) + self._num_handed_out

    def add(self, data: bytes) -> None:
        """Add bytes that have arrived."""
        self._received += data

    def next_request(self, send: Callable[[bytes], object]) -> Any:
        """Return the next request if it has arrived, or None. Raises Refusal.

        The request is gunicorn's, with the body as a file in memory. `send` sends an interim answer to the client.
        """
        self._num_handed_out = 0
        if self.is_skipping and not self._skip():
            return None
        if self._request is None:
            self._request = self._read_head()
            if self._request is None:
                return None
            self._framing = _framing_of(self._request)
            if not self._framing.is_complete:
                expects = self._request._expected_100_continue
                self._request._expected_100_continue = False  # gunicorn would send the interim answer later
                if self._framing.num_bytes > self._max_body_bytes or not self._may_send_body(self._request):
                    if expects:
                        self._request.force_close()  # the client may send the body or not
                    return self._hand_out(_Withheld())
                if expects and not self._received:
                    send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body += self._framing.take(self._received)
        if self._framing.is_complete or len(self._body) > self._max_body_bytes:
            return self._hand_out(io.BytesIO(bytes(self._body)))
        return None

    def _hand_out(self, body: io.IOBase) -> Any:
        request, self._request = self._request, None
        request.body = body
        self._num_handed_out = len(self._body)
        self._body.clear()
        self._num_skipped = 0
        return request

    def _skip(self) -> bool:
        """Drop what has arrived of the rest of a body; return whether that was all. Raises Refusal."""
        before = len(self._received)
        self._framing.take(self._received)
        self._num_skipped += before - len(self._received)
        if self._num_skipped > _SKIP_BYTES:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", "the body does not end")
        return self._framing.is_complete

    def _read_head(self) -> Any:
        """Return the next request without its body, or None if its head has not arrived. Raises Refusal."""
        received = self._received
        while received.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are ignored
            del received[:2]
        if (
            received and received != b"\r" and received[0] not in _METHOD_BYTES
        ):  # such as TLS, whose client waits for an answer
            message = _MESSAGES[HTTPStatus.BAD_REQUEST]
            if received[0] in _TLS_HANDSHAKES:
                message = (
                    "the server speaks HTTP, not HTTPS: write http:// in its address, or use the proxy that ends TLS"
                )
            raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", message, "not HTTP")
        if received.startswith(_HTTP_2):
            status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            raise Refusal(status, "bad_request", _MESSAGES[status], "HTTP/2")
        end = received.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0 and len(received) <= MAX_HEAD_BYTES and received.count(b"\n") == received.count(b"\r\n"):
            self._searched = len(received)
            return None
        # Of a head that is too long or has a wrong line end, the parser gets what there is, and finds the error.
        head = bytes(received[: end + 4] if 0 <= end <= MAX_HEAD_BYTES else received[:MAX_HEAD_BYTES])
        del received[: len(head)]
        self._searched = 0
        self._num_requests += 1
        try:
            request = Request(self._cfg, _Bytes(head), self._client, self._num_requests)
            # gunicorn also accepts `gzip, chunked`, and leaves it to the application to decompress the body.
            if any(
                name == "TRANSFER-ENCODING" and value.strip().lower() != "chunked" for name, value in request.headers
            ):
                raise errors.UnsupportedTransferCoding("another coding than chunked")
            if (request.version or (1, 1)) >= (1, 1) and all(
                name != "HOST" for name, _ in request.headers
            ):  # RFC 9112, 3.2
                message = "HTTP/1.1 requires the header Host: send the name or the address of the server in it"
                raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", message, "no Host")
            if (request.version or (1, 1)) > (1, 1):  # the answer would have it, too
                request.version = (1, 1)
            return request
        except (errors.ParseException, errors.NoMoreData, StopIteration) as error:
            status = _STATUS_OF_ERROR.get(type(error), HTTPStatus.BAD_REQUEST)
            message = _FAULTS.get(type(error), _MESSAGES[status])
            if isinstance(error, (errors.InvalidRequestLine, errors.InvalidHTTPVersion)):
                line = head.splitlines()[0]
                if line.count(b" ") > 2:  # the parser takes what follows the second one for the version
                    status, message = HTTPStatus.BAD_REQUEST, _PATH.format("a space", "%20")
                elif not line.isascii():
                    message = _PATH.format("other characters than ASCII", "%C3%A9 for é, for example")
            raise Refusal(status, "bad_request", message, type(error).__name__) from None


class _Withheld(io.RawIOBase):
    """The body of a request that is handed out without it, for an application that reads it all the same."""

    def readable(self) -> bool:
        """Return true, as a file that is open for reading."""
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ARG002 - the signature of io
        """Raise OSError."""
        raise OSError("the body was not waited for")


class _Bytes(Unreader):
    """Bytes in memory, for gunicorn's parser."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.unread(data)

    def chunk(self, size_hint: int | None = None) -> bytes:  # noqa: ARG002 - gunicorn's signature
        """Return nothing: the parser has all bytes."""
        return b""


class _Length:
    """A body whose length the head says."""

    def __init__(self, length: int) -> None:
        self.num_bytes = length  # as announced
        self._num_missing = length

    @property
    def is_complete(self) -> bool:
        return not self._num_missing

    def take(self, received: bytearray) -> bytes:
        """Remove from `received` what belongs to the body, and return it."""
        data = bytes(received[: self._num_missing])
        del received[: len(data)]
        self._num_missing -= len(data)
        return data


class _Chunks:
    """A chunked body (RFC 9112, 7.1). Extensions and trailers are ignored."""

    num_bytes = 0  # unknown

    def __init__(self) -> None:
        self.is_complete = False
        self._num_missing = 0  # bytes of the current chunk, with the line end after it
        self._num_framing = 0
        self._is_in_trailers = False

    def take(self, received: bytearray) -> bytes:
        """Remove from `received` what belongs to the body, and return its data. Raises Refusal if it is malformed."""
        data, at = bytearray(), 0
        while not self.is_complete:
            if self._num_missing > 2:
                piece = received[at : at + self._num_missing - 2]
                data += piece
                at += len(piece)
                self._num_missing -= len(piece)
            if self._num_missing:
                if self._num_missing > 2 or len(received) - at < 2:
                    break
                if received[at : at + 2] != b"\r\n":
                    raise _malformed("the end of a chunk")
                at += 2
                self._num_missing = 0
            end = received.find(b"\r\n", at, at + _MAX_LINE_BYTES)
            if end < 0:
                if len(received) - at >= _MAX_LINE_BYTES:
                    raise _malformed("a long line")
                break
            self._read_line(bytes(received[at:end]))
            at = end + 2
        del received[:at]
        return bytes(data)

    def _read_line(self, line: bytes) -> None:
        self._num_framing += len(line) + 4
        if self._num_framing > _MAX_FRAMING_BYTES:
            raise _malformed("many small chunks")
        if self._is_in_trailers:
            if b"\n" in line or b"\r" in line:
                raise _malformed("a trailer")
            self.is_complete = not line
            return
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise _malformed("the size of a chunk")
        self._num_missing = int(size[1], 16)
        if self._num_missing:
            self._num_missing += 2
        else:
            self._is_in_trailers = True


def _malformed(what: str) -> Refusal:
    message = f"the chunks of the body are malformed: {what}"
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_request", message, "malformed chunks")


def _framing_of(request: Any) -> _Length | _Chunks:
    """Return how the end of a request's body is found."""
    reader = request.body.reader
    if isinstance(reader, ChunkedReader):
        return _Chunks()
    return _Length(reader.length if isinstance(reader, LengthReader) else 0)
