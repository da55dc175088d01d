"""Small random automata for tests, and what they mean, told by a simple model that searches whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from service.arrays import Int32
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.dfa import Dfa


@cache
def random_automaton(seed: int, vocab_size: int) -> Automaton:
    """Return an automaton of a few states, each of which is reached and leads to a text that may end.

    Some of its texts may be continued without end, and some not; the empty one may be among them. Each class has a
    character.
    """
    rng = np.random.default_rng(seed)
    while True:
        num_states, num_classes = int(rng.integers(1, 9)), int(rng.integers(1, min(4, vocab_size) + 1))
        transitions = rng.integers(-2 if rng.random() < 0.7 else 0, num_states, (num_states, num_classes))
        table: Int32 = np.maximum(transitions, -1).astype(np.int32)
        accepting = rng.random(num_states) < rng.choice([0.2, 0.6])
        useful = reached(table, {0}) & {
            state for state in range(num_states) if any(accepting[other] for other in reached(table, {state}))
        }
        if 0 in useful:
            break
    order = sorted(useful)
    number = np.full(num_states + 1, -1, np.int32)
    number[order] = np.arange(len(order))
    classes = rng.integers(0, num_classes, vocab_size).astype(np.int32)
    classes[rng.permutation(vocab_size)[:num_classes]] = np.arange(num_classes)
    return Dfa(classes, number[table[order]], accepting[order]).automaton()


def reached(transitions: Int32, states: set[int]) -> set[int]:
    """Return all states that these lead to, themselves included."""
    found, new = set(states), list(states)
    while new:
        for following in transitions[new.pop()].tolist():
            if following >= 0 and following not in found:
                found.add(following)
                new.append(following)
    return found


def accepts(form: Automaton | None, text: Sequence[int]) -> bool:
    """Whether a form accepts a whole text; None accepts every one."""
    if form is None:
        return True
    state = form.walk(0, text)
    return state >= 0 and int(form.fewest[state]) == 0


def may_stop(form: Automaton | None, text: Sequence[int]) -> bool:
    """Whether a stop string may follow a text: it has the form, and may continue."""
    if not accepts(form, text):
        return False
    return form is None or any(form.next_state(form.walk(0, text), char) >= 0 for char in range(len(form.classes)))


def complete_stop(form: Automaton | None, stops: Sequence[Sequence[int]], text: Sequence[int]) -> int:
    """Return the characters of the longest stop string that ends a text, after a text of this form; 0 for none."""
    lengths = [
        len(stop)
        for stop in stops
        if list(text[len(text) - len(stop) :]) == list(stop) and may_stop(form, text[: len(text) - len(stop)])
    ]
    return max([length for length in lengths if length <= len(text)], default=0)


def undecided(form: Automaton | None, stops: Sequence[Sequence[int]], text: Sequence[int]) -> int:
    """Return how many of the last characters may turn out to belong to a stop string."""
    for length in range(len(text), 0, -1):
        end = list(text[len(text) - length :])
        if any(list(stop[:length]) == end for stop in stops) and may_stop(form, text[: len(text) - length]):
            return length
    return 0
