"""The prefix cache finds the longest cached beginning, stays within its size and evicts the least recently used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import prefix_cache
from service.engine.prefix_cache import PrefixCache

HIDDEN = np.zeros((1, 4), np.float32)
ENTRY = 16 + 200  # bytes of an entry beside two per character


def state(number: float) -> np.ndarray:
    return np.full((1, 4), number, np.float32)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=8), max_size=30), st.text(alphabet="ab", max_size=12))
def test_prefix_cache__finds_the_longest_cached_beginning(texts: list[str], text: str) -> None:
    cache = PrefixCache(10**6)
    for known in texts:
        cache.put(known, state(len(known)))
    length, hidden = cache.longest(text)
    expected = max((len(known) for known in texts if text.startswith(known)), default=0)
    assert length == expected
    assert hidden is None if expected == 0 else hidden is not None and hidden[0, 0] == expected


def test_prefix_cache__evicts_the_least_recently_used() -> None:
    cache = PrefixCache(3 * (ENTRY + 2))
    for text in ("a", "b", "c"):
        cache.put(text, HIDDEN)
    assert cache.longest("a")[0] == 1  # b is now the least recently used
    cache.put("d", HIDDEN)
    assert [cache.longest(text)[0] for text in "abcd"] == [1, 0, 1, 1]
    assert cache.num_bytes == 3 * (ENTRY + 2)


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=20), max_size=60), st.integers(0, 3000))
def test_prefix_cache__size_is_the_sum_of_its_entries(texts: list[str], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    for text in texts:
        cache.put(text, HIDDEN)
    known = {text for text in texts if cache.longest(text)[0] == len(text)}
    assert cache.num_bytes == sum(2 * len(text) + ENTRY for text in known) <= max_bytes


def test_prefix_cache__entries_larger_than_the_cache_are_not_stored() -> None:
    cache = PrefixCache(1000)
    cache.put("a", HIDDEN)
    cache.put("b" * 1000, HIDDEN)
    assert cache.longest("a")[0] == 1
    assert cache.longest("b" * 1000) == (0, None)
    off = PrefixCache(0)
    off.put("a", HIDDEN)
    assert off.longest("a") == (0, None)


def test_prefix_cache__search_in_adverse_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of these texts shares one more character with the searched text than the one before.
    cache, text = PrefixCache(10**7), "a" * 1000
    cache.put("a", HIDDEN)
    for length in range(1, 1000):
        cache.put("a" * length + "A", HIDDEN)
    compared: list[str] = []
    num_shared = prefix_cache._num_shared

    def record(one: str, other: str) -> int:
        compared.append(one)
        return num_shared(one, other)

    monkeypatch.setattr(prefix_cache, "_num_shared", record)
    assert cache.longest(text)[0] in (0, 1)  # a miss is allowed: it changes no text
    assert len(compared) <= prefix_cache._MAX_PROBES
