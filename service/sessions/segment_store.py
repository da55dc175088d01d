"""The stored segments of texts (record.py) in Redis: written once, shared by forks, there while they are needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from service.errors import GruServeError, SessionLost
from service.sessions.lifetimes import Lifetimes
from service.sessions.record import StoredSegment, content_of, stored_segments
from service.sessions.redis_server import RedisServer
from service.sessions.session import Session
from service.sessions.session_index import batches
from service.sessions.text import Segment, Text

_BATCH = 100  # segments in one exchange: they have some 8 KB each


class SegmentStore:
    """Writes and reads stored segments. Any number of threads may call.

    Each is a key of its own, a hash with the one field `c`. It expires by itself some minutes after the last session
    that needs it. A session's segments are written before the record that names them.

    Args:
        server: Where the sessions are stored.
        prefix: Of every key in Redis.
        segment_chars: See Retention.
    """

    def __init__(self, server: RedisServer, prefix: str, segment_chars: int) -> None:
        self._server, self._prefix, self._segment_chars = server, prefix, segment_chars
        self._lifetimes = Lifetimes()

    def write(self, segments: Sequence[StoredSegment], ttl_s: float) -> None:
        """Let a session's segments live as long as it does, and write those that are missing.

        Normally asks nothing of Redis, because this process did the same a short time ago. Raises StoreUnavailable.
        """
        if due := self._due(segments, ttl_s):
            self._server.check()
            self._write(due)

    def prolong(self, session: Session) -> None:
        """Do the same when a session is used that is not saved. Never fails: its next save does it again."""
        with suppress(GruServeError):
            self.write(stored_segments(session.text, self._segment_chars), session.ttl_s)

    def restore(self, sessions: Sequence[Session]) -> None:
        """Do the same after a restart of Redis, also while it admits nobody else. Raises StoreUnavailable."""
        self._lifetimes.clear()
        due: dict[str, tuple[StoredSegment, float]] = {}
        for session in sessions:
            segments = stored_segments(session.text, self._segment_chars)
            for key, (stored, ttl_s) in self._due(segments, session.ttl_s).items():
                due[key] = stored, max(ttl_s, due[key][1] if key in due else 0)
        self._write(due)

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
            contents = dict(
                zip(missing, self._server.execute([("HGET", self._key(name[0]), "c") for name in missing]), strict=True)
            )
        if None in contents.values():
            raise SessionLost("the session store has lost a part of this session's text: continue under another id")
        return [known[name] if name in known else contents[name] for name in names]

    def _due(self, segments: Sequence[StoredSegment], ttl_s: float) -> dict[str, tuple[StoredSegment, float]]:
        """Return, by key, those segments that may not live for `ttl_s`; and `ttl_s`."""
        keys = {self._key(one.hash): one for one in segments}
        return {key: (one, ttl_s) for key, one in keys.items() if not self._lifetimes.suffices(key, ttl_s)}

    def _write(self, due: dict[str, tuple[StoredSegment, float]]) -> None:
        for batch in batches(due.items(), _BATCH):
            began = time.monotonic()
            lives = [(key, stored, self._lifetimes.extended_ms(ttl_s)) for key, (stored, ttl_s) in batch]
            # Contents are sent only for what the server lacks: for a fork that is nothing.
            answers = self._server.call_all([("segment", key, "", 0, ms, "") for key, _, ms in lives])
            lacking = [one for one, answer in zip(lives, answers, strict=True) if answer[0] != b"ok"]
            if lacking:
                self._server.call_all(
                    [("segment", key, "", 0, ms, content_of(stored.segments)) for key, stored, ms in lacking]
                )
            for key, _, ms in lives:
                self._lifetimes.note(key, ms, began)

    def _key(self, digest: bytes) -> str:
        """No session has this key: its part after the prefix has no slash."""
        return f"{self._prefix}segment:{digest.hex()}"
