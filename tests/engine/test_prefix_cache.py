"""The prefix cache finds the longest cached beginning, stays within its size and evicts the least recently used."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import prefix_cache
from service.engine.prefix_cache import CacheScope, PrefixCache

HIDDEN = np.zeros((1, 4), np.float32)
MINE = CacheScope("me")


def size_of(text: str) -> int:
    """The memory of an entry with HIDDEN."""
    cache = PrefixCache(10**9)
    cache.put(MINE, text, HIDDEN)
    return cache.num_bytes


def state(number: float) -> np.ndarray:
    return np.full((1, 4), number, np.float32)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=8), max_size=30), st.text(alphabet="ab", max_size=12))
def test_prefix_cache__finds_the_longest_cached_beginning(texts: list[str], text: str) -> None:
    cache = PrefixCache(10**6)
    for known in texts:
        cache.put(MINE, known, state(len(known)))
    length, hidden = cache.longest(MINE, text)
    expected = max((len(known) for known in texts if text.startswith(known)), default=0)
    assert length == expected
    assert hidden is None if expected == 0 else hidden is not None and hidden[0, 0] == expected


def test_prefix_cache__evicts_the_least_recently_used() -> None:
    cache = PrefixCache(3 * size_of("a"))
    for text in ("a", "b", "c"):
        cache.put(MINE, text, HIDDEN)
    assert cache.longest(MINE, "a")[0] == 1  # b is now the least recently used
    cache.put(MINE, "d", HIDDEN)
    assert [cache.longest(MINE, text)[0] for text in "abcd"] == [1, 0, 1, 1]
    assert cache.num_bytes == 3 * size_of("a")


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=20), max_size=60), st.integers(0, 8000))
def test_prefix_cache__size_is_the_sum_of_its_entries(texts: list[str], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    for text in texts:
        cache.put(MINE, text, HIDDEN)
    known = {text for text in texts if cache.longest(MINE, text)[0] == len(text)}
    assert cache.num_bytes == sum(map(size_of, known)) <= max_bytes


def test_prefix_cache__entries_larger_than_the_cache_are_not_stored() -> None:
    cache = PrefixCache(1000)
    cache.put(MINE, "a", HIDDEN)
    cache.put(MINE, "b" * 1000, HIDDEN)
    assert cache.longest(MINE, "a")[0] == 1
    assert cache.longest(MINE, "b" * 1000) == (0, None)
    off = PrefixCache(0)
    off.put(MINE, "a", HIDDEN)
    assert off.longest(MINE, "a") == (0, None)


def test_prefix_cache__search_in_adverse_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of these texts shares one more character with the searched text than the one before.
    cache, text = PrefixCache(10**7), "a" * 1000
    cache.put(MINE, "a", HIDDEN)
    for length in range(1, 1000):
        cache.put(MINE, "a" * length + "A", HIDDEN)
    compared: list[str] = []
    num_shared = prefix_cache._num_shared

    def record(one: str, other: str) -> int:
        compared.append(one)
        return num_shared(one, other)

    monkeypatch.setattr(prefix_cache, "_num_shared", record)
    assert cache.longest(MINE, text)[0] in (0, 1)  # a miss is allowed: it changes no text
    assert len(compared) <= prefix_cache._MAX_PROBES


def test_prefix_cache__finds_only_texts_of_the_same_owner_and_salt() -> None:
    cache = PrefixCache(10**6)
    cache.put(CacheScope("a"), "secret", state(1))
    cache.put(CacheScope("a", "x"), "secret", state(1))
    for scope in (CacheScope("b"), CacheScope(), CacheScope("", "a"), CacheScope("b", "x"), CacheScope("a", "y")):
        assert cache.longest(scope, "secret and more") == (0, None)
    assert cache.longest(CacheScope("a"), "secret and more")[0] == 6
    assert cache.longest(CacheScope("a", "x"), "secret and more")[0] == 6


def test_prefix_cache__owner_within_its_share_is_not_pushed_out() -> None:
    """However many texts and salts another owner sends, what this one has cached stays."""
    cache = PrefixCache(20 * size_of("mine 0"))
    mine = [f"mine {index}" for index in range(9)]
    for text in mine:
        cache.put(MINE, text, HIDDEN)
    for index in range(500):
        cache.put(CacheScope("greedy", str(index % 7)), f"text {index}", HIDDEN)
        assert cache.num_bytes <= 20 * size_of("mine 0")
    assert [cache.longest(MINE, text)[0] for text in mine] == [6] * 9
    assert (
        len([1 for index in range(500) if cache.longest(CacheScope("greedy", str(index % 7)), f"text {index}")[0]]) > 8
    )


@pytest.mark.parametrize("char", ["a", "\u0416", "\U0001f600"], ids=["1 byte", "2 bytes", "4 bytes"])
@pytest.mark.parametrize("num_chars", [1, 2000])
def test_prefix_cache__counts_the_memory_that_it_takes(char: str, num_chars: int) -> None:
    cache = PrefixCache(10**9)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for index in range(1000):
            # Joined, so that no text shares its memory with another.
            cache.put(CacheScope("me", "salt"), "".join([str(index), char * num_chars]), np.zeros((1, 64), np.float32))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 < taken / cache.num_bytes < 1.1
