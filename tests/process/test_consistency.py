"""A short run of `python -m benchmarks.consistency`, and the checker that it relies on."""

from __future__ import annotations

import os

import pytest

from benchmarks import consistency
from benchmarks.history import (
    Absent,
    Create,
    Delete,
    Feed,
    Fields,
    Finish,
    Fork,
    Generate,
    Length,
    NoRun,
    Operation,
    Read,
    Resume,
    Rewind,
    Saved,
    explain,
)
from service.store.model_store import ModelStore

NUM_OPERATIONS = int(os.environ.get("CONSISTENCY_OPERATIONS", "400"))
RUN: Fields = (("max_tokens", 8), ("seed", 1))
SHA256 = "9c56cc51b374c3ba189210d5b6d4bf57790d351c96c47c02190ecf1e430635ab"  # of abcdefgh


def reference(text: str, fields: Fields) -> str:
    """Return what a run generates: letters after a text of one kind, digits after one of another."""
    return ("12345678" if "?" in text else "abcdefgh")[: dict(fields)["max_tokens"]]


def create(at: float = 0) -> Create:
    return Create(text="AB", is_new=True, position=2, began=at, ended=at + 0.5)


def feed(at: float, text: str, end: int | None, position: int | None = None, *, ended: float | None = None) -> Feed:
    if end is None:
        return Feed(text=text, position=position, began=at)
    return Feed(text=text, position=position, end=end, began=at, ended=ended if ended is not None else at + 0.5)


def read(at: float, text: str) -> Read:
    return Read(text=text, began=at, ended=at + 0.5)


def stream(at: float, start: int = 2, received: str = "") -> Generate:
    """A stream that began: more may be received later."""
    return Generate(fields=RUN, position=None, start=start, received=received, began=at, ended=at + 0.1)


def whole(at: float, received: str, end: int, position: int | None = None) -> Generate:
    facts = {"start": end - len(received), "received": received, "end": end}
    return Generate(fields=RUN, position=position, began=at, ended=at + 0.5, **facts)  # type: ignore[arg-type]


def done(at: float, end: int = 10) -> Finish:
    return Finish(position=end, sha256=SHA256, began=at - 0.4, ended=at)


def resume(at: float, after: int, received: str) -> Resume:
    return Resume(after=after, received=received, began=at, ended=at + 0.1)


def rewind(at: float, position: int) -> Rewind:
    return Rewind(position=position, began=at, ended=at + 0.5)


RIGHT: dict[str, list[Operation]] = {
    "feeds in order": [feed(1, "C", 3), feed(2, "D", 4), read(3, "ABCD")],
    "two feeds at once, in either order": [feed(1, "C", 4, ended=2), feed(1, "D", 3, ended=2), read(3, "ABDC")],
    "a feed repeated at its position": [feed(1, "C", 3, 2), feed(2, "D", 4), feed(3, "C", 3, 2), read(4, "ABCD")],
    "an unknown feed that was done": [feed(1, "C", None), read(2, "ABC")],
    "an unknown feed that was not done": [feed(1, "C", None), read(2, "AB")],
    "an unknown feed that is done late": [feed(1, "C", None), read(2, "AB"), feed(3, "D", 3), read(4, "ABDC")],
    "a read at the same time as a feed": [feed(1, "C", 3, ended=5), read(2, "AB"), read(3, "ABC")],
    "a whole run": [whole(1, "abcdefgh", 10), read(2, "ABabcdefgh")],
    "a whole run repeated": [whole(1, "abcdefgh", 10, 2), whole(2, "abcdefgh", 10, 2), read(3, "ABabcdefgh")],
    "a stream that ended": [stream(1, received="abcd"), done(2), read(3, "ABabcdefgh")],
    "a stream that is saved on its way": [stream(1), read(2, "ABab"), read(3, "ABabcd"), done(4)],
    "a stream that died and is fed where it was saved": [stream(1, received="abcd"), feed(2, "C", 4), read(3, "ABaC")],
    "a stream that died and is fed where it was sent": [stream(1, received="abcd"), feed(2, "C", 7, 6)],
    "a stream that is resumed": [stream(1, received="ab"), resume(2, 4, "cdefgh"), done(3), read(4, "ABabcdefgh")],
    "a stream that was cut": [stream(1), feed(2, "C", 5), NoRun(began=3, ended=4), read(5, "ABabC")],
    "an unknown run that is resumed": [
        Generate(fields=RUN, position=2, began=1),
        resume(2, 2, "abcdefgh"),
        done(3),
        read(4, "ABabcdefgh"),
    ],
    "a refused run that is resumed": [
        Generate(fields=RUN, position=2, began=1, was_refused=True),
        read(2, "AB"),
        resume(3, 2, "abcdefgh"),
        done(4),
    ],
    "a stream handed over": [stream(1), Saved(position=5, began=1, ended=2), read(3, "ABabc"), resume(4, 5, "defgh")],
    "a rewind": [whole(1, "abcdefgh", 10), rewind(2, 4), NoRun(began=3, ended=4), read(5, "ABab")],
    "a fork at a position that was sent": [
        stream(1, received="abcd"),
        Fork(position=5, text="ABabc", began=2, ended=3),
    ],
    "a deletion is repeated": [Delete(began=1, ended=2), Delete(began=2.5, ended=3), Absent(began=3, ended=4)],
    "a session made again": [Delete(began=1, ended=2), Absent(began=3, ended=4), create(5), read(6, "AB")],
    "an unknown creation that is done late": [
        Create(text="AB", began=0.6),
        Delete(began=1, ended=2),
        Absent(began=3, ended=4),
        read(5, "AB"),
    ],
}
WRONG: dict[str, list[Operation]] = {
    "an acknowledged feed is lost": [feed(1, "C", 3), read(2, "AB")],
    "an acknowledged feed is doubled": [feed(1, "C", 3, 2), read(2, "ABCC")],
    "a feed is at another position": [feed(1, "C", 4), read(2, "ABC")],
    "an old text is read": [feed(1, "C", 3), feed(2, "D", 4), read(3, "ABC")],
    "a read goes back": [feed(1, "C", 3, ended=5), read(2, "ABC"), read(3, "AB")],
    "a refused feed is done": [read(2, "ABC")],
    "an unknown feed is done twice": [feed(1, "C", None), read(2, "ABCC")],
    "a repeated feed is done twice": [feed(1, "C", 3, 2), feed(2, "C", 4, 3), feed(3, "C", 3, 2), read(4, "ABCCC")],
    "a feed is overwritten": [feed(1, "C", 3, 2), feed(2, "D", 3, 2), read(3, "ABD")],
    "a run has another text": [whole(1, "abcdefgx", 10)],
    "a run ended early": [whole(1, "abcdefg", 9)],
    "a repeated run begins again": [whole(1, "abcdefgh", 10, 2), whole(2, "abcdefgh", 18, 2)],
    "a stream has another text": [stream(1, received="abd")],
    "a stream that ended is not saved": [stream(1), done(2), read(3, "ABabcd")],
    "a stream that is saved goes back": [stream(1), read(2, "ABabcd"), read(3, "ABab")],
    "a stream says that all of another text arrived": [stream(1), done(2, end=9)],
    "a resumed stream skips a character": [stream(1, received="ab"), resume(2, 4, "defgh")],
    "a stream handed over is not saved": [stream(1), Saved(position=5, began=1, ended=2), read(3, "ABab")],
    "a refused run is done": [Generate(fields=RUN, position=2, began=1, was_refused=True), read(2, "ABabcdefgh")],
    "a rewind is lost": [whole(1, "abcdefgh", 10), rewind(2, 4), read(5, "ABabcd")],
    "a run is resumed after a rewind": [whole(1, "abcdefgh", 10), rewind(2, 4), resume(3, 4, "cd")],
    "a finished run can't be resumed": [stream(1), done(2), NoRun(began=3, ended=4)],
    "a fork has another text": [feed(1, "C", 3), Fork(position=3, text="ABD", began=2, ended=3)],
    "a session that never was is deleted": [Delete(began=-2, ended=-1)],
    "a deleted session comes back": [Delete(began=1, ended=2), read(3, "AB")],
    "a session is gone": [feed(1, "C", 3), Absent(began=2, ended=3)],
    "a session made again has its old text": [feed(1, "C", 3), Delete(began=2, ended=3), create(4), read(5, "ABC")],
    "a conflict names another length": [feed(1, "C", 3), Length(position=2, began=2, ended=3)],
}


@pytest.mark.parametrize("name", RIGHT)
def test_explain__accepts(name: str) -> None:
    assert explain([create(), *RIGHT[name]], reference).is_found


@pytest.mark.parametrize("name", WRONG)
def test_explain__refuses(name: str) -> None:
    found = explain([create(), *WRONG[name]], reference)
    assert found.is_decided
    assert not found.is_found
    assert found.left


def test_sessions__keep_their_promises_under_faults(tiny_store: ModelStore) -> None:
    settings = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    verdict = consistency.run(1, NUM_OPERATIONS, num_sessions=20, think_s=0.4, settings=settings)
    assert verdict.violations == []
    assert verdict.num_undecided == 0
    assert len(verdict.faults) >= 2
    assert verdict.counts.total() >= NUM_OPERATIONS
