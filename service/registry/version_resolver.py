"""Which version a model's name means while the server runs: one that was loaded, until a newer one is.

May not: know of HTTP.
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
    """name: as callers say it. model: name@version that it means. failed: what it would mean, None: that can't be told;
    and code: why it doesn't, None: it does.
    """

    name: str
    model: str
    failed: str | None = None
    code: str | None = None


class VersionResolver:
    """The versions that names without a number mean, from their first use on. Safe for any number of threads.

    load: makes a version ready to be served; it may raise anything.
    """

    def __init__(self, store: ModelStore, load: Callable[[ModelVersion], object]) -> None:
        self._store, self._load = store, load
        self._versions: dict[str, ModelVersion] = {}
        self._failures: dict[str, Resolution] = {}  # of names that would mean another version, if it could be loaded
        self._lock = threading.Lock()  # of the versions
        self._refreshing = threading.Lock()
        self.num_switched = self.num_failed = 0

    def get(self, ref: str) -> ModelVersion | None:
        """What a name means; None: it was not asked for yet, or it is a version's full name."""
        return self._versions.get(_name(ref))

    def replace(self, ref: str, before: ModelVersion | None, version: ModelVersion) -> None:
        """Let a name mean a version that is loaded, unless it has got another resolution than the one before."""
        with self._lock:
            if ref != version.ref and self._versions.get(_name(ref)) == before:
                self._versions[_name(ref)] = version

    def refresh(self, retry_failed: bool = True) -> list[Resolution]:
        """Look what each name means now, and load that; then, and only if it can be loaded, it is served.

        retry_failed: try also what could not be loaded before. Takes as long as loading does. Raises Overloaded if another
        thread is at it.
        """
        if not self._refreshing.acquire(blocking=False):
            raise Overloaded("a reload is under way: try again in a second")
        try:
            with self._lock:
                names = sorted(self._versions)
            return [self._refresh(name, retry_failed) for name in names]
        finally:
            self._refreshing.release()

    def poll(self) -> None:
        """Look for new versions once, for a PeriodicThread. Versions that failed to load are not tried again."""
        with suppress(Overloaded):  # a reload by hand is under way, and does the same
            self.refresh(retry_failed=False)

    def resolutions(self) -> list[Resolution]:
        """What each name means, without looking."""
        with self._lock:
            versions = sorted(self._versions.items())
        failures = [
            (version.ref, self._failures.get(name, Resolution(name, version.ref))) for name, version in versions
        ]
        return [replace(failure, model=ref) for ref, failure in failures]

    def _refresh(self, name: str, retry_failed: bool) -> Resolution:
        served, failed = self._versions[name], self._failures.get(name)
        version = None
        try:
            version = self._store.resolve(name)
            if failed is not None and failed.failed == version.ref and not retry_failed:
                return failed
            if version != served:
                self._load(version)
                self.replace(name, served, version)
                self.num_switched += 1
                log.info("another version is served", name=name, model=version.ref, before=served.ref)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a new version, the old one goes on
            return self._failed(Resolution(name, served.ref, version.ref if version else None, _code(error)), error)
        self._failures.pop(name, None)
        return Resolution(name, version.ref)

    def _failed(self, resolution: Resolution, error: Exception) -> Resolution:
        self.num_failed += 1
        if self._failures.get(resolution.name) != resolution:  # a poll is not to say it twice a minute
            reason = error.message if isinstance(error, GruServeError) else type(error).__name__
            log.error(
                "a new version can't be served: the old one goes on",
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
