"""Log-probabilities of many candidates that may follow one text.

Candidates are a tree: those with the same beginning share its characters. `_Plan` divides the tree into paths, each of
which the engine reads as one text, and which begin at branches of other paths. At each branch a path continues with the
largest part, so n candidates need at most log2(n) + 1 rounds. The last character of a candidate is not stepped: the
distribution before it has its log-probability.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.arrays import Float32, Float64, Ids
from service.engine import arithmetic
from service.engine.short_text import ReadText, ShortText
from service.generation.branches import Branches
from service.generation.portable_states import PortableStart
from service.generation.reader import step
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Session

MAX_CANDIDATES = 10_000

# What the score of a candidate is: its log-probability, the mean of it per character, or the log-probability given that
# it is one of the candidates.
Normalize = Literal["none", "length", "candidates"]

# Paths that are read at a time: few, so that few states wait for their branches, but as many as a request has in the
# engine at a time; and fewer if the distributions after them have more log-probabilities than this.
_ROUND, _ROUND_SCORES = 128, 2**18
_CANDIDATE_SCORES = 60  # log-probabilities that take a third of the memory of a candidate's objects


@dataclass(frozen=True)
class Origin:
    """Where candidates begin: the state after a text."""

    hidden: Float32  # (L, H)
    position: int  # characters of the text

    @classmethod
    def after(
        cls,
        model: LoadedModel,
        start: Session | PortableStart,
        prompt: Ids,
        client_has_left: Callable[[], bool] | None = None,
    ) -> Origin:
        """Return the state after the (n,) characters of a prompt that follow `start`, which doesn't change.

        Raises Overloaded, EngineFailed, ClientGone.
        """
        if not len(prompt):
            return cls(start.hidden, start.position)
        end, _ = step(model, prompt, start.hidden, start.position, client_has_left=client_has_left)
        return cls(end.hidden, end.position)


def score_candidates(
    model: LoadedModel,
    origin: Origin,
    candidates: Sequence[Ids],
    reserve: Callable[[int], None] = lambda _: None,
    client_has_left: Callable[[], bool] | None = None,
) -> list[Float32]:
    """Return for each candidate the (n,) log-probabilities of its characters, the bits that reading it alone gives.

    Args:
        model: the model.
        origin: what all candidates follow.
        candidates: (n,) int64 ids of each, n > 0. Equal ones are computed once.
        reserve: is called with a number of log-probabilities, before anything is computed, and may refuse them. The
            states that wait for their branches count as the log-probabilities that take as much memory.
        client_has_left: returns true if nobody waits for the result any more.

    Raises Overloaded, EngineFailed, ClientGone.
    """
    texts = [tuple(ids.tolist()) for ids in candidates]
    plan = _Plan(sorted(set(texts)), max(1, min(_ROUND, _ROUND_SCORES // len(model.charset))))
    num_chars = len(texts) * _CANDIDATE_SCORES + sum(map(len, texts))
    reserve(num_chars + states_as_scores(model, plan.num_states) + plan.num_together * len(model.charset))
    scores = plan.carried_out(Branches(model, client_has_left), origin)
    return [scores[text] for text in texts]


def total(logprobs: Float32) -> float:
    """Return the log-probability of a text: the sum over its characters, rounded once."""
    return math.fsum(logprobs.tolist())


def normalized(logprobs: Sequence[Float32], normalize: Normalize) -> tuple[list[float], list[float]]:
    """Return the log-probability of each of n > 0 candidates, and its score, from those of its characters."""
    totals = [total(each) for each in logprobs]
    if normalize == "length":
        return totals, [value / len(each) for value, each in zip(totals, logprobs, strict=True)]
    return totals, log_shares(totals).tolist() if normalize == "candidates" else totals


def log_shares(logprobs: Sequence[float]) -> Float64:
    """Return (n,) log-probabilities of n > 0 alternatives, given that it is one of them: a log-softmax."""
    shifted = np.array(logprobs, np.float64)
    shifted -= shifted.max()
    shares = math.fsum(arithmetic.exp(shifted.copy()).tolist())
    return np.asarray(shifted - arithmetic.log(np.array([shares])), np.float64)


def states_as_scores(model: LoadedModel, num_states: int) -> int:
    """Return how many log-probabilities, of 8 bytes each, take the memory of some states."""
    layers, units = model.state_shape
    return -(-num_states * layers * units // 2)


@dataclass(eq=False, slots=True)
class _Path:
    """Characters that one text of the engine reads, and what depends on the states on the way."""

    parent: _Path | None  # at whose branch it begins; None for the origin
    start: int  # the number of characters before it, of the candidates
    ids: list[int] = field(default_factory=list)
    # By the number of characters before them: candidates with only their last character left.
    last_chars: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    whole: list[tuple[int, ...]] = field(default_factory=list)  # candidates that end on the way
    branches: list[_Path] = field(default_factory=list)  # other paths that begin at this one
    # Numbers of characters, rising: after them the state is needed. A path begins with a character of its own, so only
    # the first one may need the state at its beginning.
    inner: list[int] = field(default_factory=list)
    # Of all characters from the origin on; set when the path was read.
    logprobs: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    states: dict[int, Float32] = field(default_factory=dict)  # by the number of characters before, where needed
    num_waiting: int = 0  # paths and last characters that still need the states
    num_planned: int = 0  # those of them that are in a round already

    @property
    def end(self) -> int:
        """The number of characters up to its end."""
        return self.start + len(self.ids)


class _Plan:
    """A division of the tree of candidates into paths."""

    def __init__(self, texts: list[tuple[int, ...]], num_paths: int) -> None:
        """texts: distinct, sorted, not empty. num_paths: how many to read at a time at most."""
        self._texts = texts
        first = _Path(None, 0)
        todo = [(first, 0, len(texts))]
        while todo:
            path, low, high = todo.pop()
            todo += self._extend(path, low, high)
        self.num_states = 0  # the most that wait for branches at a time
        # What is read together: paths, and places in paths before last characters, which need no step.
        self._rounds: list[list[tuple[_Path, int | None]]] = []
        self._schedule(first, num_paths)
        self.num_together = max(map(len, self._rounds))  # the most that are read at a time

    def _schedule(self, first: _Path, num_paths: int) -> None:
        """Order the paths. The newest is read first, so the states of a path are soon needed no more."""
        ready: list[tuple[_Path, int | None]] = [(first, None)]
        num_states = 0
        while ready:
            taken = [ready.pop() for _ in range(min(num_paths, len(ready)))]
            self._rounds.append(taken)
            for path, depth in taken:
                if depth is None:
                    left = [depth for depth in path.last_chars if depth != path.end]
                    path.num_waiting = len(path.branches) + len(left)
                    num_states += len(path.inner)
                    ready += [(branch, None) for branch in path.branches]
                    ready += [(path, depth) for depth in left]
            self.num_states = max(self.num_states, num_states)
            for path, depth in taken:
                needed = path if depth is not None else path.parent
                if needed is not None:
                    needed.num_planned += 1
                    num_states -= len(needed.inner) if needed.num_planned == needed.num_waiting else 0

    def _extend(self, path: _Path, low: int, high: int) -> list[tuple[_Path, int, int]]:
        """Extend a path through texts[low:high], which begin alike up to its start; return what branches off."""
        texts, found = self._texts, []
        depth = path.start
        while True:
            first, last = texts[low], texts[high - 1]
            shared = _num_shared(first, last, depth)
            if high - low == 1:
                shared -= 1  # the last character is not stepped
            path.ids += first[depth:shared]
            depth = shared
            if high - low == 1:
                path.last_chars.setdefault(depth, []).append(first)
                break
            if len(first) == depth:  # all others begin with it
                path.whole.append(first)
                low += 1
                continue
            parts = []
            while low < high:
                char = texts[low][depth]
                upper = bisect_right(texts, char, low, high, key=lambda text: text[depth])
                if upper - low == 1 and len(texts[low]) == depth + 1:
                    path.last_chars.setdefault(depth, []).append(texts[low])
                else:
                    parts.append((low, upper))
                low = upper
            if not parts:
                break
            low, high = largest = max(parts, key=lambda part: part[1] - part[0])
            for part in parts:
                if part is not largest:
                    branch = _Path(path, depth)
                    path.branches.append(branch)
                    found.append((branch, *part))
            if len(parts) > 1 or depth in path.last_chars:
                path.inner.append(depth)
        return found

    def carried_out(self, branches: Branches, origin: Origin) -> dict[tuple[int, ...], Float32]:
        """Read all paths; return the (n,) log-probabilities of each text."""
        scores: dict[tuple[int, ...], Float32] = {}
        for taken in self._rounds:
            grown = branches.grow([_branch(path, depth, origin) for path, depth in taken])
            for (path, depth), result in zip(taken, grown, strict=True):
                if depth is not None:
                    _score_last(scores, path, depth, result)
                    _release(path)
                    continue
                before = path.parent.logprobs[: path.start] if path.parent is not None else path.logprobs
                path.logprobs = np.concatenate([before, result.scores.chosen])
                path.states = {path.start + count: state for count, state in result.states.items()}
                if path.parent is None:
                    path.states[path.start] = origin.hidden
                else:
                    _release(path.parent)
                for text in path.whole:
                    scores[text] = path.logprobs[: len(text)]
                if path.end in path.last_chars:
                    _score_last(scores, path, path.end, result)
        return scores


def _branch(path: _Path, depth: int | None, origin: Origin) -> ShortText:
    if depth is not None:
        return ShortText(path.states[depth], origin.position + depth, np.empty(0, np.int64), wants_next=True)
    return ShortText(
        path.parent.states[path.start] if path.parent is not None else origin.hidden,
        origin.position + path.start,
        np.array(path.ids, np.int64),
        is_root=path.parent is None,
        checkpoints=tuple(depth - path.start for depth in path.inner if depth > path.start),
        num_logprobs=0,
        wants_next=path.end in path.last_chars,
    )


def _score_last(scores: dict[tuple[int, ...], Float32], path: _Path, depth: int, result: ReadText) -> None:
    """Score the candidates with only their last character left at a place of a path."""
    if result.next is None:
        raise AssertionError("the distribution was requested")
    by_char = np.empty(len(result.next.ids), np.float32)
    by_char[result.next.ids] = result.next.logprobs
    for text in path.last_chars[depth]:
        scores[text] = logprobs = np.empty(depth + 1, np.float32)
        logprobs[:depth] = path.logprobs[:depth]
        logprobs[depth] = by_char[text[-1]]


def _release(path: _Path) -> None:
    """Forget the states of a path when nothing waits for them any more."""
    path.num_waiting -= 1
    if not path.num_waiting:
        path.states = {}


def _num_shared(a: tuple[int, ...], b: tuple[int, ...], start: int) -> int:
    """Return the length of the longest common beginning of two texts, which share `start` characters."""
    size = min(len(a), len(b))
    while start < size and a[start] == b[start]:
        start += 1
    return start
