"""The contract between what changes sessions and what stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

from service.errors import OutcomeUnknown, StoreUnavailable
from service.sessions.session import Session, SessionKey, SessionSummary

Answer = TypeVar("Answer")
#: A function from a session to the changed session and an answer. It gives back the session that it got if there is
#: nothing to save. It may be called twice, the first time with a copy that is no longer current.
Change = Callable[[Session], tuple[Session, Answer]]
Operation = Literal["create", "load", "lease", "claim", "renew", "save", "release", "delete", "summarize", "ping"]


class Lease(Protocol):
    """The right to change one session, until it is released. Only the thread that works on the session may use it."""

    session: Session
    """The session as it was when the lease was taken, or as it was saved with it last."""
    on_takeover: Callable[[], None] | None
    """Called on a thread of its own when another process requests the session, or has it already."""

    def save(self, session: Session, *, release: bool = False) -> None:
        """Store the session's new state and make it `self.session`; with `release`, give the lease back as well.

        Raises RevisionConflict if the lease is no longer valid, and then nothing has changed; OutcomeUnknown if the
        store didn't say whether it was done. Without `release`, the lease is then still valid, and the next save finds
        out.
        """
        ...

    def release(self) -> None:
        """Give the lease back, which counts as a use of the session. Harmless if that was done before."""
        ...


class SessionStore(Protocol):
    """Stores sessions by owner and id.

    Sessions are values: a change becomes visible when it is saved, never before. A session expires `ttl_s` seconds
    after its creation or after the last release of a lease. While it is leased it neither expires nor is evicted. For
    some time the store remembers which sessions expired or were evicted, and raises SessionGone instead of
    SessionNotFound. An owner's sessions don't exist for other owners.

    Any number of threads may call. No call blocks for long. A store outside this process may raise StoreUnavailable
    from every method except a lease's `release`, and SessionLost from every method that loads a session whose last save
    it has lost.
    """

    outlives_process: bool
    """Whether its sessions outlive this process, so that another one can continue a run that was saved on its way."""

    def create(self, session: Session) -> Session:
        """Store a new session as revision 1, and return it with `created_at` and `expires_at` set.

        Raises SessionExists, and Overloaded if there is no room that idle sessions could make.
        """
        ...

    def load(self, key: SessionKey) -> Session:
        """Return the session as it was saved last, leased or not. Raises SessionNotFound, SessionGone."""
        ...

    def update(self, key: SessionKey, change: Change[Answer], *, idempotent: bool = False) -> Answer:
        """Apply a change, save what it gives, and return its answer.

        `change` runs on the cached copy first, if there is one, and again on the current session if the copy turns out
        to be stale. Raises what `change` raises on the current session; SessionBusy, SessionNotFound, SessionGone;
        and OutcomeUnknown if the store didn't say whether it was saved: StoreUnavailable instead if the change is
        `idempotent`, because repeating it is then harmless.
        """
        ...

    def begin(self, key: SessionKey, change: Change[Answer], *, take_over: bool = False) -> tuple[Lease | None, Answer]:
        """Apply and save a change as `update` does, and keep the lease: None if there was nothing to save.

        With `take_over`, another process that holds the lease is requested to hand the session over, and waited for.
        """
        ...

    def delete(self, key: SessionKey) -> None:
        """Forget a session, as if it had never been. Raises SessionBusy, SessionNotFound, SessionGone.

        For some time the store remembers which sessions were deleted. To delete one of them again changes nothing.
        """
        ...

    def page(self, owner: str, after: str, limit: int) -> list[SessionSummary]:
        """Return up to `limit` of the owner's sessions, in the order of their ids, above the id `after`."""
        ...

    def check(self) -> None:
        """Raise StoreUnavailable while sessions can't be served."""
        ...

    def close(self) -> None:
        """End the store's threads and close its connections."""
        ...


class StoreObserver(Protocol):
    """Gets to know each exchange with a store outside the process. Any thread may call it."""

    def observe(self, operation: Operation, duration_s: float) -> None:
        """Count an exchange that is over, whatever its answer."""
        ...

    def count_failure(self, operation: Operation) -> None:
        """Count an exchange in which the store could not be reached, or gave no answer in time."""
        ...


@contextmanager
def safe_to_retry(is_idempotent: bool = True) -> Iterator[None]:
    """Map an unknown outcome to "safe to retry" for idempotent changes: raise StoreUnavailable, not OutcomeUnknown."""
    try:
        yield
    except OutcomeUnknown as error:
        if not is_idempotent:
            raise
        raise StoreUnavailable("the session store did not answer; repeating the request is safe: try again") from error
