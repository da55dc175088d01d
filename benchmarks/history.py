"""Decides whether the answers that clients of a session got can be explained: a checker of linearizability.

`explain` looks for an order of the calls in which each takes effect at one moment between its start and its end, and
every answer is right. A call whose outcome is unknown may take effect at any moment after its start, or never. A call
that was refused takes no effect: it is not part of a history, unless its refusal says something about the session.

The search is that of Wing and Gong, with Lowe's table of what was seen before. It is exponential in the number of calls
that overlap, which the clients of `consistency` keep small.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

#: The fields of a request to generate: seed, max_tokens and others.
Fields = tuple[tuple[str, Any], ...]
#: Returns what such a request generates after a text.
Reference = Callable[[str, Fields], str]
_MAX_CONFIGURATIONS = 300_000
_MANY = 64  # lengths of a text that are all tried


class RunState(Enum):
    """What can become of a session's last run."""

    ACTIVE = "active"  # a server may be generating it: the text may grow along it at any time
    DORMANT = (
        "dormant"  # it begins, but its caller was told that nothing was done: only a call that names it continues it
    )
    FINISHED = "finished"
    UNSURE = "unsure"  # the text was fed at the run's end: it can be resumed if the server had finished it before


@dataclass(frozen=True)
class Run:
    """A continuation."""

    start: int
    text: str  # all that it generates
    state: RunState

    @property
    def end(self) -> int:
        """The position after its text."""
        return self.start + len(self.text)

    def now(self, state: RunState) -> Run:
        """Return the run in another state."""
        return replace(self, state=state)

    @property
    def may_continue(self) -> bool:
        """Whether it is unfinished."""
        return self.state in (RunState.ACTIVE, RunState.DORMANT)


@dataclass(frozen=True)
class State:
    """One of the states in which a session may be. While a run is active, the text may be longer already."""

    text: str | None = None  # None if there is no session
    run: Run | None = None
    is_deleted: bool = False  # there was a session, and it was deleted

    @property
    def length(self) -> int:
        """The length of the text, at least."""
        return len(self.text or "")

    @property
    def whole(self) -> str:
        """The text, with all that an unfinished run can add to it."""
        text = self.text or ""
        return text[: self.run.start] + self.run.text if self.run is not None and self.run.may_continue else text

    @property
    def longest(self) -> int:
        """The greatest length that the text may have by itself."""
        return self.run.end if self.run is not None and self.run.state is RunState.ACTIVE else self.length

    def at(self, length: int, *, is_named: bool = False) -> State | None:
        """Return the state if the text has this length; None if it can't have.

        is_named: a call names the position. It may be ahead of the text then, if an unfinished run reaches it.
        """
        if self.text is None:
            return None
        if length == len(self.text):
            return self
        longest = len(self.whole) if is_named else self.longest
        return replace(self, text=self.whole[:length]) if len(self.text) < length <= longest else None

    def fed(self, text: str) -> State:
        """Return the state after a feed."""
        run = self.run
        if run is not None and run.state is RunState.ACTIVE and run.end == self.length:
            run = run.now(RunState.UNSURE)
        elif run is not None and run.may_continue:
            run = None
        return State((self.text or "") + text, run)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A call, with the time between its start and its answer. Times are monotonic seconds."""

    began: float
    ended: float = math.inf  # infinite if its outcome is unknown
    client: str = ""

    @property
    def is_unknown(self) -> bool:
        """Whether it may have taken effect, or may still."""
        return self.ended == math.inf


@dataclass(frozen=True, kw_only=True)
class Create(Operation):
    """A session was created, or was there already."""

    text: str
    is_new: bool | None = None  # None if unknown
    position: int | None = None


@dataclass(frozen=True, kw_only=True)
class Absent(Operation):
    """There is no session."""


@dataclass(frozen=True, kw_only=True)
class Length(Operation):
    """The text has this length: an answer that describes the session, or a conflict of positions."""

    position: int


@dataclass(frozen=True, kw_only=True)
class Read(Operation):
    """The whole text was read."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Fork(Operation):
    """The text up to a position was copied."""

    position: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Feed(Operation):
    """Text was appended; with a position, once."""

    text: str
    position: int | None
    end: int | None = None  # None if unknown


@dataclass(frozen=True, kw_only=True)
class Generate(Operation):
    """A continuation began, and with `end` was delivered whole. With a position, a repetition resumes it."""

    fields: Fields
    position: int | None
    start: int | None = None  # where it began; None if unknown
    received: str = ""  # the beginning of its text, as the client got it
    end: int | None = None  # None if it was streamed, or its outcome is unknown
    was_refused: bool = False  # the caller was told that nothing was done


@dataclass(frozen=True, kw_only=True)
class Resume(Operation):
    """The last run was streamed from a position on."""

    after: int
    received: str = ""


@dataclass(frozen=True, kw_only=True)
class NoRun(Operation):
    """There is no run to resume."""


@dataclass(frozen=True, kw_only=True)
class Finish(Operation):
    """A stream said `done`."""

    position: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Saved(Operation):
    """A stream said `reconnect`: the text is saved up to this position at least."""

    position: int


@dataclass(frozen=True, kw_only=True)
class Rewind(Operation):
    """The text was truncated."""

    position: int


@dataclass(frozen=True, kw_only=True)
class Delete(Operation):
    """The session was deleted."""


class _Rules:
    """What each call does to a session.

    Args:
        reference: Says what is generated.
        lengths: Of the text, wherever an answer of the history shows one.
    """

    def __init__(self, reference: Reference, lengths: frozenset[int]) -> None:
        self._reference, self._lengths = reference, lengths

    def results(self, call: Operation, state: State) -> Iterator[State]:
        """Yield each state that may be there after a call took effect: none if its answer is wrong in this state."""
        text, run, found = state.text, state.run, None
        match call:
            case Create():
                if text is None and call.is_new is not False:
                    yield State(call.text)
                elif text is not None and call.is_new is False and call.position is not None:
                    found = state.at(call.position)
            case Absent() if text is None:
                yield state
            case Delete() if text is not None or state.is_deleted:  # a repeated deletion has the same answer
                yield State(is_deleted=True)
            case Length():
                found = state.at(call.position)
            case Read() | Fork(position=None):
                found = state.at(len(call.text))
                found = found if found is not None and found.text == call.text else None
            case Fork(position=int(position)):
                if text is not None and len(call.text) == position and state.whole.startswith(call.text):
                    yield state  # what is generated again for the copy is not saved in the original
            case Feed() if text is not None:
                yield from self._feed(call, state)
            case Generate() if text is not None:
                yield from self._generate(call, state)
            case Resume() if text is not None and run is not None and call.after <= run.end:
                if (text[: run.start] + run.text)[call.after :].startswith(call.received):
                    yield replace(state, run=run.now(RunState.ACTIVE if run.may_continue else RunState.FINISHED))
            case NoRun() if text is not None and (run is None or run.state is RunState.UNSURE):
                yield replace(state, run=None)
            case Finish() if run is not None and run.end == call.position and _sha256(run.text) == call.sha256:
                yield State(state.whole, run.now(RunState.FINISHED))
            case Saved() if call.position <= len(state.whole):
                yield state.at(max(call.position, state.length), is_named=True) or state
            case Rewind() if text is not None and call.position <= len(state.whole):
                yield from self._rewind(call, state)
        if found is not None:
            yield found

    def _feed(self, call: Feed, state: State) -> Iterator[State]:
        if call.position is None:
            ends = [call.end - len(call.text)] if call.end is not None else self._possible(state)
            yield from (found.fed(call.text) for end in ends if (found := state.at(end)) is not None)
            return
        end = call.position + len(call.text)
        if call.end not in (None, end):
            return
        found = state.at(call.position, is_named=True)
        if found is not None:
            yield found.fed(call.text)
        if end <= state.longest and state.whole[call.position : end] == call.text:  # repeated
            yield state.at(max(end, state.length)) or state

    def _generate(self, call: Generate, state: State) -> Iterator[State]:
        if call.position is not None:
            starts = [call.position]
        else:
            starts = [call.start] if call.start is not None else self._possible(state)
        for start in starts:
            found = state.at(start, is_named=call.position is not None)
            if found is None or found.text is None:
                continue
            generated = self._reference(found.text, call.fields)
            if not _is_delivered(call, generated):
                continue
            if call.end is None:
                begun = RunState.DORMANT if call.was_refused else RunState.ACTIVE
                yield replace(found, run=Run(start, generated, begun))
            elif call.end == start + len(generated):
                yield State(found.text + generated, Run(start, generated, RunState.FINISHED))
        run = state.run
        if run is None or call.position != run.start or call.was_refused or call.end not in (None, run.end):
            return
        if _is_delivered(call, run.text) and self._reference(state.whole[: run.start], call.fields) == run.text:
            if call.end is None and run.may_continue:
                yield replace(state, run=run.now(RunState.ACTIVE))
            else:
                yield State(state.whole, run.now(RunState.FINISHED))

    def _rewind(self, call: Rewind, state: State) -> Iterator[State]:
        text, run, position = state.whole[: call.position], state.run, call.position
        if state.length <= position:
            yield State(text, run)  # nothing was truncated
        if state.length > position or (run is not None and run.state is RunState.ACTIVE):
            yield State(text, run if run is not None and not run.may_continue and run.end <= position else None)

    def _possible(self, state: State) -> list[int]:
        """Return the lengths that the text may have: all, or if these are many, those that an answer shows."""
        shortest, longest = state.length, state.longest
        if longest - shortest <= _MANY:
            return list(range(shortest, longest + 1))
        return sorted({shortest, longest} | {each for each in self._lengths if shortest < each < longest})


@dataclass(frozen=True)
class Explanation:
    """What `explain` found."""

    is_found: bool
    is_decided: bool  # False if the search was given up
    explained: tuple[Operation, ...]  # all calls in order, or as many as could be explained
    left: tuple[Operation, ...]  # the calls that might have been next; none explains its answer
    state: State  # after the calls explained


def explain(history: Sequence[Operation], reference: Reference) -> Explanation:
    """Look for an order of the calls that explains their answers. There is no session before the first."""
    calls = sorted(history, key=lambda call: call.began)
    known = sum(1 << number for number, call in enumerate(calls) if not call.is_unknown)
    best: tuple[tuple[int, ...], State] = ((), State())
    rules, seen = _Rules(reference, frozenset(_lengths(calls))), {(0, State())}
    pending: list[tuple[int, State, tuple[int, ...]]] = [(0, State(), ())]
    while pending:
        done, state, order = pending.pop()
        if done & known == known:
            return Explanation(True, True, tuple(calls[number] for number in order), (), state)
        if (done & known).bit_count() > sum(not calls[number].is_unknown for number in best[0]):
            best = order, state
        if len(seen) > _MAX_CONFIGURATIONS:
            break
        following = []
        for number in _next(calls, done):
            for after in rules.results(calls[number], state):
                if after == state and calls[number].is_unknown:
                    continue  # as if it had not been done
                key = done | 1 << number, after
                if key not in seen:
                    seen.add(key)
                    following.append((*key, (*order, number)))
        # The last is tried first: calls with an answer before others, and those that ended early before those.
        following.sort(key=lambda item: calls[item[2][-1]].ended, reverse=True)
        pending += following
    order, state = best
    left = _next(calls, sum(1 << number for number in order))
    return Explanation(
        False, not pending, tuple(calls[number] for number in order), tuple(calls[number] for number in left), state
    )


def _next(calls: Sequence[Operation], done: int) -> list[int]:
    """Return the calls that may be next: those that began before any other one that is left had ended."""
    left = [number for number in range(len(calls)) if not done >> number & 1]
    first_end = min((calls[number].ended for number in left), default=math.inf)
    return [number for number in left if calls[number].began <= first_end]


def _is_delivered(call: Generate, generated: str) -> bool:
    """Return whether the client got this text, or its beginning as far as it was streamed."""
    return generated == call.received if call.end is not None else generated.startswith(call.received)


def _lengths(calls: Sequence[Operation]) -> Iterator[int]:
    """Yield lengths of the text that answers show, and those before texts that may have been fed in between."""
    shown = set()
    for call in calls:
        match call:
            case Length() | Saved() | Finish() | Rewind():
                shown.add(call.position)
            case Read() | Fork():
                shown.add(len(call.text))
            case Feed(end=int(end)):
                shown |= {end, end - len(call.text)}
            case Generate():
                shown |= {each for each in (call.start, call.position, call.end) if each is not None}
            case Feed(position=int(position)):
                shown.add(position)
    unknown = {len(call.text) for call in calls if isinstance(call, Feed) and call.is_unknown}
    yield from shown
    yield from (each - length for each in shown for length in unknown)


@cache
def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
