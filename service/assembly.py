"""`Service.open` builds the parts of the service and connects them, for the server and for the commands.

No other module knows all parts. This one knows no HTTP, and nothing but `commands` and `web.app` may import it.
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from service.engine.kernels import Kernel, choose_kernel
from service.errors import InvalidArtifact, InvalidSettings
from service.generation.inspector import Inspector
from service.generation.portable_states import PortableStates
from service.generation.session_service import SessionService
from service.model.chat_template import ChatTemplate, find_template
from service.periodic import PeriodicThread
from service.registry.loaded_models import EngineSettings, LoadedModels
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateSealer
from service.sessions.redis_url import parse
from service.sessions.session_store import StoreObserver
from service.sessions.text import Retention
from service.settings import Settings
from service.shares import SharedBudget
from service.store.model_store import ModelStore

if TYPE_CHECKING:
    from service.sessions.redis_store import RedisStore

_SWEEP_S = 1.0  # between two searches for expired sessions in memory


@dataclass(frozen=True)
class Service:
    """The service without HTTP: what answers requests, and what it is made of. Any number of threads may use it."""

    kernel: Kernel
    models: LoadedModels
    default_model: str  # its name; loaded when the service was opened
    store: MemoryStore | RedisStore
    sessions: SessionService
    inspector: Inspector
    states: PortableStates
    _closing: ExitStack

    @classmethod
    def open(cls, settings: Settings, store_observer: StoreObserver | None = None) -> Self:
        """Build all parts, and load the default model.

        Args:
            settings: Those of the server. A command changes some, such as the number of threads.
            store_observer: Gets the duration of each call to a session store outside of this process.

        Raises InvalidSettings, ModelNotFound, InvalidArtifact; then nothing is left open.
        """
        kernel = choose_kernel(settings.kernel, settings.num_engine_threads)
        retention = Retention(settings.session_checkpoint_chars, settings.session_text_chars)
        with ExitStack() as closing:  # closes in the opposite order: what is used by other parts, after them
            store = _open_store(settings, retention, store_observer, closing)
            models = LoadedModels(
                ModelStore(settings.store_root, default=settings.model.partition("@")[0]),
                settings.max_models,
                _engine_settings(settings, kernel),
            )
            closing.callback(models.close)
            models.get(settings.model)
            sealer = StateSealer(settings.state_key_list or [secrets.token_hex(32)])
            sessions = SessionService(models, store, sealer, settings.session_ttl_s, retention)
            closing.callback(sessions.runs.close)
            if settings.model_poll_s:
                closing.callback(PeriodicThread("model-polling", settings.model_poll_s, models.resolver.poll).close)
            inspector, states = Inspector(models, sessions.get, sealer), PortableStates(models, sealer)
            return cls(kernel, models, settings.model, store, sessions, inspector, states, closing.pop_all())

    def close(self) -> None:
        """End all threads and connections. Texts that are being generated fail. Repeating it does nothing."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_session_store(settings: Settings) -> None:
    """Raise InvalidSettings if the URL of the session store is invalid, or names a file that can't be used."""
    url = settings.session_store.get_secret_value()
    try:
        if not url.startswith("memory:"):
            parse(url)
    except ValueError as error:
        raise InvalidSettings(f"GRU_SERVE_SESSION_STORE {error}", param="session_store") from None


def default_chat_template(settings: Settings) -> ChatTemplate | None:
    """Return the chat template of versions that have none. Raises InvalidSettings."""
    try:
        return find_template(settings.chat_template) if settings.chat_template else None
    except InvalidArtifact as error:
        raise InvalidSettings(f"GRU_SERVE_CHAT_TEMPLATE: {error.message}", param="chat_template") from None


def _engine_settings(settings: Settings, kernel: Kernel) -> EngineSettings:
    return EngineSettings(
        kernel=kernel,
        precision=settings.integer_precision,
        max_running=settings.max_batch,
        max_waiting=settings.max_queue,
        stall_s=settings.stall_s,
        memory=SharedBudget(settings.max_text_bytes),
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )


def _open_store(
    settings: Settings, retention: Retention, observer: StoreObserver | None, closing: ExitStack
) -> MemoryStore | RedisStore:
    url = settings.session_store.get_secret_value()
    if url.startswith("memory:"):
        memory = MemoryStore(settings.max_sessions, settings.max_session_bytes)
        closing.callback(PeriodicThread("sweeper", _SWEEP_S, memory.sweep).close)
        return memory
    check_session_store(settings)
    # Imported here, so that a server with sessions in memory starts without the redis library.
    from service.sessions.redis_server import RedisServer
    from service.sessions.redis_store import RedisStore

    store = RedisStore(RedisServer(url, observer=observer), retention.segment_chars, settings.max_session_bytes)
    closing.callback(store.close)
    return store
