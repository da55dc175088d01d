"""The stored segments of texts (record.py) in Redis: written once, shared by forks, there while they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.errors import GruServeError, SessionLost
from service.sessions.cache import CachedSession
from service.sessions.lifetimes import Lifetimes
from service.sessions.record import StoredSegment, content_of, stored_segments
from service.sessions.redis_server import KeyOccupied, RedisServer
from service.sessions.session import Session
from service.sessions.session_index import batches
from service.sessions.text import Segment, Text

_LOST = "the session store has lost a part of this session's text: continue under another id"
_BATCH = 100  # segments in one exchange: they have some 8 KB each


@dataclass(frozen=True, slots=True)
class _Due:
    """A stored segment that a session needs."""

    stored: StoredSegment
    key: str
    creation: bytes  # of the session
    ms: int  # how long it has to live

    @property
    def name(self) -> str:
        """Names it among the lifetimes, which are those of a segment for one session."""
        return self.key + self.creation.hex()

    def call(self, content: bytes) -> tuple[Any, ...]:
        """Return the call of the script."""
        return "segment", self.key, "", 0, self.ms, content, self.creation


class SegmentStore:
    """Writes and reads stored segments. Any number of threads may call.

    Each is a key of its own, a hash: `c` is its content, and the names of the other fields are the creations of the
    sessions that need it. It is deleted with the last of these sessions, or expires by itself some minutes after the
    last of them. A session's segments are written before the record that names them.

    Args:
        server: Where the sessions are stored.
        prefix: Of every key in Redis.
        segment_chars: See Retention.
    """

    def __init__(self, server: RedisServer, prefix: str, segment_chars: int) -> None:
        self._server, self._prefix, self._segment_chars = server, prefix, segment_chars
        self._lifetimes = Lifetimes()

    def write(self, segments: Sequence[StoredSegment], creation: bytes, ttl_s: float) -> None:
        """Let a session's segments live as long as it does, and write those that are missing.

        Normally asks nothing of Redis, because this process did the same a short time ago. Raises SessionLost,
        StoreUnavailable.

        creation: The nonce of the session's creation.
        """
        if due := self._due(segments, creation, ttl_s):
            self._server.check()
            self._write(due)

    def prolong(self, saved: CachedSession) -> None:
        """Do the same as `write` for a session as it was saved. Never fails: its next save does it again."""
        with suppress(GruServeError):
            self.write(self.of(saved.session), saved.save_id.creation, saved.session.ttl_s)

    def forget(self) -> None:
        """Forget what Redis has: another server may have lost it."""
        self._lifetimes.clear()

    def restore(self, sessions: Iterable[CachedSession]) -> None:
        """Do the same as `write` for several sessions, also during the recovery window. Raises StoreUnavailable.

        A segment whose key has something else stays as it is: the sessions that need it are lost, and no others.
        """
        due: list[_Due] = []
        for saved in sessions:
            due += self._due(self.of(saved.session), saved.save_id.creation, saved.session.ttl_s)
        with suppress(SessionLost):
            self._write(due)

    def release(self, segments: Sequence[StoredSegment], creation: bytes) -> None:
        """Delete what no other session needs. Never fails: what remains expires by itself."""
        with suppress(GruServeError):
            if segments:
                self._server.call_all([("unlink", self._key(one.hash), "", 0, creation) for one in segments])

    def of(self, session: Session) -> list[StoredSegment]:
        """Return the stored segments of a session."""
        return stored_segments(session.text, self._segment_chars)

    def read(self, names: Sequence[tuple[bytes, int]], cached: Text | None) -> list[bytes | tuple[Segment, ...]]:
        """Return the stored segments with these hashes and ends, as `decode` requests it.

        cached: An older copy of the text, or None. What it has need not be read. Raises SessionLost, StoreUnavailable.
        """
        known = {}
        if cached is not None:
            known = {(one.hash, one.end): one.segments for one in stored_segments(cached, self._segment_chars)}
        missing = [name for name in names if name not in known]
        contents = {}
        if missing:
            try:
                found = self._server.execute([("HGET", self._key(name[0]), "c") for name in missing])
            except KeyOccupied:
                raise SessionLost(_LOST) from None
            contents = dict(zip(missing, found, strict=True))
        for name, content in contents.items():
            if content is None:
                self._server.require_intact(self._key(name[0]))
                raise SessionLost(_LOST)
        return [known[name] if name in known else contents[name] for name in names]

    def _due(self, segments: Sequence[StoredSegment], creation: bytes, ttl_s: float) -> list[_Due]:
        """Return those of a session's segments that may not live for `ttl_s`."""
        due = [_Due(one, self._key(one.hash), creation, self._lifetimes.extended_ms(ttl_s)) for one in segments]
        return [one for one in due if not self._lifetimes.suffices(one.name, ttl_s)]

    def _write(self, due: Sequence[_Due]) -> None:
        """Write what the server lacks. Raises SessionLost if a key has something else, after all others are written."""
        is_occupied = False
        for batch in batches(due, _BATCH):
            since = self._lifetimes.now()
            # Contents are sent only for what the server lacks: for a fork that is nothing.
            answers = self._server.call_all([one.call(b"") for one in batch], one_by_one=True)
            occupied = [one for one, answer in zip(batch, answers, strict=True) if answer[0] == b"refused"]
            is_occupied = is_occupied or bool(occupied)
            lacking = [one for one, answer in zip(batch, answers, strict=True) if answer[0] == b"none"]
            if lacking:
                first = {one.key: one for one in reversed(lacking)}  # forks lack the same segments
                self._server.call_all(
                    [one.call(content_of(one.stored.segments) if first[one.key] is one else b"") for one in lacking]
                )
            for one in batch:
                if one not in occupied:
                    self._lifetimes.note(one.name, one.ms, since)
        if is_occupied:
            raise SessionLost(_LOST)

    def _key(self, digest: bytes) -> str:
        """No session has this key: its part after the prefix has no slash."""
        return f"{self._prefix}segment:{digest.hex()}"
