"""One of some strings: a minimal automaton without circles, whose states are shared by prefixes and by suffixes.

Built with arrays for each length and height instead of character by character, so 10,000 strings take milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from service.arrays import Ids
from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.budget import TooLarge, check_table
from service.engine.automaton.dfa import Bools, Dfa, row_blocks
from service.errors import InvalidValue, plural

MAX_CHOICES = 10_000
MAX_CHOICE_CHARS = 200_000  # of all choices together
MAX_CHOICE = 1_000  # characters of one


def read_choices(value: str) -> list[str]:
    """Return the strings of a JSON list. Raises InvalidValue."""
    try:
        choices = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidValue("the choices are not a JSON list") from error
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise InvalidValue("the choices are not a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidValue(f"there are {plural(len(choices), 'choice', ',')}; 1 to {MAX_CHOICES:,} are supported")
    longest = max(range(len(choices)), key=lambda index: len(choices[index]))
    if len(choices[longest]) > MAX_CHOICE:
        raise InvalidValue(
            f"choice {longest} has {len(choices[longest]):,} characters; at most {MAX_CHOICE:,} are supported"
        )
    if (num_chars := sum(map(len, choices))) > MAX_CHOICE_CHARS:
        raise InvalidValue(
            f"the choices have {num_chars:,} characters together; at most {MAX_CHOICE_CHARS:,} are supported"
        )
    return choices


def choice_dfa(choices: Sequence[str], alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of some strings, without those that have other characters than the alphabet's.

    Raises InvalidValue.
    """
    try:
        return _choice_dfa(choices, alphabet)
    except TooLarge as error:
        raise InvalidValue(f"the choices are too large: {error}; send fewer, or shorter ones") from error


def _choice_dfa(choices: Sequence[str], alphabet: Alphabet) -> Dfa:
    alphabet.budget.spend(10 * len(choices) + sum(map(len, choices)))
    strings = sorted(set(choices))
    chars = sorted(set().union(*strings))
    ids = alphabet.indices(np.fromiter(map(ord, chars), np.int64, len(chars)))
    unknown = {char for char, id_ in zip(chars, ids.tolist(), strict=True) if id_ < 0}
    if unknown:
        alphabet.missing |= dict.fromkeys(char for one in choices for char in one if char in unknown)
        strings = [one for one in strings if unknown.isdisjoint(one)]
        if not strings:
            return Dfa(np.zeros(alphabet.num_chars, np.int32), np.zeros((0, 1), np.int32), np.zeros(0, np.bool_))
    parents, labels, levels, accepting = _trie(strings)
    nodes, order = _merged(parents, labels, levels, accepting, alphabet)
    present, columns = np.unique(labels, return_inverse=True)
    check_table(len(order), len(present) + 1)
    transitions = np.full((len(order), len(present) + 1), -1, np.int32)  # the last column is that of other characters
    transitions[nodes[parents], columns.reshape(-1)] = nodes[1:]
    classes = np.full(alphabet.num_chars, len(present), np.int32)
    classes[alphabet.indices(present)] = np.arange(len(present))
    return Dfa(classes, transitions, accepting[order]).renumbered()


def _trie(strings: Sequence[str]) -> tuple[Ids, Ids, Ids, Bools]:
    """Return the trie of sorted, distinct strings. Node 0 is its root, and a node is after its parent.

    Returns: (N - 1,) the parents of nodes 1 to N - 1; (N - 1,) the code points with which they are reached, ascending
    among the children of a node; (D + 1,) the first node of each depth, and N; (N,) whether a string ends there.
    """
    points = np.frombuffer("".join(strings).encode("utf-32-le"), np.uint32).astype(np.int64)
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    starts = np.cumsum(lengths) - lengths
    alive = np.arange(len(strings))  # strings that are longer than the depth
    nodes = np.zeros(len(strings), np.int64)  # where they are
    parents, labels, levels = [], [], [0]
    ends = [int(lengths[0] == 0)]
    accepting = [np.array(ends, np.bool_)]
    num_nodes = 1
    for depth in range(int(lengths.max())):
        keep = lengths[alive] > depth
        alive, nodes = alive[keep], nodes[keep]
        chars = points[starts[alive] + depth]
        # Strings are sorted, so those that share a node are neighbours.
        is_new = np.ones(len(alive), np.bool_)
        is_new[1:] = (nodes[1:] != nodes[:-1]) | (chars[1:] != chars[:-1])
        firsts = np.flatnonzero(is_new)
        parents.append(nodes[firsts])
        labels.append(chars[firsts])
        levels.append(num_nodes)
        nodes = num_nodes + np.cumsum(is_new) - 1
        accepting.append(lengths[alive[firsts]] == depth + 1)  # the shortest string of a node is its first
        num_nodes += len(firsts)
    levels.append(num_nodes)
    none = [np.zeros(0, np.int64)]
    return (
        np.concatenate(parents or none),
        np.concatenate(labels or none),
        np.array(levels),
        np.concatenate(accepting),
    )


def _merged(parents: Ids, labels: Ids, levels: Ids, accepting: Bools, alphabet: Alphabet) -> tuple[Ids, Ids]:
    """Return (N,): the state of each node, equal for nodes with the same continuations; and (S,) a node of each state.

    State 0 is that of the root. Nodes are merged by their heights, leaves first.
    """
    num_nodes = len(accepting)
    heights = np.zeros(num_nodes, np.int64)
    for first, last in zip(levels[-2:0:-1].tolist(), levels[:1:-1].tolist(), strict=True):
        np.maximum.at(heights, parents[first - 1 : last - 1], heights[first:last] + 1)
    by_height = np.argsort(heights, kind="stable")
    bounds = np.searchsorted(heights[by_height], np.arange(int(heights[0]) + 2)).tolist()
    num_children = np.bincount(parents, minlength=num_nodes)
    first_child = 1 + np.searchsorted(parents, np.arange(num_nodes))  # parents ascend
    state_of = np.zeros(num_nodes, np.int64)
    order: list[Ids] = []
    num_states = 0
    for begin, end in pairwise(bounds):
        nodes = by_height[begin:end]
        # Nodes with equally many children are compared as rows: whether a string ends, labels, states of children.
        for count in np.unique(num_children[nodes]).tolist():
            alike = nodes[num_children[nodes] == count]
            alphabet.budget.spend(100 + len(alike) * (count + 3) // 10)
            children = first_child[alike][:, None] + np.arange(count)
            rows = np.concatenate([accepting[alike][:, None], labels[children - 1], state_of[children]], axis=1)
            blocks, representatives = row_blocks(rows.astype(np.int64))
            state_of[alike] = num_states + blocks
            order.append(alike[representatives])
            num_states += len(representatives)
        check_table(num_states, 2)
    nodes_of = np.concatenate(order)[::-1]  # the root is the highest node, and the last
    return num_states - 1 - state_of, nodes_of
