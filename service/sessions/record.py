"""A session as bytes, for stores outside the process.

version (1 byte) | length of the header (4 bytes) | header (JSON) | state | states of the checkpoints | text (UTF-8)
"""

from __future__ import annotations

import struct

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.arrays import Float32
from service.errors import SessionLost
from service.sessions.session import Run, Session, SessionKey
from service.sessions.text import Segment, Text

_VERSION = 1
_HEAD = struct.Struct("<BI")


class _Header(BaseModel):
    """The part of the record that is JSON. The names are part of the format."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    identity: str
    seed: int
    ttl_s: float
    created_at: float
    shape: tuple[int, int]  # (L, H), of each state
    start: int = Field(ge=0)  # position of the first retained character
    ends: list[int]  # positions of the checkpoints
    run: Run | None
    origin: str | None  # hexadecimal


def encode(session: Session, segment_chars: int) -> bytes:
    """Return the record of a session: everything but its owner, id, revision and time of expiry.

    Of the checkpoints, the record has only those at multiples of `segment_chars` (`Retention.segment_chars`). Going
    back in a session that was loaded from a record therefore steps more characters. With one checkpoint of 4 KiB per
    4,096 characters the checkpoints take as much space as the text.
    """
    text = session.text
    segments = [segment for segment in text.segments if segment.end <= text.start or not segment.end % segment_chars]
    header = _Header.model_construct(
        model=session.model,
        identity=session.identity,
        seed=session.seed,
        ttl_s=session.ttl_s,
        created_at=session.created_at,
        shape=session.hidden.shape,
        start=text.start,
        ends=[segment.end for segment in segments],
        run=session.run,
        origin=session.origin.hex() if session.origin is not None else None,
    )
    head = header.model_dump_json().encode()
    states = [
        np.ascontiguousarray(state, "<f4").tobytes()
        for state in (session.hidden, *(segment.hidden for segment in segments))
    ]
    characters = text.slice(text.start, text.position).encode()
    return b"".join([_HEAD.pack(_VERSION, len(head)), head, *states, characters])


def decode(data: bytes, key: SessionKey, revision: int, expires_at: float) -> Session:
    """Return the session of a record. Raises SessionLost if the record is damaged or has another version's format."""
    try:
        version, length = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"version {version}")
        begin = _HEAD.size + length
        header = _Header.model_validate_json(data[_HEAD.size : begin])
        num_bytes = 4 * int(np.prod(header.shape))
        num_states = 1 + len(header.ends)
        states = np.frombuffer(data, "<f4", num_states * num_bytes // 4, begin).astype(np.float32)
        states = states.reshape(num_states, *header.shape)
        text = _text(header, states, data[begin + num_states * num_bytes :].decode())
    except (struct.error, ValueError, ValidationError) as error:
        raise SessionLost(
            "the session's record is damaged, or another version of the service has written it"
        ) from error
    return Session(
        id=key.id,
        owner=key.owner,
        model=header.model,
        identity=header.identity,
        seed=header.seed,
        ttl_s=header.ttl_s,
        created_at=header.created_at,
        expires_at=expires_at,
        text=text,
        run=header.run,
        origin=bytes.fromhex(header.origin) if header.origin is not None else None,
        revision=revision,
    )


def _text(header: _Header, states: Float32, characters: str) -> Text:
    """states: the state after the whole text, then those of the checkpoints. Raises ValueError."""
    begin, segments = header.start, []
    for end, state in zip(header.ends, states[1:], strict=True):
        if end < begin or end > header.start + len(characters):
            raise ValueError("a checkpoint is outside the text")
        segments.append(Segment(characters[begin - header.start : end - header.start], end, state))
        begin = end
    return Text(states[0], header.start, tuple(segments), characters[begin - header.start :])
