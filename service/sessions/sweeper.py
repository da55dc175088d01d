"""The thread that forgets sessions whose time is over."""

from __future__ import annotations

import threading

from service.sessions.memory import MemoryStore

_EVERY_S = 1.0
_SLICE = 256  # sessions forgotten at a time: the store is locked for a millisecond


class Sweeper:
    """Sweeps a store once a second until it is closed. That expired sessions don't answer doesn't depend on it."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            while self._store.sweep(_SLICE) and not self._closing.is_set():
                pass
