"""Checks what a deployment promises about sessions while its parts die, hang and are replaced.

    python -m benchmarks.consistency [--operations 2500] [--seeds 1 2 3] [--paused-through-recovery] [--json FILE]

Needs `redis-server` and `haproxy`. The deployment consists of real processes: three replicas, HAProxy with the shipped
configuration in front of them, and a Redis server. Eight clients call some forty sessions over HTTP, two at times the
same one: they create, feed, generate, stream, resume, rewind, fork, read and delete. Meanwhile replicas are killed,
paused and replaced; Redis is restarted, killed, paused and demoted, and loses its last second.

What every client called, and what it was answered, is then checked (`history.explain`): for each session there has to
be an order of the calls that respects real time and explains every answer, given the text that a server without faults
generates. So a text that was acknowledged is at its position, once; what was refused was not done; a deleted session
stays deleted. Errors have to be those that docs/api.md names, at a moment when it allows them.

Exits with 1 if anything is wrong, and prints the calls on the sessions that are.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import history
from benchmarks.faults import Fault, Injector
from benchmarks.history import Explanation, Fields, Operation, explain
from benchmarks.survival import SERVE, Deployment, Replica, deployed
from benchmarks.table import machine

Figures = dict[str, Any]
NUM_CLIENTS, NUM_SESSIONS, NUM_HOT = 8, 40, 6
_TIMEOUT_S = 30
_LONG_TEXT = 6000  # characters; longer texts are soon rewound or deleted
_ATTEMPTS, _PAUSE_S = 8, 0.3
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_GRACE_S = 10.0  # after a fault, in which errors may still follow from it
_BUSY_S = 3.0  # after a call, in which its session may still be busy: a lease lasts 1 s, and machines are slow
_UNKNOWN_S = 40.0  # in which a call of unknown outcome may still be running, such as at a replica that was paused
# What a call may be answered while parts of the deployment fail.
_FAULT_CODES = ("outcome_unknown", "session_store_unavailable", "not_ready", "draining", "engine_failed", "broken")


@dataclass(frozen=True)
class Answer:
    """What a request was answered."""

    began: float  # monotonic
    ended: float
    status: int  # 0 if there was no whole answer
    body: dict[str, Any]

    @property
    def is_ok(self) -> bool:
        """Whether the call was done."""
        return 200 <= self.status < 300

    @property
    def code(self) -> str:
        """The error's code; `broken` if there was no whole answer."""
        return "broken" if not self.status else str(self.body.get("error", {}).get("code"))


@dataclass
class Streamed:
    """What a request for a stream was answered."""

    answer: Answer  # of the request; its body is empty if the stream began
    first_at: float | None = None  # when its first event arrived
    start: int = 0  # the position before its text
    text: str = ""
    position: int = 0  # after its text
    ending: str = "broken"  # or done, reconnect, left, or the code of its error
    sha256: str = ""


@dataclass
class Place:
    """A session as the clients know it, and what they did to it."""

    name: str
    text: str  # with which it is created
    origin: str | None = None  # the session from which it was forked; it is not created again
    length: int = 0  # of its text, as far as the clients know
    calls: list[Operation] = field(default_factory=list)  # those that say something
    all_calls: list[tuple[float, float, str]] = field(default_factory=list)  # start, end, outcome
    lost_at: list[float] = field(default_factory=list)  # when session_lost was answered
    turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(2))

    def note(self, call: Operation) -> None:
        """Add a call to its history."""
        self.calls.append(call)


class World:
    """What all clients share."""

    def __init__(self, seed: int, num_operations: int, num_sessions: int, longest_run: int, think_s: float) -> None:
        self.num_operations, self.longest_run, self.think_s = num_operations, longest_run, think_s
        self.num_done = 0
        self.counts: Counter[str] = Counter()
        self.unexpected: list[tuple[str, str, float, float]] = []  # session, what, start, end
        self.lock = threading.Lock()
        self._chance = random.Random(f"{seed} sessions")
        self._num_sessions = num_sessions
        self.places: list[Place] = [self._new_place() for _ in range(num_sessions)]
        self.all_places = list(self.places)

    def _new_place(self) -> Place:
        number = self._chance.randrange(10**12)
        return Place(f"s{number}", "".join(self._chance.choices(_LETTERS, k=self._chance.randrange(1, 300))))

    def add(self, place: Place) -> None:
        """Add a session that was forked; the oldest one makes room."""
        with self.lock:
            self.places.append(place)
            self.all_places.append(place)
            if len(self.places) > self._num_sessions + 10:
                self.places.pop(0)

    def replace(self, place: Place) -> None:
        """Work on another session instead of one that was deleted or lost."""
        with self.lock:
            if place in self.places:
                self.places.remove(place)
                new = self._new_place()
                self.places.append(new)
                self.all_places.append(new)

    def takes_another(self) -> bool:
        """Count an operation. Returns False if there were enough."""
        with self.lock:
            self.num_done += 1
            return self.num_done <= self.num_operations


class Caller:
    """Sends requests to an address, each of them once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request and wait for its answer."""
        began = time.monotonic()
        try:
            response = self._send(method, path, body)
            data = response.read()
            answer = Answer(began, time.monotonic(), response.status, json.loads(data) if data else {})
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            return Answer(began, time.monotonic(), 0, {})
        return answer

    @contextmanager
    def stream(self, method: str, path: str, body: object = None) -> Iterator[tuple[Streamed, Iterator[None]]]:
        """Request a stream. The iterator advances by an event, and notes it; end it early by leaving the block."""
        self.close()  # a stream that is left early ends with its connection
        began, status, error = time.monotonic(), 0, {}
        events: Iterator[None] = iter(())
        streamed = Streamed(Answer(began, began, 0, {}))
        try:
            response = self._send(method, path, body)
            if response.status >= 400:
                error = json.loads(response.read())
            else:
                events = _events(response, streamed)
            status = response.status
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it stays without an answer
        streamed.answer = Answer(began, time.monotonic(), status, error)
        try:
            yield streamed, events
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection. The next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, method: str, path: str, body: object) -> http.client.HTTPResponse:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        return self._connection.getresponse()


def _events(response: http.client.HTTPResponse, streamed: Streamed) -> Iterator[None]:
    fields: dict[str, str] = {}
    with suppress(OSError, http.client.HTTPException):
        for line in response:
            if not line.endswith(b"\n"):
                return
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
                continue
            if "data" not in fields:
                continue
            data = json.loads(fields["data"])
            kind = fields["event"]
            if kind == "error":
                streamed.ending = data["error"]["code"]
                return
            position = int(fields["id"])
            if streamed.first_at is None:
                streamed.first_at = time.monotonic()
                streamed.start = position - len(data.get("text", ""))
            if kind != "text":
                streamed.ending, streamed.position, streamed.sha256 = kind, position, data.get("sha256", "")
                return
            streamed.text += data["text"]
            streamed.position = position
            fields = {}
            if position != streamed.start + len(streamed.text):
                streamed.ending = "misplaced"  # which nothing allows
                return
            yield


class Client:
    """A client that does random things to sessions until there were enough operations."""

    def __init__(self, world: World, port: int, name: str) -> None:
        self.name = name  # also the seed of its choices
        self._world, self._caller, self._chance = world, Caller(port), random.Random(name)

    def close(self) -> None:
        """Close its connection."""
        self._caller.close()

    def run(self) -> None:
        """Do them. Only one thread at a time may use a client."""
        kinds: list[tuple[Callable[[Place], None], int]] = [
            (self._feed, 30),
            (self._repeat_feed, 4),
            (self._generate, 12),
            (self._stream, 16),
            (self._resume, 4),
            (self._read, 14),
            (self._show, 6),
            (self._rewind, 7),
            (self._fork, 5),
            (self._delete, 3),
        ]
        try:
            while self._world.num_done < self._world.num_operations:
                place = self._pick()
                if not place.turns.acquire(blocking=False):
                    continue
                try:
                    for _ in range(self._chance.randrange(1, 6)):
                        time.sleep(self._chance.uniform(0, self._world.think_s))
                        if place.length == 0:
                            self._create(place)
                        elif place.length > _LONG_TEXT:
                            (self._delete if self._chance.random() < 0.3 else self._rewind)(place)
                        else:
                            names, weights = zip(*kinds, strict=True)
                            self._chance.choices(names, weights)[0](place)
                        if place.lost_at:
                            self._world.replace(place)
                            break
                finally:
                    place.turns.release()
        finally:
            self.close()

    def _pick(self) -> Place:
        with self._world.lock:
            places = self._world.places[-NUM_HOT:] if self._chance.random() < 0.4 else self._world.places
            return self._chance.choice(places)

    def _call(self, place: Place, what: str, method: str, suffix: str = "", body: object = None) -> Answer | None:
        """Make a call, and count it. Returns None if there were enough operations."""
        if not self._world.takes_another():
            return None
        answer = self._caller.call(method, f"/v1/sessions/{place.name}{suffix}", body)
        self._count(place, what, answer, answer.ended, "ok" if answer.is_ok else answer.code)
        return answer

    def _count(self, place: Place, what: str, answer: Answer, ended: float, outcome: str) -> None:
        place.all_calls.append((answer.began, ended, outcome))
        with self._world.lock:
            self._world.counts[f"{what} {outcome}"] += 1
            if outcome not in ("ok", "done", "left", "reconnect"):
                self._world.unexpected.append((place.name, f"{what} {outcome}", answer.began, ended))

    def _note_refusal(self, place: Place, answer: Answer, unknown: Operation | None, *, is_named: bool = False) -> bool:
        """Note what an error says about a session. Returns whether the outcome is unknown.

        unknown: the call without its answer, if it changes the session. is_named: it names its position, or a new id.
        """
        facts: dict[str, Any] = {"began": answer.began, "ended": answer.ended, "client": self.name}
        match answer.code:
            case "position_conflict":
                place.length = answer.body["error"]["position"]
                place.note(history.Length(position=place.length, **facts))
            case "session_not_found":
                place.note(history.Absent(**facts))
                place.length = 0
            case "session_lost":
                place.lost_at.append(answer.ended)
            case "no_run":
                place.note(history.NoRun(**facts))
            case "broken" | "outcome_unknown":
                if unknown is not None:
                    place.note(unknown)
                return True
            case "run_taken_over" | "revision_conflict" if isinstance(unknown, history.Generate):
                place.note(unknown)
            case _ if answer.status == 503:
                time.sleep(self._chance.uniform(0, _PAUSE_S))
                if isinstance(unknown, history.Generate):
                    # Nothing was done to the text, but a call that names its position may resume it.
                    place.note(replace(unknown, was_refused=True))
                elif is_named and unknown is not None:
                    place.note(unknown)
                return is_named
        return False

    def _create(self, place: Place) -> None:
        if place.origin is not None:
            self._world.replace(place)
            return
        for _ in range(_ATTEMPTS):
            answer = self._call(place, "create", "PUT", "", {"text": place.text})
            if answer is None:
                return
            call = history.Create(text=place.text, began=answer.began, client=self.name)
            if answer.is_ok:
                place.length = answer.body["position"]
                place.note(replace(call, is_new=answer.status == 201, position=place.length, ended=answer.ended))
                return
            if not self._note_refusal(place, answer, call, is_named=True):
                return

    def _feed(self, place: Place) -> None:
        text = "".join(self._chance.choices(_LETTERS, k=self._chance.choice([1, 6, 12, 12, 12, 300])))
        self._feed_until_known(place, text, place.length if self._chance.random() < 0.6 else None)

    def _repeat_feed(self, place: Place) -> None:
        """Feed again what some client has fed before: it is there already, or the position is wrong."""
        fed = [call for call in place.calls if isinstance(call, history.Feed) and call.end is not None]
        if fed:
            call = self._chance.choice(fed[-5:])
            self._feed_until_known(place, call.text, (call.end or 0) - len(call.text))

    def _feed_until_known(self, place: Place, text: str, position: int | None) -> None:
        for _ in range(_ATTEMPTS):
            body = {"text": text, "position": position, "num_next": 0}
            answer = self._call(place, "feed", "POST", "/feed", body)
            if answer is None:
                return
            call = history.Feed(text=text, position=position, began=answer.began, client=self.name)
            if answer.is_ok:
                end = answer.body["position"]
                place.length = max(place.length, end) if position is not None else end
                place.note(replace(call, end=end, ended=answer.ended))
                return
            is_unknown = self._note_refusal(place, answer, call, is_named=position is not None)
            if not is_unknown or position is None:
                return

    def _fields(self, max_chars: int) -> Fields:
        temperature = self._chance.choice([1.0, 1.0, 0.5, 0.0])
        return (
            ("max_tokens", self._chance.randrange(1, max_chars)),
            ("seed", self._chance.randrange(10**9)),
            ("temperature", temperature),
        )

    def _generate(self, place: Place) -> None:
        fields = self._fields(80)
        position = place.length if self._chance.random() < 0.6 else None
        for _ in range(_ATTEMPTS):
            body = dict(fields) | {"position": position}
            answer = self._call(place, "generate", "POST", "/generate", body)
            if answer is None:
                return
            call = history.Generate(fields=fields, position=position, began=answer.began, client=self.name)
            if answer.is_ok:
                text, end = answer.body["text"], answer.body["position"]
                place.length = end
                place.note(replace(call, start=end - len(text), received=text, end=end, ended=answer.ended))
                return
            if not self._note_refusal(place, answer, call, is_named=position is not None) or position is None:
                return

    def _stream(self, place: Place) -> None:
        fields = self._fields(self._world.longest_run)
        position = place.length if self._chance.random() < 0.6 else None
        body = dict(fields) | {"position": position, "stream": True}
        streamed = self._read_stream(place, "stream", "POST", "/generate", body)
        if streamed is None:
            return
        call = history.Generate(fields=fields, position=position, began=streamed.answer.began, client=self.name)
        if streamed.first_at is not None:
            call = replace(call, start=streamed.start, received=streamed.text, ended=streamed.first_at)
        self._note_stream(place, streamed, call, is_named=position is not None)
        after = streamed.position if streamed.first_at is not None else position
        if streamed.ending in ("broken", "reconnect", *_FAULT_CODES) and after is not None:
            self._resume_after(place, after)

    def _resume(self, place: Place) -> None:
        """Resume whatever ran last, perhaps while another client still streams it."""
        self._resume_after(place, max(0, place.length - self._chance.randrange(50)))

    def _resume_after(self, place: Place, after: int) -> None:
        for _ in range(_ATTEMPTS):
            if self._chance.random() < 0.1:
                return  # as a client that was closed meanwhile
            streamed = self._read_stream(place, "resume", "GET", f"/generate?after={after}")
            if streamed is None:
                return
            call = history.Resume(after=after, began=streamed.answer.began, client=self.name)
            if streamed.first_at is not None:
                call = replace(call, received=streamed.text, ended=streamed.first_at)
                after = max(after, streamed.position)
            self._note_stream(place, streamed, call, is_named=True)
            if streamed.ending not in ("broken", "reconnect", "session_busy", *_FAULT_CODES):
                return
            time.sleep(self._chance.uniform(0, _PAUSE_S))

    def _read_stream(self, place: Place, what: str, method: str, suffix: str, body: object = None) -> Streamed | None:
        if not self._world.takes_another():
            return None
        left_after = self._chance.randrange(1, 6) if self._chance.random() < 0.15 else math.inf
        with self._caller.stream(method, f"/v1/sessions/{place.name}{suffix}", body) as (streamed, events):
            for number, _ in enumerate(events, 1):
                if number >= left_after:
                    streamed.ending = "left"
                    break
            ended = time.monotonic()
        if streamed.answer.status >= 400:
            streamed.ending = streamed.answer.code
        self._count(place, what, streamed.answer, ended, streamed.ending)
        streamed.answer = replace(streamed.answer, ended=ended)
        return streamed

    def _note_stream(self, place: Place, streamed: Streamed, call: Operation, *, is_named: bool) -> None:
        answer = streamed.answer
        if answer.status >= 400:
            self._note_refusal(place, answer, call, is_named=is_named)
            return
        place.note(call)
        place.length = max(place.length, streamed.position)
        facts: dict[str, Any] = {"began": answer.began, "ended": answer.ended, "client": self.name}
        if streamed.ending == "done":
            place.note(history.Finish(position=streamed.position, sha256=streamed.sha256, **facts))
        elif streamed.ending == "reconnect":
            place.note(history.Saved(position=streamed.position, **facts))
        elif streamed.ending == "session_lost":
            place.lost_at.append(answer.ended)

    def _read(self, place: Place) -> None:
        answer = self._call(place, "read", "GET", "/text")
        if answer is not None:
            self._note_text(place, answer)

    def _note_text(self, place: Place, answer: Answer) -> bool:
        """Note the answer to a read. Returns whether it says something."""
        if not answer.is_ok:
            self._note_refusal(place, answer, None)
            return answer.status == 404
        assert answer.body["from"] == 0, "a text of this length is retained whole"
        text = answer.body["text"]
        place.length = len(text)
        place.note(history.Read(text=text, began=answer.began, ended=answer.ended, client=self.name))
        return True

    def _show(self, place: Place) -> None:
        answer = self._call(place, "show", "GET")
        if answer is not None and answer.is_ok:
            place.length = answer.body["position"]
            facts: dict[str, Any] = {"began": answer.began, "ended": answer.ended, "client": self.name}
            place.note(history.Length(position=place.length, **facts))
        elif answer is not None:
            self._note_refusal(place, answer, None)

    def _rewind(self, place: Place) -> None:
        is_far = place.length > _LONG_TEXT or self._chance.random() < 0.2
        position = self._chance.randrange(1, 500) if is_far else max(1, place.length - self._chance.randrange(1, 40))
        for _ in range(_ATTEMPTS):
            answer = self._call(place, "rewind", "POST", "/rewind", {"position": position})
            if answer is None:
                return
            call = history.Rewind(position=position, began=answer.began, client=self.name)
            if answer.is_ok:
                assert answer.body["position"] == position
                place.length = position
                place.note(replace(call, ended=answer.ended))
                return
            if not self._note_refusal(place, answer, call, is_named=True):
                return

    def _fork(self, place: Place) -> None:
        """Fork a session. Its text becomes known by reading the new one, before others work on that."""
        position = self._chance.randrange(1, place.length + 1) if self._chance.random() < 0.6 else None
        new = Place(f"{place.name}.{self._chance.randrange(10**6)}", "", origin=place.name)
        began, unknown = None, []
        for _ in range(_ATTEMPTS):
            answer = self._call(place, "fork", "POST", "/fork", {"id": new.name, "position": position})
            if answer is None:
                return
            began = began if began is not None else answer.began
            if answer.is_ok:
                ended, length = answer.ended, answer.body["position"]
                break
            if self._note_refusal(place, answer, None, is_named=True):
                unknown.append(answer.began)
            elif answer.code != "session_busy":
                return
            time.sleep(self._chance.uniform(0, _PAUSE_S))
        else:
            return
        for _ in range(5 * _ATTEMPTS):
            answer = self._call(new, "read", "GET", "/text")
            if answer is None:
                return
            if answer.is_ok:
                break
            if new.lost_at or answer.code == "session_not_found":
                self._world.all_places.append(new)
                new.note(history.Create(text="", is_new=True, began=began, ended=ended, client=self.name))
                self._note_text(new, answer)  # nothing explains it
                return
            time.sleep(self._chance.uniform(0, _PAUSE_S))
        else:
            return
        text = answer.body["text"]
        facts: dict[str, Any] = {"began": began, "ended": ended, "client": self.name}
        place.note(history.Fork(position=position, text=text, **facts))
        new.text, new.length = text, len(text)
        new.note(history.Create(text=text, is_new=True, position=length, **facts))
        for at in unknown:  # a replica that was paused may make it again, after it was deleted
            new.note(history.Create(text=text, began=at, client=self.name))
        self._note_text(new, answer)
        if len(text) != length:
            self._world.unexpected.append((new.name, "fork of another length", began, ended))
        self._world.add(new)

    def _delete(self, place: Place) -> None:
        answer = self._call(place, "delete", "DELETE")
        if answer is None:
            return
        call = history.Delete(began=answer.began, client=self.name)
        if answer.is_ok:
            place.note(replace(call, ended=answer.ended))
            place.length = 0
            if self._chance.random() < 0.7:
                self._world.replace(place)
        else:
            self._note_refusal(place, answer, call)

    def read_at_the_end(self, place: Place) -> None:
        """Read a session until there is an answer."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answer = self._caller.call("GET", f"/v1/sessions/{place.name}/text")
            if self._note_text(place, answer) or place.lost_at:
                return
            time.sleep(_PAUSE_S)
        self._world.unexpected.append((place.name, "read nothing at the end", time.monotonic(), time.monotonic()))


class ReferenceServer:
    """Says what a server without faults and without sessions generates. Any number of threads may call it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[tuple[str, Fields], str] = {}

    def __call__(self, text: str, fields: Fields) -> str:
        """Return what a request generates after a text."""
        if (text, fields) not in self._known:
            with closing(Caller(self._port)) as caller:
                answer = caller.call("POST", "/v1/completions", {"prompt": text} | dict(fields))
            assert answer.is_ok, answer
            self._known[text, fields] = answer.body["choices"][0]["text"]
        return self._known[text, fields]


@dataclass
class Verdict:
    """What a run has shown."""

    seed: int
    counts: Counter[str]
    faults: list[Fault]
    violations: list[str]
    num_sessions: int
    num_lost: int  # sessions that answered session_lost, where Redis and a replica died together
    num_excused: int  # sessions whose last writes may have been lost so
    num_undecided: int

    @property
    def is_right(self) -> bool:
        """Whether everything could be explained."""
        return not self.violations and not self.num_undecided

    def figures(self) -> Figures:
        """Return it for a file."""
        return {
            "seed": self.seed,
            "answers": dict(self.counts),
            "faults": Counter(fault.kind for fault in self.faults),
            "violations": self.violations,
            "sessions": self.num_sessions,
            "lost": self.num_lost,
            "excused": self.num_excused,
            "undecided": self.num_undecided,
        }


def run(
    seed: int,
    num_operations: int,
    *,
    num_sessions: int = NUM_SESSIONS,
    longest_run: int = 6000,
    think_s: float = 0,
    paused_through_recovery: bool = False,
    settings: dict[str, str] | None = None,
) -> Verdict:
    """Run clients and faults, and check what the clients were answered.

    Args:
        seed: Of the clients' and the faults' choices. What happens also depends on the machine.
        num_operations: How many calls all clients make.
        num_sessions: How many sessions there are at a time.
        longest_run: How many characters a stream has at most.
        think_s: How long a client waits between two calls at most.
        paused_through_recovery: See Injector.
        settings: More settings of the servers.
    """
    settings = settings or {}
    options = ("--appendfsync", "always" if seed % 4 == 0 else "everysec")
    world = World(seed, num_operations, num_sessions, longest_run, think_s)
    with deployed(3, None, SERVE, options, **settings) as deployment:
        injector = Injector(deployment, seed, with_paused_recovery=paused_through_recovery)
        clients = [Client(world, deployment.balancer.port, f"{seed} client {number}") for number in range(NUM_CLIENTS)]
        injector.start()
        try:
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                for running in [pool.submit(client.run) for client in clients]:
                    running.result()
        finally:
            injector.stop()
        read_at_every_replica(world, deployment)
    replica = Replica(settings)
    try:
        replica.wait_until_ready()
        return judge(seed, world, injector, ReferenceServer(replica.port))
    finally:
        replica.kill()


def read_at_every_replica(world: World, deployment: Deployment) -> None:
    """Read every session from every replica, now that all work again."""
    for number, replica in enumerate(deployment.replicas):
        reader = Client(world, replica.port, f"end {number}")
        for place in world.all_places:
            if place.calls and not place.lost_at:
                reader.read_at_the_end(place)
        reader.close()


def judge(seed: int, world: World, injector: Injector, reference: ReferenceServer) -> Verdict:
    """Check every session, and every error."""
    violations: list[str] = []
    num_lost = num_excused = num_undecided = 0
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:  # the reference server computes several texts at once
        certain = [certain_calls(place, injector.faults) for place in world.all_places]
        explanations = pool.map(lambda calls: explain(calls, reference), certain)
    for place, calls, found in zip(world.all_places, certain, explanations, strict=True):
        is_excused = calls is not place.calls
        num_excused += is_excused
        if place.lost_at:
            num_lost += 1
            if not is_excused:
                violations.append(f"{place.name}: session_lost, although Redis and a replica did not die together")
        if not found.is_decided:
            num_undecided += 1
        elif not found.is_found:
            violations.append(describe(place, found, injector))
    violations += wrong_errors(world, injector)
    counts = Counter(dict(sorted(world.counts.items())))
    num_sessions = len(world.all_places)
    return Verdict(seed, counts, injector.faults, violations, num_sessions, num_lost, num_excused, num_undecided)


def certain_calls(place: Place, faults: Sequence[Fault]) -> Sequence[Operation]:
    """Return a session's calls up to the first of them that Redis and a replica may have lost together; mostly all.

    Nothing may have noticed that loss, so what follows it can't be checked.
    """
    calls: Sequence[Operation] = place.calls
    for fault in faults:
        if fault.lost_until is not None and any(
            call.began <= fault.lost_until and fault.began <= last_write(call) for call in place.calls
        ):
            calls = [
                replace(call, ended=math.inf) if call.ended > fault.began else call
                for call in calls
                if call.began < fault.began
            ]
    return calls


def last_write(call: Operation) -> float:
    """Return when a call may have changed its session last; -inf if it changes nothing."""
    match call:
        case history.Read() | history.Length() | history.Absent() | history.Fork() | history.NoRun():
            return -math.inf
        case history.Resume() | history.Generate(end=None):
            return call.ended + _UNKNOWN_S  # a stream, which is saved on its way
    return call.ended


def wrong_errors(world: World, injector: Injector) -> list[str]:
    """Return the errors that docs/api.md doesn't allow at their moment."""
    places = {place.name: place for place in world.all_places}
    wrong = []
    for name, what, began, ended in world.unexpected:
        code = what.split()[-1]
        if code in ("position_conflict", "session_not_found", "no_run", "session_lost"):
            continue  # the history shows whether they are right
        if code in _FAULT_CODES:
            is_right = injector.covers(began, ended, _GRACE_S)
        elif code in ("session_busy", "run_taken_over", "revision_conflict"):
            place = places.get(name)
            is_right = place is None or _overlaps(place, began, ended)
        else:
            is_right = False
        if not is_right:
            wrong.append(f"{name}: {what} after {ended - began:.2f} s")
    return wrong


def _overlaps(place: Place, began: float, ended: float) -> bool:
    """Return whether another call of the session may have been running at that time."""
    for other_began, other_ended, outcome in place.all_calls:
        if outcome == "session_busy" or (other_began, other_ended) == (began, ended):
            continue
        until = other_ended + (_BUSY_S if outcome in ("ok", "done") else _UNKNOWN_S)
        if other_began <= ended and began <= until:
            return True
    return False


def describe(place: Place, found: Explanation, injector: Injector) -> str:
    """Return what happened to a session that can't be explained."""
    lines = [f"{place.name}: no order explains the answers", "  explained:"]
    lines += [f"    {line_of(call)}" for call in found.explained[-25:]]
    state = found.state
    text = "no session" if state.text is None else f"{len(state.text)} characters, ...{state.text[-30:]!r}"
    run = "" if state.run is None else f"; run {state.run.state.value} from {state.run.start} to {state.run.end}"
    lines += [f"  state: {text}{run}", "  one of these had to be next:"]
    lines += [f"    {line_of(call)}" for call in found.left]
    first = min((call.began for call in found.left), default=0)
    lines.append("  faults:")
    lines += [
        f"    {fault.began:.2f} to {fault.ended:.2f} {fault.kind}"
        for fault in injector.faults
        if fault.ended > first - 30 and fault.began < first + 10
    ]
    return "\n".join(lines)


def line_of(call: Operation) -> str:
    """Return a call in one line."""
    facts = {name: value for name, value in vars(call).items() if name not in ("began", "ended", "client")}
    for name in ("text", "received"):
        if len(facts.get(name, "")) > 40:
            facts[name] = f"{len(facts[name])}: {facts[name][:10]}...{facts[name][-20:]}"
    ended = "unknown" if call.is_unknown else f"{call.ended:.2f}"
    words = " ".join(f"{name}={value!r}" for name, value in facts.items() if value not in (None, False))
    return f"{call.began:.2f} to {ended} [{call.client}] {type(call).__name__} {words}"


def report(verdict: Verdict) -> None:
    """Print what a run has shown."""
    faults = Counter(fault.kind for fault in verdict.faults)
    print(f"seed {verdict.seed}: {verdict.counts.total()} operations on {verdict.num_sessions} sessions")
    print(f"  faults: {dict(faults)}")
    print(f"  answers: {dict(verdict.counts)}")
    print(
        f"  {len(verdict.violations)} violations, {verdict.num_undecided} undecided; {verdict.num_excused} sessions "
        f"written when Redis and a replica died together, {verdict.num_lost} answered session_lost",
        flush=True,
    )
    for violation in verdict.violations:
        print(f"  VIOLATION {violation}", flush=True)


def main() -> None:
    """Run, and print what was found."""
    parser = argparse.ArgumentParser(
        description="Check what a deployment promises about sessions, while parts of it fail."
    )
    parser.add_argument("--operations", type=int, default=2500, help="calls of each run  [2500]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run for each  [1]")
    parser.add_argument(
        "--paused-through-recovery",
        action="store_true",
        help="also pause replicas while others recover from a restart of Redis",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: Figures = {"machine": machine(), "runs": []}
    is_right = True
    for seed in options.seeds:
        verdict = run(seed, options.operations, paused_through_recovery=options.paused_through_recovery)
        report(verdict)
        figures["runs"].append(verdict.figures())
        is_right = is_right and verdict.is_right
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
