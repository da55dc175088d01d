"""Responses that own what their requests hold, such as places and runs, until they are sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from weakref import finalize

from flask import Response

_WHOLE_CHARS = 65_536  # an answer up to this length is sent as a whole, with its length


class HoldingResponse(Response):
    """A response that releases what its request holds once: when it is closed, or when it is dropped unsent.

    A later step of the request may fail, so that it is never sent.
    """

    def __init__(self, body: Iterable[bytes], held: ExitStack, mimetype: str) -> None:
        """Take over what `held` holds: the caller's own `with` then releases nothing."""
        super().__init__(body, mimetype=mimetype)
        self._held = held.pop_all()
        finalize(self, self._held.close).atexit = False

    def close(self) -> None:
        """Release what the response holds. Repeating it does nothing."""
        with self._held:
            super().close()


def json_response(pieces: Iterable[str], held: ExitStack) -> Response:
    """Return a response with these pieces of a JSON document.

    If it is long, it is sent while it is written, and takes over what `held` holds, because writing needs that.
    """
    iterator = iter(pieces)
    start: list[str] = []
    length = 0
    for piece in iterator:
        start.append(piece)
        length += len(piece)
        if length > _WHOLE_CHARS:
            return HoldingResponse(_encoded(start, iterator), held, "application/json")
    return Response("".join(start), mimetype="application/json")


def _encoded(start: Iterable[str], rest: Iterator[str]) -> Iterator[bytes]:
    yield "".join(start).encode()
    for piece in rest:
        yield piece.encode()
