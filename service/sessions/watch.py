"""What a session store tells about its own work, for whoever counts it."""

from __future__ import annotations

from typing import Literal, Protocol

Operation = Literal["create", "load", "lease", "claim", "renew", "save", "release", "delete", "page"]


class StoreWatch(Protocol):
    """Told of each exchange with a store that is not in this process. Any thread may call it."""

    def took(self, operation: Operation, duration_s: float) -> None:
        """An exchange is over, with whatever answer."""
        ...

    def failed(self, operation: Operation) -> None:
        """The store could not be reached, or gave no answer in time."""
        ...
