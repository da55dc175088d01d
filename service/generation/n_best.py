"""The n likeliest texts that may follow a text: an exact best-first search over the states of the network.

A text gets less likely with every character. So the search always continues the likeliest beginnings that it has, and
a whole text is one of the likeliest as soon as no beginning that is left is likelier.

An automaton says which texts are whole. `Ends` says how a whole text ends:

- `seen`: another character follows that can't belong to the text. A text that may end and may also get longer counts
  with the probability that it ends here: the sum over these characters. If nothing may follow, that is certain.
- `forced`: only where nothing may follow, as a generated text ends.
"""

from __future__ import annotations

import heapq
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.arrays import Float32, Float64, Ids, Int32
from service.engine import arithmetic
from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.scores import Distribution
from service.engine.short_text import ShortText
from service.generation.branches import Branches
from service.generation.candidates import Origin, states_as_scores
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModel

Ends = Literal["seen", "forced"]

MAX_N = 64
MAX_STEPS = 2048  # beginnings that a search continues before it settles for texts that may not be the likeliest
_ROUND = 8  # beginnings that are continued side by side
_RESERVED = 64  # beginnings whose memory is reserved at a time
_MAX_FOLLOWING = 512  # characters after a beginning that a search considers; those of large charsets are not all stored
_NODE_SCORES = 100  # log-probabilities that take as much memory as the objects of a node
_APOSTROPHES = "'\u2019"
_NOTHING: Ids = np.empty(0, np.int64)


@dataclass(frozen=True)
class Wanted:
    """Which texts are searched."""

    n: int
    max_chars: int  # of a text, > 0
    form: Automaton  # which texts are whole; an empty one is only found if nothing may follow, with `forced`
    ends: Ends = "seen"
    max_steps: int = MAX_STEPS


@dataclass(frozen=True)
class Found:
    """A whole text."""

    ids: tuple[int, ...]
    logprob: float  # of the text and its end, in nats


@dataclass(frozen=True)
class NBest:
    """What a search has found."""

    texts: Sequence[Found]  # the likeliest first; equally likely ones in the order of their ids
    is_exact: bool  # no other text is likelier than these, and if they are fewer than n, there are no others
    num_stepped: int  # characters that the network has read


def n_best(
    model: LoadedModel,
    origin: Origin,
    wanted: Wanted,
    reserve: Callable[[int], None] = lambda _: None,
    client_has_left: Callable[[], bool] | None = None,
) -> NBest:
    """Return the n likeliest whole texts that may follow a text.

    A search that would need more than `max_steps` ends with the likeliest of the texts that it has found, and of those
    that a beam search of width n finds.

    Args:
        model: the model.
        origin: what the texts follow.
        wanted: which texts.
        reserve: is called again and again with the number of log-probabilities that take as much memory as the search,
            and may refuse them.
        client_has_left: returns true if nobody waits for the result any more.

    Raises Overloaded, EngineFailed, ClientGone.
    """
    search = _Search(model, origin, wanted, reserve, Branches(model, client_has_left))
    return search.run()


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class _Node:
    """A beginning that was continued, and what may follow it."""

    ids: tuple[int, ...]
    hidden: Float32  # (L, H), the state after them
    chars: Int32  # (k,), the characters that may follow, the likeliest first
    logprobs: Float64  # (k,), of the texts with these characters
    states: Int32  # (k,), of the automaton, after these characters
    are_whole: NDArray[np.bool_]  # (k,), whether the texts with these characters end there for certain

    def entry(self, place: int) -> _Entry:
        """Return the text with the character at a place."""
        ids = (*self.ids, self.chars.item(place))
        return (-self.logprobs.item(place), int(self.are_whole[place]), ids, self.states.item(place), self, place)


# A text in the queue: its negative log-probability; 0 if it is a beginning and 1 if it is whole; its ids; the state of
# the automaton; and the node and the place in it from which the text was made. At equal likelihood, beginnings are
# first: they may become whole texts that are as likely, and whose ids are smaller. No two texts of a kind have the same
# ids, so later parts are never compared.
_Entry = tuple[float, int, tuple[int, ...], int, "_Node | None", int]
_ROOT: _Entry = (-0.0, 0, (), 0, None, 0)


class _Search:
    def __init__(
        self,
        model: LoadedModel,
        origin: Origin,
        wanted: Wanted,
        reserve: Callable[[int], None],
        branches: Branches,
    ) -> None:
        self._origin, self._wanted, self._branches, self._reserve = origin, wanted, branches, reserve
        self._node_scores = _node_scores(model, wanted.max_chars)
        self._classes = np.unique(wanted.form.classes)  # an automaton may have classes without characters
        self._num_nodes = self._num_reserved = 0
        self._queue: list[_Entry] = [_ROOT]
        self._left_out = -math.inf  # the log-probability of the likeliest beginning that was not considered
        self._best: list[float] = []  # a heap: the log-probabilities of the n likeliest whole texts so far

    def run(self) -> NBest:
        if self._wanted.ends == "forced" and self._are_whole(np.zeros(1, np.int32), self._wanted.max_chars)[0]:
            return NBest([Found((), 0.0)], is_exact=True, num_stepped=0)
        found: list[_Entry] = []
        is_exact = True
        while batch := self._likeliest(found):
            if self._num_nodes + len(batch) > self._wanted.max_steps:
                is_exact = False
                break
            for node, whole in self._continued(batch):
                self._add(node, 0)
                if whole is not None:
                    self._push(whole)
        if not is_exact:
            whole_ones = self._likeliest_whole((*found, *self._queue))
            self._queue, found = [], []
            self._num_reserved = 0  # the nodes of this search are free; a beam search needs fewer
            found = self._likeliest_whole((*whole_ones, *self._beam()))
        elif self._left_out > -math.inf:
            is_exact = len(found) == self._wanted.n and -found[-1][0] > self._left_out
        texts = [Found(ids, -negative) for negative, _, ids, *_ in found]
        return NBest(texts, is_exact, self._branches.num_stepped)

    def _likeliest_whole(self, entries: Iterable[_Entry]) -> list[_Entry]:
        """Return the n likeliest whole texts, each once, without the nodes from which they were made."""
        texts = {entry[2]: (*entry[:4], None, 0) for entry in entries if entry[1]}
        return heapq.nsmallest(self._wanted.n, texts.values())

    def _likeliest(self, found: list[_Entry]) -> list[_Entry]:
        """Return the beginnings to continue next, and move whole texts that are likelier than all of them to `found`.

        Those are beginnings that are likelier than the n-th whole text in the queue: most of them would have to be
        continued in any order. Returns none if the search is over.
        """
        batch: list[_Entry] = []
        later: list[_Entry] = []
        while self._queue and len(batch) < _ROUND and len(found) + len(later) < self._wanted.n:
            entry = heapq.heappop(self._queue)
            if entry[4] is not None:
                self._add(entry[4], entry[5] + 1)
            if not entry[1]:
                batch.append(entry)
            elif batch:
                later.append((*entry[:4], None, 0))
            else:
                found.append(entry)
        for entry in later:
            heapq.heappush(self._queue, entry)
        return batch

    def _add(self, node: _Node, place: int) -> None:
        """Queue the text of a node with the character at a place. The next ones follow when this one is taken."""
        if place < len(node.chars):
            self._push(node.entry(place))

    def _push(self, entry: _Entry) -> None:
        logprob, is_full = -entry[0], len(self._best) == self._wanted.n
        if is_full and logprob < self._best[0]:
            return  # nothing that begins with it can be among the n likeliest
        if entry[1]:
            (heapq.heappushpop if is_full else heapq.heappush)(self._best, logprob)
        heapq.heappush(self._queue, entry)

    def _continued(self, batch: Sequence[_Entry]) -> list[tuple[_Node, _Entry | None]]:
        """Return a node for each beginning, and the text that ends there, if it may."""
        self._num_nodes += len(batch)
        if self._num_nodes > self._num_reserved:
            self._num_reserved = -(-self._num_nodes // _RESERVED) * _RESERVED
            self._reserve(self._num_reserved * self._node_scores)
        grown = self._branches.grow([self._branch(entry) for entry in batch])
        return [self._node(entry, one.hidden, one.next) for entry, one in zip(batch, grown, strict=True) if one.next]

    def _branch(self, entry: _Entry) -> ShortText:
        ids, node = entry[2], entry[4]
        if node is None:
            return ShortText(self._origin.hidden, self._origin.position, _NOTHING, is_root=True, wants_next=True)
        position = self._origin.position + len(node.ids)
        return ShortText(node.hidden, position, np.array(ids[-1:], np.int64), wants_next=True)

    def _node(self, entry: _Entry, hidden: Float32, after: Distribution) -> tuple[_Node, _Entry | None]:
        negative, _, ids, state, _, _ = entry
        form, left = self._wanted.form, self._wanted.max_chars - len(ids)
        following = form.transitions[state, form.classes[after.ids]]
        logprobs = after.logprobs.astype(np.float64) - negative
        whole = None
        if ids and self._wanted.ends == "seen" and not form.fewest[state] and (following < 0).any():
            end = _log_sum(after.logprobs[following < 0])
            whole = (negative - end, 1, ids, state, None, 0)
        possible = (following >= 0) & (form.fewest[following] < left)
        if len(self._best) == self._wanted.n:
            possible &= logprobs >= self._best[0]
        chars, logprobs, following = after.ids[possible], logprobs[possible], following[possible]
        order = np.lexsort((chars, -logprobs))
        if len(order) > _MAX_FOLLOWING:
            self._left_out = max(self._left_out, float(logprobs[order[_MAX_FOLLOWING]]))
            order = order[:_MAX_FOLLOWING]
        following = following[order].astype(np.int32)
        are_whole = self._are_whole(following, left - 1)
        return _Node(ids, hidden, chars[order].astype(np.int32), logprobs[order], following, are_whole), whole

    def _are_whole(self, states: Int32, left: int) -> NDArray[np.bool_]:
        """Return (k,): whether texts in these states, which may get `left` more characters, end there for certain."""
        form = self._wanted.form
        if self._wanted.ends == "forced":
            is_end = form.fewest_after[states] > left
        else:
            is_end = form.fewest_after[states] == NEVER
            if left == 0:  # nothing shows the end of a text that any character may continue
                is_end |= (form.transitions[states][:, self._classes] >= 0).all(axis=1)
        return np.asarray((form.stop_chars[states] > 0) | ((form.fewest[states] == 0) & is_end))

    def _beam(self) -> list[_Entry]:
        """Return the likeliest whole texts that a beam search of width n finds."""
        found: list[_Entry] = []
        beam: list[_Entry] = [_ROOT]
        while beam:
            self._num_nodes = 0  # those of the round before are not needed any more
            continued = self._continued(beam)
            nodes = [node for node, _ in continued]
            whole_ones = [whole for _, whole in continued if whole is not None]
            found = self._likeliest_whole((*found, *whole_ones, *self._likeliest_of(nodes, are_whole=True)))
            beam = self._likeliest_of(nodes, are_whole=False)
        return found

    def _likeliest_of(self, nodes: Sequence[_Node], *, are_whole: bool) -> list[_Entry]:
        """Return the n likeliest whole texts or beginnings that some nodes have."""
        n = self._wanted.n
        places = (
            (-node.logprobs.item(place), number, place)
            for number, node in enumerate(nodes)
            for place in np.flatnonzero(node.are_whole == are_whole)[:n].tolist()
        )
        return [nodes[number].entry(place) for _, number, place in heapq.nsmallest(n, places)]


def affordable_steps(model: LoadedModel, max_chars: int, max_per_client: int) -> int:
    """Return the `max_steps` of a search that reserves at most half of the log-probabilities that a client may have.

    So two searches of a client fit beside each other, and one of another client beside them.
    """
    return max(1, min(MAX_STEPS, max_per_client // 2 // _node_scores(model, max_chars) // _RESERVED * _RESERVED))


def least_scores(model: LoadedModel, wanted: Wanted) -> int:
    """Return how many log-probabilities a search reserves before its first step."""
    return _RESERVED * _node_scores(model, wanted.max_chars)


def most_scores(model: LoadedModel, wanted: Wanted) -> int:
    """Return how many log-probabilities a search reserves at most."""
    return -(-max(wanted.max_steps, wanted.n) // _RESERVED) * least_scores(model, wanted)


def _node_scores(model: LoadedModel, max_chars: int) -> int:
    """Return how many log-probabilities take as much memory as a node with all that may follow it."""
    following = 3 * min(len(model.charset), _MAX_FOLLOWING)  # 17 bytes for each
    return states_as_scores(model, 1) + following + max_chars + _NODE_SCORES


def _log_sum(logprobs: Float32) -> float:
    """Return the log-probability of n > 0 exclusive events together. Its bits don't depend on the processor."""
    shares = logprobs.astype(np.float64)
    largest = float(shares.max())
    sum_of = math.fsum(arithmetic.exp(shares - largest).tolist())
    return min(0.0, largest + float(arithmetic.log(np.array([sum_of]))[0]))


def words(charset: Charset, before: str) -> Automaton:
    """Return the automaton of words that may follow a text, whose last character is `before`; empty if it has none.

    A word has letters and apostrophes. After an unfinished word, a text is the rest of it; otherwise it may begin with
    other characters, such as a space.
    """
    return ends_at([not _is_of_word(char) for char in charset.characters], skips=not _is_of_word(before))


def _is_of_word(char: str) -> bool:
    return char != "" and (unicodedata.category(char)[0] in "LM" or char in _APOSTROPHES)


def ends_at(is_end: Iterable[bool], *, skips: bool = False) -> Automaton:
    """Return the automaton of texts without certain characters; the first of these ends the text.

    Args:
        is_end: for each character of a model, whether it ends a text.
        skips: such characters may be at the beginning of the text, before the first other one.
    """
    return Automaton(
        classes=np.array([*is_end], np.int32),  # class 1 ends a text
        transitions=np.array([[1, 0 if skips else -1], [1, -1]], np.int32),
        fewest=np.array([1, 0], np.int32),
        stop_chars=np.zeros(2, np.int32),
        withheld=np.zeros(2, np.int32),
    )
