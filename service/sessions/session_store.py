"""Where sessions are kept: the contract between what works on them and what stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.sessions.session import Session


@dataclass(slots=True, eq=False)
class Lease:
    """The right to change a session, until it is released. session: as it was when the lease was taken. on_takeover: to
    be called, on a thread of its own, when another process wants the session, or has it already.
    """

    session: Session
    on_takeover: Callable[[], None] | None = None


class SessionStore(Protocol):
    """Sessions by owner and id. Values go in and come out: nobody sees a change before it is saved.

    A session lives `ttl_s` seconds after its last lease was released, or after its creation. One that is leased neither
    expires nor is evicted. Of one that expired or was evicted the store remembers for a while that it was there. The
    session of one owner doesn't exist for another. Any number of threads may call; none waits for long. One that keeps
    sessions elsewhere may raise StoreUnavailable in every method but `release`, and SessionLost wherever a session is
    loaded whose last save it has lost.
    """

    def create(self, session: Session) -> Session:
        """Keep a new one, as revision 1, with `created_at` and `expires_at` set.

        Raises SessionExists, and Overloaded if there is no room that idle sessions could make.
        """
        ...

    def load(self, owner: str, session_id: str) -> Session:
        """As it was saved last. It may be leased to somebody. Raises SessionNotFound, SessionGone."""
        ...

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:
        """Reserve it, and load it. Raises SessionBusy if it is reserved, SessionNotFound, SessionGone.

        take_over: another process that has it is asked to give it up, and waited for.
        """
        ...

    def cached_copy(self, owner: str, session_id: str) -> Session | None:
        """As this process saw it last, without asking: good for nothing but `compare_and_save`. None: not known.

        Also None where asking takes no time.
        """
        ...

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:
        """Reserve and save it in one exchange; the lease, whose session is as it was saved.

        session: what `cached_copy` gave. None: it doesn't stand so any more, or is reserved, and nothing has changed.
        release: as of `save`.
        """
        ...

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """Keep its new state, if `session.revision` is the one that is kept; the new revision, one higher.

        release: and give the lease back. Raises RevisionConflict, also if the lease is not, or no longer, valid; then
        nothing has changed.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give it back, which counts as use. Harmless if that was done."""
        ...

    def delete(self, lease: Lease) -> None:
        """Forget it, as if it had never been. Raises RevisionConflict if the lease is not valid."""
        ...

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """The owner's, in the order of ids, those above `after`: `limit` at most."""
        ...

    def check(self) -> None:
        """Raises StoreUnavailable while sessions can't be had."""
        ...

    def close(self) -> None:
        """End its threads, and close its connections."""
        ...
