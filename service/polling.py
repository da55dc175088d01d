"""A thread that looks for new model versions now and then."""

from __future__ import annotations

import threading
from contextlib import suppress

from service.errors import Overloaded
from service.served import ServedVersions


class ModelPolling:
    """Refreshes what is served every so many seconds, until it is closed."""

    def __init__(self, served: ServedVersions, every_s: float) -> None:
        self._served, self._every_s = served, every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-polling", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a version that is being loaded is loaded first."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            with suppress(Overloaded):  # somebody reloads by hand
                self._served.refresh(again=False)
