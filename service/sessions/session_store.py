"""The contract between the operations on sessions and the place where sessions are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from service.errors import OutcomeUnknown, StoreUnavailable
from service.sessions.session import Session

# The values of a metric's label: "claim" is `compare_and_save`, "renew" the renewal of a lease.
Operation = Literal["create", "load", "lease", "claim", "renew", "save", "release", "delete", "page"]


@dataclass(slots=True, eq=False)
class Lease:
    """The exclusive right to change a session, from `lease` until `release`."""

    session: Session  # as it was when the lease was taken
    # Called on a thread of its own when another process requests the session, or has already taken it over. The holder
    # then saves and releases. None if the holder is not notified.
    on_takeover: Callable[[], None] | None = None


class SessionStore(Protocol):
    """Stores sessions by owner and id.

    Sessions are values: a change becomes visible when it is saved, never before. A session expires `ttl_s` seconds
    after its creation or after the last release of a lease. While it is leased it neither expires nor is evicted. For
    some time the store remembers which sessions expired or were evicted, and raises SessionGone instead of
    SessionNotFound. An owner's sessions don't exist for other owners.

    Any number of threads may call. No call blocks for long. A store outside this process may raise StoreUnavailable in
    every method except `release`, and SessionLost in every method that loads a session whose last save it has lost.
    """

    def create(self, session: Session) -> Session:
        """Store a new session and return it with `revision` 1 and with `created_at` and `expires_at` set.

        Raises SessionExists if the id is in use, and Overloaded if evicting every idle session would not make room.
        """
        ...

    def load(self, owner: str, session_id: str) -> Session:
        """Return the session as it was last saved, also while it is leased. Raises SessionNotFound, SessionGone."""
        ...

    def lease(self, owner: str, session_id: str, *, take_over: bool = False) -> Lease:
        """Lease the session and load it. Raises SessionBusy if it is leased; SessionNotFound, SessionGone.

        take_over: if another process has the lease, ask that process to release it and wait. Raises SessionBusy if it
        doesn't do so in time.
        """
        ...

    def cached_copy(self, owner: str, session_id: str) -> Session | None:
        """Return a cached, possibly stale copy. Use it only for `compare_and_save`.

        None if there is no copy, or if loading is so cheap that the store has no cache.
        """
        ...

    def compare_and_save(self, session: Session, changed: Session, *, release: bool = False) -> Lease | None:
        """Replace `session`, a `cached_copy`, by `changed` in one exchange. The session is leased afterwards.

        Returns the lease with the saved session. Returns None and changes nothing if the copy was stale or the session
        is leased. A store outside this process raises OutcomeUnknown if the save may or may not have happened.

        release: release the lease as part of the same exchange.
        """
        ...

    def save(self, lease: Lease, session: Session, *, release: bool = False) -> int:
        """Save the leased session and return its new revision, which is one higher.

        Raises RevisionConflict and changes nothing if `session.revision` is not the stored one, or if the lease has
        been released or lost. A store outside this process raises OutcomeUnknown if the save may or may not have
        happened.

        release: release the lease as part of the same exchange.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Release the lease. This counts as a use of the session. Does nothing if the lease is already released."""
        ...

    def delete(self, lease: Lease) -> None:
        """Delete the leased session; it is then unknown. Raises RevisionConflict if the lease was released or lost."""
        ...

    def page(self, owner: str, after: str, limit: int) -> list[Session]:
        """Return up to `limit` of the owner's sessions with ids greater than `after`, in the order of their ids."""
        ...

    def check(self) -> None:
        """Raise StoreUnavailable while the store can't be used."""
        ...

    def close(self) -> None:
        """End the store's threads and close its connections."""
        ...


class StoreObserver(Protocol):
    """Receives the duration and the failures of exchanges with a store outside this process. Called by any thread."""

    def observe(self, operation: Operation, duration_s: float) -> None:
        """Record the duration of an exchange, whatever its result was."""
        ...

    def count_failure(self, operation: Operation) -> None:
        """Count an exchange in which the store was unreachable or didn't answer in time."""
        ...


@contextmanager
def safe_to_retry(is_idempotent: bool = True) -> Iterator[None]:
    """Map an unknown outcome to "safe to retry" for an idempotent write: StoreUnavailable replaces OutcomeUnknown.

    A write is idempotent if it changes no text, or if its request names the position at which the text belongs.
    """
    try:
        yield
    except OutcomeUnknown as error:
        if not is_idempotent:
            raise
        raise StoreUnavailable("the session store did not answer; repeating the request is safe: try again") from error
