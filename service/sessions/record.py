"""A session as bytes, for stores outside the process.

Three parts, by how often they change, so that a small change writes little however long the text is:

- stored segments: `Retention.segment_chars` of the text (4,096) and the state after them. They never change. They are
  stored under the hash of their content, so sessions that were forked share them.
- settled text: what follows the last stored segment, in steps of an eighth of a segment (512 characters).
- the record itself: header, state, and the few characters after the settled text.

version (1 byte) | length of the header (4 bytes) | header (JSON) | state | hashes of stored segments | text (UTF-8)

A record of version 1 is all in one: in the place of the hashes it has the states of the checkpoints, and then the whole
text.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from service.arrays import Float32, is_state
from service.errors import SessionLost
from service.sessions.session import Position, Run, Seed, Session, SessionKey, SessionSummary
from service.sessions.text import Segment, Text

_VERSION, _OLD_VERSION = 2, 1
_HEAD = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
_HASH_BYTES = 16
_SETTLED_STEPS = 8  # steps of the settled text in a stored segment
_DAMAGED = "the session's record is damaged, or another version of the service has written it"


class _Header(BaseModel):
    """The part of the record that is JSON. The names are part of the format."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    identity: str
    seed: Seed
    ttl_s: float
    created_at: float
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # (L, H), of each state
    start: Position  # position of the first retained character
    position: Position | None = None  # after the last character; None in version 1
    ends: list[Position]  # positions of the checkpoints
    run: Run | None
    origin: str | None  # hexadecimal


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """Consecutive segments of a text, stored as one."""

    segments: tuple[Segment, ...]
    hash: bytes  # of its content

    @property
    def end(self) -> int:
        """The position after it."""
        return self.segments[-1].end


@dataclass(frozen=True, slots=True)
class Record:
    """A session as a store outside the process has it."""

    data: bytes  # the record itself
    settled: bytes
    segments: Sequence[StoredSegment] = ()  # empty in a record that is read: `decode` reads them

    @property
    def settled_hash(self) -> bytes | None:
        """Names the settled text. None for a record of version 1: what is stored beside it is another record's."""
        return None if self.data[0] == _OLD_VERSION else blake2b(self.settled, digest_size=_HASH_BYTES).digest()


# By the last segment of a stored segment: where that begins, and its hash. Texts that share a segment share the text
# before it, and segments never change, so this is calculated once.
_hashes: WeakKeyDictionary[Segment, tuple[int, bytes]] = WeakKeyDictionary()


def stored_segments(text: Text, segment_chars: int) -> list[StoredSegment]:
    """Return the stored segments of a text, which end at multiples of `segment_chars` (`Retention.segment_chars`).

    The other checkpoints are not stored. Going back in a session that was loaded therefore steps more characters. With
    a checkpoint of 4 KiB per 4,096 characters the checkpoints take as much space as the text.
    """
    stored, segments, place = [], text.segments, 0
    if segments and segments[0].end <= text.start:  # its text is no longer retained
        first = (Segment("", segments[0].end, segments[0].hidden),)
        stored.append(StoredSegment(first, _hash(first)))
        place = 1
    last = segments[-1].end if segments else 0
    for end in range((text.start // segment_chars + 1) * segment_chars, last + 1, segment_chars):
        next_place = bisect_right(segments, end, key=lambda segment: segment.end)
        if next_place > place and segments[next_place - 1].end == end:
            begin = max(text.start, stored[-1].end if stored else 0)
            stored.append(_stored_segment(segments[place:next_place], begin))
            place = next_place
    return stored


def content_of(segments: Sequence[Segment]) -> bytes:
    """Return the content of a stored segment: length of the state, state, text."""
    state = np.ascontiguousarray(segments[-1].hidden, "<f4").tobytes()
    return _LENGTH.pack(len(state)) + state + "".join(segment.text for segment in segments).encode()


def encode(session: Session, segment_chars: int) -> Record:
    """Return the record of a session: everything but its owner, id, revision and time of expiry."""
    text = session.text
    stored = stored_segments(text, segment_chars)
    header = _Header.model_construct(
        model=session.model,
        identity=session.identity,
        seed=session.seed,
        ttl_s=session.ttl_s,
        created_at=session.created_at,
        shape=session.hidden.shape,
        start=text.start,
        position=text.position,
        ends=[segment.end for segment in stored],
        run=session.run,
        origin=session.origin.hex() if session.origin is not None else None,
    )
    # Without defaults, so that a server of an older version, which doesn't know a field, reads the records of all
    # sessions that don't use it.
    head = header.model_dump_json(exclude_defaults=True).encode()
    state = np.ascontiguousarray(session.hidden, "<f4").tobytes()
    begin = max(text.start, stored[-1].end if stored else 0)
    step = max(2, segment_chars // _SETTLED_STEPS)  # so that it never is one character, which means "the same"
    border = text.position - (text.position - begin) % step
    hashes = b"".join(segment.hash for segment in stored)
    tail = text.slice(border, text.position).encode()
    data = b"".join([_HEAD.pack(_VERSION, len(head)), head, state, hashes, tail])
    return Record(data, text.slice(begin, border).encode(), stored)


Reader = Callable[[Sequence[tuple[bytes, int]]], list[bytes | tuple[Segment, ...]]]


def decode(record: Record, read: Reader, key: SessionKey, revision: int, expires_at: float) -> Session:
    """Return the session of a record.

    Args:
        record: What was stored.
        read: Returns the stored segments with these hashes and ends: their content, or the segments if it has them.
        key: Of the session.
        revision: Of the session.
        expires_at: Of the session.

    Raises SessionLost if the record is damaged or has another version's format, and what `read` raises.
    """
    try:
        version, header, body = _parse(record.data)
        if any(a >= b for a, b in pairwise(header.ends)):
            raise ValueError("the positions of the checkpoints don't rise")
        text = _old_text(header, body) if version == _OLD_VERSION else _text(header, body, record.settled, read)
        origin = bytes.fromhex(header.origin) if header.origin is not None else None
    except (struct.error, ValueError) as error:  # ValueError includes pydantic's
        raise SessionLost(_DAMAGED) from error
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
        origin=origin,
        revision=revision,
    )


def decode_summary(data: bytes, session_id: str, expires_at: float) -> SessionSummary:
    """Return the summary of a record. The part up to the end of the header suffices. Raises SessionLost."""
    try:
        version, header, body = _parse(data)
        position = _old_text(header, body).position if version == _OLD_VERSION else header.position
        if position is None:
            raise ValueError("no position")
    except (struct.error, ValueError) as error:
        raise SessionLost(_DAMAGED) from error
    return SessionSummary(
        session_id, header.model, position, header.start, header.seed, header.ttl_s, header.created_at, expires_at
    )


def _parse(data: bytes) -> tuple[int, _Header, bytes]:
    """Return a record's version, header, and the bytes after it. Raises ValueError, struct.error."""
    version, length = _HEAD.unpack_from(data)
    if version not in (_VERSION, _OLD_VERSION):
        raise ValueError(f"version {version}")
    end = _HEAD.size + length
    return version, _Header.model_validate_json(data[_HEAD.size : end]), data[end:]


def _text(header: _Header, body: bytes, settled: bytes, read: Reader) -> Text:
    """Raises ValueError."""
    num_bytes = 4 * int(np.prod(header.shape))
    state = _state(body[:num_bytes], header.shape)
    tail = num_bytes + _HASH_BYTES * len(header.ends)
    hashes = [body[at : at + _HASH_BYTES] for at in range(num_bytes, tail, _HASH_BYTES)]
    names = [*zip(hashes, header.ends, strict=True)]
    segments: list[Segment] = []
    begin = header.start
    for (digest, end), found in zip(names, read(names) if names else [], strict=True):
        if isinstance(found, bytes):
            (length,) = _LENGTH.unpack_from(found)
            text_at = _LENGTH.size + length
            segment = Segment(found[text_at:].decode(), end, _state(found[_LENGTH.size : text_at], header.shape))
            if len(segment.text) != max(0, end - begin):
                raise ValueError("a stored segment has the wrong length")
            if segment.text:
                _hashes[segment] = begin, digest
            segments.append(segment)
        else:
            segments.extend(found)
        begin = max(begin, end)
    characters = (settled + body[tail:]).decode()
    if begin + len(characters) != header.position:
        raise ValueError("the text has the wrong length")
    return Text(state, header.start, tuple(segments), characters)


def _old_text(header: _Header, body: bytes) -> Text:
    """The text of a record of version 1. Raises ValueError."""
    num_bytes = 4 * int(np.prod(header.shape))
    states = [_state(body[at * num_bytes : (at + 1) * num_bytes], header.shape) for at in range(1 + len(header.ends))]
    characters = body[len(states) * num_bytes :].decode()
    begin, segments = header.start, []
    for end, state in zip(header.ends, states[1:], strict=True):
        if end < begin or end > header.start + len(characters):
            raise ValueError("a checkpoint is outside the text")
        segments.append(Segment(characters[begin - header.start : end - header.start], end, state))
        begin = end
    return Text(states[0], header.start, tuple(segments), characters[begin - header.start :])


def _state(data: bytes, shape: tuple[int, int]) -> Float32:
    """Raises ValueError if the data are no (L, H) state of a GRU."""
    state = np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    if not is_state(state):
        raise ValueError("a state has a number that no GRU can have")
    return state


def _stored_segment(segments: tuple[Segment, ...], begin: int) -> StoredSegment:
    known = _hashes.get(segments[-1])
    if known is None or known[0] != begin:
        known = _hashes[segments[-1]] = begin, _hash(segments)
    return StoredSegment(segments, known[1])


def _hash(segments: Sequence[Segment]) -> bytes:
    return blake2b(content_of(segments), digest_size=_HASH_BYTES).digest()
