"""What a client can do without a session."""

from __future__ import annotations

import secrets
from typing import Any, Self

from service.client.calls import Calls
from service.client.inspection import Inspection
from service.client.session import Session


class Client(Calls):
    """A server, and the sessions on it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, text: str = "", *, id: str | None = None, **fields: Any) -> Session:  # noqa: A002 - the API's word
        """A new session. fields: model, seed, ttl_s, state, unknown_chars, as in the API. Raises ServerError."""
        session_id = id if id is not None else secrets.token_hex(16)  # ours, so that it can be repeated
        return Session(self, self.call("PUT", f"/v1/sessions/{session_id}", {"text": text} | fields))

    def load(self, state: str, **fields: Any) -> Session:
        """A new session from what `Session.save` gave, here or on another server. Raises ServerError."""
        return self.create(state=state, **fields)

    def open(self, id: str) -> Session:  # noqa: A002 - the API's word
        """A session that is there. Raises ServerError."""
        return Session(self, self.call("GET", f"/v1/sessions/{id}"))

    def inspect(self, text: str, **fields: Any) -> Inspection:
        """The state of the network after each character of a text. fields: model, state, gates, embedding, logprobs,
        portable, `from` and `to` (in a dictionary: they are words of Python's), as in the API. Raises ServerError.
        """
        return Inspection.read(self.call("POST", "/v1/inspect", {"text": text} | fields))
