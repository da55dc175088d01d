"""The cache of sessions: it holds the latest save of each, and no more bytes than it may."""

from __future__ import annotations

import numpy as np
import pytest

from service.sessions.cache import CachedSession, SaveId, SessionCache
from service.sessions.session import Session, SessionKey
from service.sessions.text import Text

KEY = SessionKey("", "a")


def cached(incarnation: bytes, revision: int, nonce: bytes, session_id: str = "a") -> CachedSession:
    text = Text(np.zeros((1, 16), np.float32), tail="ROMEO:")
    session = Session(session_id, "", "tiny@1", "ab", 7, 60, 0, 0, text, revision=revision)
    return CachedSession(session, SaveId(incarnation, revision, nonce))


@pytest.mark.parametrize(
    ("first", "second", "is_replaced"),
    [
        ((b"1", 1, b"n"), (b"1", 2, b"m"), True),
        ((b"1", 2, b"m"), (b"1", 1, b"n"), False),
        ((b"1", 9, b"m"), (b"2", 1, b"n"), True),  # the session was made anew
        ((b"2", 1, b"n"), (b"1", 9, b"m"), False),
        ((b"1", 2, b"n"), (b"1", 2, b"m"), True),  # parted histories: what the server has counts
        ((b"1", 2, b"m"), (b"1", 2, b"n"), True),
    ],
)
def test_cache__never_goes_back_to_an_older_save(
    first: tuple[bytes, int, bytes], second: tuple[bytes, int, bytes], is_replaced: bool
) -> None:
    cache = SessionCache(2**20)
    cache.put(KEY, cached(*first))
    num_bytes = cache.num_bytes
    cache.put(KEY, cached(*second))
    found = cache.get(KEY)
    assert found is not None
    assert found.save_id == SaveId(*(second if is_replaced else first))
    assert (len(cache), cache.num_bytes) == (1, num_bytes)


def test_cache__drops_the_least_recently_used_sessions() -> None:
    cache = SessionCache(2**20)
    cache.put(KEY, cached(b"1", 1, b"n"))
    cache = SessionCache(3 * cache.num_bytes)
    for session_id in "abc":
        cache.put(SessionKey("", session_id), cached(b"1", 1, b"n", session_id))
    cache.get(KEY)
    cache.put(SessionKey("", "d"), cached(b"1", 1, b"n", "d"))
    assert [cache.get(SessionKey("", one)) is not None for one in "abcd"] == [True, False, True, True]
    assert (len(cache), cache.num_evicted) == (3, 1)
    for session_id in "abcd":
        cache.drop(SessionKey("", session_id))
    assert (len(cache), cache.num_bytes) == (0, 0)
