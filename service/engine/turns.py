"""Work that one thread at a time does, in turns between the clients that wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar, cast

from service.engine.scheduler import Scheduler
from service.errors import GruServeError, Overloaded
from service.shares import SharedCapacity, current_client

Result = TypeVar("Result")


class Turns:
    """Does one piece of work at a time, each on a thread that waits for its result. Any thread may call any method.

    Clients take turns by the time that their work has taken (see `Scheduler`): however much work a client has waiting,
    another client waits for the piece in progress, and then for one piece at most of each client that waits.
    """

    def __init__(self, max_waiting: int, wait_s: float, refusal: str) -> None:
        """Share places between clients as `SharedCapacity` does.

        Args:
            max_waiting: pieces of work of one client that wait or are in progress.
            wait_s: a thread waits no longer than this for a turn.
            refusal: what is too much, as the message of an error.
        """
        self._wait_s, self._refusal = wait_s, refusal
        self._changed = threading.Condition(threading.Lock())  # guards all fields below, and those of the pieces
        self._scheduler: Scheduler[_Piece] = Scheduler(max_running=1)
        self._places = SharedCapacity(max_waiting, reserve=max_waiting)
        self._pieces: dict[tuple[str, Hashable], _Piece] = {}  # by client and key
        self._current: _Piece | None = None  # whose turn it is
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Number of threads that wait for a result, or work for one."""
        return self._num_waiting

    def once(self, key: Hashable, work: Callable[[], Result], *, always: bool = False) -> Result:
        """Return what `work` returns, which is called when it is the turn of the current client.

        Threads that wait for the same key at the same time get the result of one call. A later call with the key calls
        `work` again, which therefore looks first whether its result was stored in the meantime.

        Args:
            key: names the work.
            work: If it raises GruServeError, each thread that waits for the key raises a copy.
            always: wait for the turn however many others wait, and as long as that takes.

        Raises Overloaded, and what `work` raises.
        """
        while True:
            with self._changed:
                piece = self._join(key, always)
                try:
                    is_mine = self._wait(piece, None if always else time.monotonic() + self._wait_s)
                except BaseException:
                    self._leave(piece)
                    raise
            if is_mine:
                return self._done(piece, work)
            if isinstance(piece.outcome, GruServeError):
                raise piece.outcome.copy()
            if piece.outcome is not None:
                return cast(Result, piece.outcome[0])

    def _join(self, key: Hashable, always: bool) -> _Piece:
        """Return the piece of work with this key for which one more thread waits: another client's if it has begun."""
        client = current_client()
        has_room = always or self._places.has_room(client)
        others = [one for one in self._pieces.values() if one.key == key and (one.has_begun or not has_room)]
        piece = self._pieces.get((client, key)) or next(iter(others), None)
        if piece is None:
            if not has_room:
                raise Overloaded(f"{self._refusal}: try again in a second")
            piece = self._pieces[client, key] = _Piece(client, key)
            self._places.take(client)
            self._scheduler.add([piece])
        piece.num_threads += 1
        self._num_waiting += 1
        return piece

    def _wait(self, piece: _Piece, deadline: float | None) -> bool:
        """Wait until another thread has done a piece of work, or until its turn. Return whether this thread does it."""
        while not piece.is_over:
            if self._current is None:
                (self._current,) = self._scheduler.choose(1)
                self._changed.notify_all()
            if self._current is piece and not piece.has_begun:
                piece.has_begun = True
                return True
            if deadline is not None and time.monotonic() >= deadline:
                raise Overloaded(f"{self._refusal}: try again in a second")
            self._changed.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._num_waiting -= 1
        return False

    def _leave(self, piece: _Piece) -> None:
        """Let a thread wait no longer. Work for which none waits is not done."""
        self._num_waiting -= 1
        piece.num_threads -= 1
        if not piece.num_threads and not piece.is_over:
            self._end(piece)

    def _done(self, piece: _Piece, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, also to the other threads that wait for this key."""
        outcome: tuple[Result] | GruServeError | None = None  # None: the other threads try again
        began = time.monotonic()
        try:
            result = work()
            outcome = (result,)
            return result
        except GruServeError as error:
            outcome = error.copy()
            raise
        finally:
            with self._changed:
                self._num_waiting -= 1
                self._scheduler.charge(time.monotonic() - began)
                for other in [one for one in self._pieces.values() if one is piece or one.key == piece.key]:
                    if outcome is not None or other is piece:
                        other.outcome = outcome
                        self._end(other)

    def _end(self, piece: _Piece) -> None:
        piece.is_over = True
        del self._pieces[piece.client, piece.key]
        self._scheduler.remove([piece])
        self._places.give_back(piece.client)
        if self._current is piece:
            self._current = None
        self._changed.notify_all()


@dataclass(eq=False)
class _Piece:
    """A piece of work for which threads of one client wait."""

    client: str
    key: Hashable
    num_threads: int = 0
    has_begun: bool = False
    is_over: bool = False
    outcome: tuple[object] | GruServeError | None = None  # None also if it was not done
