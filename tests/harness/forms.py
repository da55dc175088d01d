"""Forms of text for tests and benchmarks, and texts that are drawn from automata."""

from __future__ import annotations

import numpy as np

from service.engine.automaton.automaton import Automaton


def sample(automaton: Automaton, charset: str, random: np.random.Generator, max_chars: int) -> str:
    """Return a text that an automaton accepts, of at most `max_chars` characters: each next one with equal chances.

    It ends where nothing may follow and, with equal chances, where it may end.
    """
    state, text = 0, ""
    while not automaton.must_end(state, max_chars - len(text)):
        chars = np.flatnonzero(automaton.allowed(state, max_chars - len(text)))
        choice = int(random.integers(len(chars) + (automaton.fewest[state] == 0)))
        if choice == len(chars):
            break
        text += charset[chars[choice]]
        state = automaton.next_state(state, int(chars[choice]))
    assert automaton.fewest[state] == 0
    return text
