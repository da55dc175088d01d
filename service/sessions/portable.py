"""Portable states: a session's state as text that a client keeps, and any replica with the same key takes back.

Signed, so that nobody else can make one; not encrypted: a state tells what was read about as well as a summary does.

    <base64 of the payload>.<base64 of its HMAC-SHA-256>      payload = header's length (4 bytes), header (JSON), state
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

from service.arrays import Float32
from service.errors import InvalidState, StateExpired, StateModelMismatch

_SALT = b"gru-serve portable state 1"
_LENGTH = struct.Struct("<I")
_DAMAGED = "the state is damaged, or was signed with a key that this server doesn't know"


class StateHeader(BaseModel):
    """What a portable state says about itself."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = Field(max_length=200, description="name@version")
    identity: str = Field(max_length=64, description="what the model's numbers have to be: LoadedModel.identity")
    position: int = Field(ge=0, lt=2**63)
    seed: int = Field(ge=-(2**63), lt=2**63)
    expires_at: float | None = Field(description="seconds since 1970")


@dataclass(frozen=True)
class OpenedState:
    """A portable state whose signature and time are good. Its numbers are not looked at yet."""

    header: StateHeader
    data: bytes

    def hidden(self, identity: str, shape: tuple[int, ...]) -> Float32:
        """(L, H) float32, for the model of this identity and this shape. Raises StateModelMismatch, InvalidState."""
        if self.header.identity != identity:
            raise StateModelMismatch(
                f"the state belongs to another {self.header.model}, or to another arithmetic, than this server has",
                param="state",
            )
        if len(self.data) != 4 * int(np.prod(shape)):
            raise InvalidState("the state has not as many numbers as its model", param="state")
        hidden = np.frombuffer(self.data, "<f4").reshape(shape).astype(np.float32)
        if not (np.abs(hidden) <= 1).all():  # false for what is no number, too
            raise InvalidState("the state holds what no state of a GRU can be", param="state")
        return hidden


class StateSealer:
    """Signs states with the first of its keys and accepts those signed with any. Safe for any number of threads."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # itsdangerous signs with the last of its keys.
        self._signer = Signer(list(reversed(keys)), salt=_SALT, key_derivation="hmac", digest_method=hashlib.sha256)

    def seal(self, header: StateHeader, hidden: Float32) -> str:
        """A state as text: about 6,000 characters for 1,024 units."""
        head = header.model_dump_json().encode()
        payload = _LENGTH.pack(len(head)) + head + hidden.astype("<f4").tobytes()
        return self._signer.sign(base64_encode(payload)).decode()

    def open(self, text: str) -> OpenedState:
        """Check signature and time. Raises InvalidState, StateExpired."""
        try:
            signed = text.encode("ascii")
            payload = base64_decode(self._signer.unsign(signed))
            # The last character of a signature has two bits to spare: of all spellings only ours is accepted.
            signature = signed.rpartition(b".")[2]
            if base64_encode(base64_decode(signature)) != signature:
                raise InvalidState(_DAMAGED, param="state")
            (length,) = _LENGTH.unpack_from(payload)
            header = StateHeader.model_validate(json.loads(payload[_LENGTH.size : _LENGTH.size + length]))
        except (BadData, ValueError, struct.error) as error:
            raise InvalidState(_DAMAGED, param="state") from error
        if header.expires_at is not None and header.expires_at <= self._clock():
            raise StateExpired("the state was good for a limited time, which is over", param="state")
        return OpenedState(header, payload[_LENGTH.size + length :])
