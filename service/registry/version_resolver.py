"""Which version a model's name stands for: the version that it was first resolved to, until a newer one is
loaded.

This module knows nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from service.errors import GruServeError, Overloaded
from service.store.model_store import ModelStore, ModelVersion

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Resolution:
    """The version that a name stands for, and why it is not the newest one if the newest can't be loaded."""

    name: str  # as requests write it, such as `shakespeare` or `shakespeare@stable`
    model: str  # full name of the version that requests get, such as `shakespeare@3`
    failed: str | None = None  # full name of the version that should replace it; None if the store names none
    code: str | None = None  # error code of the failed switch; None if `model` is what the store says


class VersionResolver:
    """Remembers the version of each name that requests have used, and switches names to newer versions.

    Full names such as `shakespeare@3` always stand for themselves and are not remembered. Any number of threads may
    use it.
    """

    def __init__(self, store: ModelStore, load: Callable[[ModelVersion], object]) -> None:
        """`load` makes a version ready for requests, or raises any exception if it can't."""
        self._store, self._load = store, load
        self._versions: dict[str, ModelVersion] = {}
        self._failures: dict[str, Resolution] = {}  # by name, if its newest version can't be loaded
        self._tried: dict[str, object] = {}  # the files of that version before it was tried, see ModelStore.snapshot
        self._lock = threading.Lock()  # guards the versions
        self._refreshing = threading.Lock()  # held during a refresh
        self.num_switched = self.num_failed = 0  # switches of a name to another version that worked, and that didn't

    def get(self, ref: str) -> ModelVersion | None:
        """Return the remembered version of a name, or None for a full name and a name not used before."""
        return self._versions.get(_name(ref))

    def replace(self, ref: str, expected: ModelVersion | None, version: ModelVersion) -> None:
        """Remember `version`, which is loaded, for a name, if the name's remembered version is `expected`.

        Does nothing otherwise, because another thread has switched the name meanwhile. Does nothing for a full name.
        """
        with self._lock:
            if ref != version.ref and self._versions.get(_name(ref)) == expected:
                self._versions[_name(ref)] = version

    def refresh(self, retry_failed: bool = True) -> list[Resolution]:
        """Resolve every remembered name in the store again, load changed versions, and switch names to those that load.

        Loading happens on the calling thread; requests use the previous version until it is done. Errors are logged and
        returned, never raised.

        Args:
            retry_failed: load a version again that failed to load before. One whose files have changed since, because
                it is still copied for example, is always loaded again.

        Raises:
            Overloaded: another thread is refreshing.
        """
        if not self._refreshing.acquire(blocking=False):
            raise Overloaded("a reload is in progress: try again in a second")
        try:
            with self._lock:
                names = sorted(self._versions)
            return [self._refresh(name, retry_failed) for name in names]
        finally:
            self._refreshing.release()

    def poll(self) -> None:
        """Refresh once. Versions that failed before are retried if their files changed. A PeriodicThread calls this."""
        with suppress(Overloaded):  # a refresh that an operator requested is in progress
            self.refresh(retry_failed=False)

    def resolutions(self) -> list[Resolution]:
        """Return the resolution of every remembered name, sorted by name, without reading the store."""
        with self._lock:
            versions = sorted(self._versions.items())
        failures = [
            (version.ref, self._failures.get(name, Resolution(name, version.ref))) for name, version in versions
        ]
        return [replace(failure, model=ref) for ref, failure in failures]

    def _refresh(self, name: str, retry_failed: bool) -> Resolution:
        current, failure = self._versions[name], self._failures.get(name)
        version = None
        try:
            version = self._store.resolve(name)
            before = self._store.snapshot(version)
            is_known = failure is not None and failure.failed == version.ref and self._tried.get(name) == before
            if failure is not None and is_known and not retry_failed:
                return failure
            self._tried[name] = before
            if version != current:
                self._load(version)
                self.replace(name, current, version)
                self.num_switched += 1
                log.info("switched to another version", name=name, model=version.ref, before=current.ref)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a new version, the current one must stay
            return self._failed(Resolution(name, current.ref, version.ref if version else None, _code(error)), error)
        self._failures.pop(name, None)
        self._tried.pop(name, None)
        return Resolution(name, version.ref)

    def _failed(self, resolution: Resolution, error: Exception) -> Resolution:
        self.num_failed += 1
        if self._failures.get(resolution.name) != resolution:  # polling must not log the same failure every time
            reason = error.message if isinstance(error, GruServeError) else type(error).__name__
            log.error(
                "a new version can't be served: the previous one stays in use",
                name=resolution.name,
                model=resolution.failed,
                served=resolution.model,
                code=resolution.code,
                error=reason,
            )
        self._failures[resolution.name] = resolution
        return resolution


def _name(ref: str) -> str:
    return ref.removesuffix("@latest")


def _code(error: Exception) -> str:
    return error.code if isinstance(error, GruServeError) else GruServeError.code
