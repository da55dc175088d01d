"""Deterministic automata as dense tables: only the states that matter, merged where they are equivalent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import Ids, Int32
from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.automaton.budget import Budget, check_table

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Dfa:
    """A deterministic automaton. State 0 is the start; with no states at all, no text is accepted."""

    classes: Int32  # (V,): the class of each character, from 0 to C - 1
    transitions: Int32  # (S, C): the next state, -1: none
    accepting: Bools  # (S,)

    def minimised(self, budget: Budget) -> Dfa:
        """Return the minimal automaton of the same texts, each of whose states leads to an accepting one.

        Every state must be reachable from state 0. Equal languages give equal tables: classes are numbered in the order
        of their first characters, and states in the order in which a search in breadth finds them.
        """
        num_states, num_classes = self.transitions.shape
        budget.spend(num_states * (num_classes + 20) // 10)
        edges = _edges(self.transitions)
        budget.spend(4 * len(edges[0]))
        fewest = _fewest(self.accepting, *edges)
        useful = np.flatnonzero(fewest < NEVER)
        if not len(useful) or useful[0] != 0:
            return Dfa(np.zeros_like(self.classes), np.zeros((0, 1), np.int32), np.zeros(0, np.bool_))
        number = np.full(num_states + 1, -1, np.int32)  # the last entry stays -1
        number[useful] = np.arange(len(useful))
        transitions = number[self.transitions[useful]]
        most = _most(fewest, *edges)
        blocks = _blocks(transitions, fewest[useful], most[useful], _renumbered(edges, number), budget)
        return _quotient(Dfa(self.classes, transitions, self.accepting[useful]), blocks)

    def renumbered(self) -> Dfa:
        """Return this automaton, which must be minimal already, as `minimised` does."""
        return _quotient(self, np.arange(len(self.accepting)))

    def automaton(self) -> Automaton:
        """Return the tables for the engine. This automaton must be minimised, and have states."""
        fewest = _fewest(self.accepting, *_edges(self.transitions))
        none = np.zeros(len(fewest), np.int32)
        for table in (self.classes, self.transitions, fewest, none):
            table.flags.writeable = False
        return Automaton(self.classes, self.transitions, fewest, none, none)

    def intersection(self, other: Dfa, budget: Budget) -> Dfa:
        """Return the minimal automaton of the texts that both accept."""
        return self._product(other, budget, is_difference=False)

    def difference(self, other: Dfa, budget: Budget) -> Dfa:
        """Return the minimal automaton of the texts that this one accepts, and the other one doesn't."""
        return self._product(other, budget, is_difference=True)

    def _product(self, other: Dfa, budget: Budget, *, is_difference: bool) -> Dfa:
        if not len(self.accepting) or (not len(other.accepting) and not is_difference):
            return Dfa(self.classes, np.zeros((0, 1), np.int32), np.zeros(0, np.bool_))
        if not len(other.accepting):
            return self
        pairs, classes = _distinct(self.classes.astype(np.int64) * other.transitions.shape[1] + other.classes)
        mine, theirs = np.divmod(pairs, other.transitions.shape[1])
        left = self.transitions[:, mine].tolist()
        right = [*other.transitions[:, theirs].tolist(), [-1] * len(pairs)]  # the last state is reached by -1
        numbers = {(0, 0): 0}
        queue = [(0, 0)]
        table: list[list[int]] = []
        for one, two in queue:
            budget.spend(10 + len(pairs))
            row = [-1] * len(pairs)
            for index, (a, b) in enumerate(zip(left[one], right[two], strict=True)):
                if a >= 0 and (b >= 0 or is_difference):
                    number = numbers.setdefault((a, b), len(queue))
                    if number == len(queue):
                        check_table(number + 1, len(pairs))
                        queue.append((a, b))
                    row[index] = number
            table.append(row)
        ends = [*other.accepting.tolist(), False]
        accepting = [bool(self.accepting[one]) and ends[two] is not is_difference for one, two in queue]
        dfa = Dfa(classes.astype(np.int32), np.array(table, np.int32), np.array(accepting, np.bool_))
        return dfa.minimised(budget)


def _edges(transitions: Int32) -> tuple[Ids, Ids]:
    """Return the targets and the sources of all different edges between states, in the order of their targets."""
    num_states = len(transitions)
    sources, columns = np.nonzero(transitions >= 0)
    edges = np.unique(transitions[sources, columns].astype(np.int64) * num_states + sources)
    targets, sources = np.divmod(edges, max(num_states, 1))
    return targets, sources


def _renumbered(edges: tuple[Ids, Ids], number: Int32) -> tuple[Ids, Ids]:
    """Return the edges between states that have a number of at least 0, with these numbers, which ascend."""
    targets, sources = (number[ends] for ends in edges)
    both = (targets >= 0) & (sources >= 0)
    return targets[both].astype(np.int64), sources[both].astype(np.int64)


def _fewest(accepting: Bools, targets: Ids, sources: Ids) -> Int32:
    """Return (S,) the fewest characters from each state to an accepting one; NEVER if it can't be reached."""
    starts, before = _by_target(len(accepting), targets, sources)
    queue = deque(np.flatnonzero(accepting).tolist())
    near: list[int] = np.where(accepting, 0, NEVER).tolist()
    while queue:
        state = queue.popleft()
        for source in before[starts[state] : starts[state + 1]]:
            if near[source] == NEVER:
                near[source] = near[state] + 1
                queue.append(source)
    return np.array(near, np.int32)


def _most(fewest: Int32, targets: Ids, sources: Ids) -> Int32:
    """Return (S,) the most characters from each state to an accepting one; NEVER also if there is no limit."""
    num_states = len(fewest)
    starts, before = _by_target(num_states, targets, sources)
    # States whose followers are all known have a longest text. Those on a circle, or before one, are never known.
    useful = fewest < NEVER
    waiting = np.bincount(sources[useful[targets]], minlength=num_states).tolist()
    far = [NEVER] * num_states
    ready = [state for state, left in enumerate(waiting) if left == 0 and useful[state]]
    longest = [0] * num_states
    for state in ready:
        far[state] = longest[state]
        for source in before[starts[state] : starts[state + 1]]:
            longest[source] = max(longest[source], longest[state] + 1)
            waiting[source] -= 1
            if waiting[source] == 0:
                ready.append(source)
    return np.array(far, np.int32)


def _by_target(num_states: int, targets: Ids, sources: Ids) -> tuple[list[int], list[int]]:
    """Return where the sources of each state begin among those of all, and these."""
    return np.searchsorted(targets, np.arange(num_states + 1)).tolist(), sources.tolist()


def _blocks(transitions: Int32, fewest: Int32, most: Int32, edges: tuple[Ids, Ids], budget: Budget) -> Ids:
    """Return (S,): the number of each state's class of equivalent states.

    Moore's refinement, of only those states in each round that lead to one whose number has changed. It begins with the
    fewest and the most characters up to the end, which differ only in states that are not equivalent: long chains are
    told apart at once.
    """
    num_states, num_classes = transitions.shape
    targets, sources = edges
    starts = np.searchsorted(targets, np.arange(num_states + 1))
    blocks = np.unique(fewest.astype(np.int64) * (NEVER + 1) + most, return_inverse=True)[1].reshape(-1)
    num_blocks = int(blocks.max()) + 1
    waiting = np.arange(num_states)
    while len(waiting):
        budget.spend(700 + num_states // 50 + len(waiting) * (num_classes + 30) // 30)
        following = transitions[waiting]
        rows = np.concatenate([blocks[waiting, None], np.where(following < 0, -1, blocks[following])], axis=1)
        groups, first = row_blocks(rows)
        # States of a block were alike before the last round. Those that did not wait still are, and keep it: the
        # others lead to numbers that are new. If all of them waited, the largest group keeps the number.
        block_of = rows[first, 0]
        all_waited = np.bincount(rows[:, 0], minlength=num_blocks) == np.bincount(blocks, minlength=num_blocks)
        order = np.lexsort((-np.bincount(groups), block_of))
        is_largest = np.ones(len(order), np.bool_)
        is_largest[1:] = block_of[order[1:]] != block_of[order[:-1]]
        is_new = np.ones(len(order), np.bool_)
        is_new[order] = ~(is_largest & all_waited[block_of[order]])
        number = np.where(is_new, num_blocks + np.cumsum(is_new) - 1, block_of)
        num_blocks += int(np.count_nonzero(is_new))
        changed = waiting[is_new[groups]]
        blocks[waiting] = number[groups]
        counts = starts[changed + 1] - starts[changed]
        places = np.repeat(starts[changed] - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        waiting = np.unique(sources[places])
    return np.unique(blocks, return_inverse=True)[1].reshape(-1)


def row_blocks(rows: NDArray[Any]) -> tuple[Ids, Ids]:
    """Return (N,): a number for each of the N rows, the same for equal ones; and (B,) the first row of each number.

    By hashes, which is far faster than by sorting rows, and checked.
    """
    random = np.random.default_rng(0)
    while True:
        factors = random.integers(1, 2**63, rows.shape[1], np.uint64)
        hashes = (_mixed(rows.astype(np.uint64)) * factors).sum(axis=1, dtype=np.uint64)
        first, blocks = np.unique(hashes, return_index=True, return_inverse=True)[1:]
        blocks = blocks.reshape(-1)
        # Hashes may be equal by chance or by design: then others are tried.
        if (rows[first[blocks]] == rows).all():
            return blocks, first


def _distinct(values: Ids) -> tuple[Ids, Ids]:
    """Return the different values in ascending order, and (N,) the index of each value among them; none is negative."""
    if int(values.max()) > 4 * len(values) + 10_000:
        found, indices = np.unique(values, return_inverse=True)
        return found, indices.reshape(-1)
    found = np.flatnonzero(np.bincount(values))
    places = np.zeros(int(found[-1]) + 1, np.int64)
    places[found] = np.arange(len(found))
    return found, places[values]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the values with their bits mixed, so that sums of multiples of them are good hashes."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(values ^ (values >> np.uint64(29)))


def _quotient(dfa: Dfa, blocks: Ids) -> Dfa:
    """Return the automaton whose states are the blocks, with classes and states in their order."""
    num_blocks = int(blocks.max()) + 1
    states = np.zeros(num_blocks, np.int64)
    states[blocks] = np.arange(len(blocks))
    rows = dfa.transitions[states]
    rows = np.where(rows < 0, -1, blocks[rows])
    columns, columns_of = row_blocks(rows.T)
    classes = columns[dfa.classes]
    firsts = np.full(len(columns_of), len(classes))
    firsts[classes[::-1]] = np.arange(len(classes))[::-1]
    present = np.argsort(firsts, kind="stable")[
        : np.count_nonzero(firsts < len(classes))
    ]  # not columns of no character
    places = np.zeros(len(columns_of), np.int64)
    places[present] = np.arange(len(present))
    rows = rows[:, columns_of[present]]
    number = np.full(num_blocks + 1, -1, np.int64)  # the last entry stays -1
    order = [int(blocks[0])]
    number[order[0]] = 0
    followers = rows.tolist()
    seen = {-1, *order}
    for block in order:
        for target in followers[block]:
            if target not in seen:
                seen.add(target)
                number[target] = len(order)
                order.append(target)
    table = np.ascontiguousarray(number[rows[order]], np.int32)
    return Dfa(places[classes].astype(np.int32), table, dfa.accepting[states[order]])
