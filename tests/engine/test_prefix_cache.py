"""The prefix cache: finds the longest known beginning, keeps to its size, forgets the least recently used."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.engine.prefix_cache import PrefixCache

HIDDEN = np.zeros((1, 4), np.float32)
ENTRY = 16 + 200  # bytes beside two a character


def state(number: float) -> np.ndarray:
    return np.full((1, 4), number, np.float32)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=8), max_size=30), st.text(alphabet="ab", max_size=12))
def test_it_finds_the_longest_beginning_that_is_known(texts: list[str], text: str) -> None:
    cache = PrefixCache(10**6)
    for known in texts:
        cache.put(known, state(len(known)))
    length, hidden = cache.longest(text)
    expected = max((len(known) for known in texts if text.startswith(known)), default=0)
    assert length == expected
    assert hidden is None if expected == 0 else hidden is not None and hidden[0, 0] == expected


def test_it_keeps_to_its_size_and_forgets_the_least_recently_used() -> None:
    cache = PrefixCache(3 * (ENTRY + 2))
    for text in ("a", "b", "c"):
        cache.put(text, HIDDEN)
    assert cache.longest("a")[0] == 1  # b is now the least recently used
    cache.put("d", HIDDEN)
    assert [cache.longest(text)[0] for text in "abcd"] == [1, 0, 1, 1]
    assert cache.num_bytes == 3 * (ENTRY + 2)


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=20), max_size=60), st.integers(0, 3000))
def test_its_size_is_that_of_what_is_in_it(texts: list[str], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    for text in texts:
        cache.put(text, HIDDEN)
    known = {text for text in texts if cache.longest(text)[0] == len(text)}
    assert cache.num_bytes == sum(2 * len(text) + ENTRY for text in known) <= max_bytes


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    cache = PrefixCache(1000)
    cache.put("a", HIDDEN)
    cache.put("b" * 1000, HIDDEN)
    assert cache.longest("a")[0] == 1
    assert cache.longest("b" * 1000) == (0, None)
    off = PrefixCache(0)
    off.put("a", HIDDEN)
    assert off.longest("a") == (0, None)


def test_a_hostile_set_of_texts_costs_a_bounded_search() -> None:
    # Each of these shares one character less with the text than the one after it.
    cache, text = PrefixCache(10**7), "a" * 1000
    cache.put("a", HIDDEN)
    for length in range(1, 1000):
        cache.put("a" * length + "A", HIDDEN)
    assert cache.longest(text)[0] in (0, 1)  # a miss is allowed: it changes no bit of any text
