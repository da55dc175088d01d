"""Portable states: a session's state as text. A client stores it, and any replica with the same key accepts it.

A portable state is signed, so that only this service can make one. It is not encrypted, and a state reveals about as
much of the text as a summary does.

    <base64 of the payload>.<base64 of its HMAC-SHA-256>
    payload = length of the header (4 bytes), header (JSON), state
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from itsdangerous import BadData, Signer
from itsdangerous.encoding import base64_decode, base64_encode
from pydantic import BaseModel, ConfigDict, Field

from service.arrays import Float32, is_state
from service.errors import InvalidState, StateExpired, StateModelMismatch
from service.sessions.session import Position, Seed

_SALT = b"gru-serve portable state 1"
_LENGTH = struct.Struct("<I")
_DAMAGED = "the state is damaged, or is signed with a key that this server doesn't have"


class StateHeader(BaseModel):
    """The part of a portable state that is JSON. The names are part of the format."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = Field(max_length=200, description="name@version")
    identity: str = Field(max_length=64, description="LoadedModel.identity of the model that computed the state")
    position: Position
    seed: Seed
    expires_at: float | None = Field(description="seconds since 1970")


@dataclass(frozen=True)
class OpenedState:
    """A portable state whose signature is valid and which has not expired. Its numbers are not yet checked."""

    header: StateHeader
    data: bytes  # the (L, H) state, little-endian float32

    def hidden(self, identity: str, shape: tuple[int, ...], ref: str) -> Float32:
        """Return the (L, H) float32 state for the model with this identity and state shape; `ref` is its name@version.

        Raises StateModelMismatch if another model computed it, and InvalidState if no GRU can have this state.
        """
        if self.header.identity != identity:
            is_same_name = ref == self.header.model
            fault = f"the state is of {self.header.model}, and {ref} has other weights or another arithmetic"
            advice = "use the server that made it" if is_same_name else "leave model out, or name the state's"
            raise StateModelMismatch(f"{fault}{' here' if is_same_name else ''}: {advice}", param="state")
        if len(self.data) != 4 * int(np.prod(shape)):
            raise InvalidState("the state has the wrong size for its model", param="state")
        hidden = np.frombuffer(self.data, "<f4").reshape(shape).astype(np.float32)
        if not is_state(hidden):
            raise InvalidState("the state has values outside -1 to 1, which a GRU never has", param="state")
        return hidden


class StateSealer:
    """Signs states with the first of its keys, and accepts those signed with any. Safe for any number of threads."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # itsdangerous signs with the last of its keys.
        self._signer = Signer(list(reversed(keys)), salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256)

    def seal(self, header: StateHeader, hidden: Float32) -> str:
        """Return a state as signed text, about 6,000 characters for 1,024 units."""
        head = header.model_dump_json().encode()
        payload = _LENGTH.pack(len(head)) + head + hidden.astype("<f4").tobytes()
        return self._signer.sign(base64_encode(payload)).decode()

    def open(self, text: str) -> OpenedState:
        """Check the signature and the time of expiry. Raises InvalidState, StateExpired."""
        try:
            signed = text.encode("ascii")
            payload = base64_decode(self._signer.unsign(signed))
            # Base64 ignores two bits of the last character of a signature. Accept only the spelling that we write.
            signature = signed.rpartition(b".")[2]
            if base64_encode(base64_decode(signature)) != signature:
                raise InvalidState(_DAMAGED, param="state")
            (length,) = _LENGTH.unpack_from(payload)
            header = StateHeader.model_validate(json.loads(payload[_LENGTH.size : _LENGTH.size + length]))
        except (BadData, ValueError, struct.error) as error:
            raise InvalidState(_DAMAGED, param="state") from error
        if header.expires_at is not None and header.expires_at <= self._clock():
            raise StateExpired("the state has expired", param="state")
        return OpenedState(header, payload[_LENGTH.size + length :])
