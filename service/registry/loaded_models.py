"""Model versions in memory, each with its engine. A version is loaded once, all requests share it, and it is evicted if
it is little used.

This module knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import structlog

from service.arrays import Float16
from service.engine.arithmetic import VERSION
from service.engine.engine import Engine
from service.engine.gate_values import GateValues
from service.engine.kernels import Kernel
from service.engine.prefix_cache import PrefixCache
from service.engine.stepper import Stepper
from service.engine.turns import Turns
from service.errors import InvalidArtifact, ModelChanged, ModelNotFound, Overloaded
from service.model.artifact import Artifact
from service.model.charset import Charset
from service.model.chat_template import ChatTemplate
from service.model.quantize import IntegerPrecision
from service.registry.store_reads import StoreReads
from service.registry.version_resolver import VersionResolver
from service.shares import SharedBudget
from service.store.model_store import Description, ModelStore, ModelVersion

log = structlog.get_logger(__name__)

_MAX_PENDING = 8  # versions that one client may have in the queue for loading
_PENDING_WAIT_S = 30.0  # a request waits no longer than this for its turn

_HINT = "to continue its text with another version, feed the session with `rebase`, which names that version"


@dataclass(frozen=True)
class EngineSettings:
    """How the engine of each loaded model is made."""

    kernel: Kernel  # the implementation that computes
    precision: IntegerPrecision | None = None  # of the recurrent weights; None takes what each version recommends
    max_running: int = 256  # see Engine
    max_waiting: int = 256  # see Engine
    stall_s: float = 30.0  # see Engine
    memory: SharedBudget | None = None  # bytes that the open texts of all engines share; None sets no limit
    prefix_cache_bytes: int = 2**26  # memory for states after prompts; 0 disables the cache


class LoadedModel:
    """A model version that is ready to generate. Any number of threads may use it."""

    version: ModelVersion
    charset: Charset
    chat: ChatTemplate | None  # how the messages of a chat are written; None if the version has no template
    digest: str  # of the published config and float32 weights, see Artifact: it says which model this is
    precision: IntegerPrecision  # of the recurrent weights as they are computed with
    arithmetic: str  # SHA-256 of all quantised numbers and the arithmetic's VERSION: how the model is computed
    identity: str  # SHA-256 of digest and arithmetic: states computed under one identity are valid under it only
    state_shape: tuple[int, int]  # (L, H)
    stepper: Stepper  # used by the engine's thread; by others only while the engine has nothing to do
    gates: GateValues
    embedding: Float16  # (V, E), for inspection only
    prefixes: PrefixCache
    engine: Engine

    def __init__(self, version: ModelVersion, artifact: Artifact, settings: EngineSettings) -> None:
        self.version = version
        self.charset = artifact.charset
        self.chat = artifact.chat
        self.digest = artifact.digest
        self.precision = settings.precision or artifact.training.serving_precision
        self.stepper, quantized = settings.kernel.load(artifact.config, artifact.tensors, self.precision)
        self.arithmetic = hashlib.sha256(f"{VERSION} {quantized.digest}".encode()).hexdigest()
        self.identity = hashlib.sha256(f"{self.digest} {self.arithmetic}".encode()).hexdigest()
        self.state_shape = (artifact.config.num_layers, artifact.config.num_units)
        self.gates = GateValues(quantized)
        self.embedding = artifact.tensors["embedding.weight"].astype(np.float16)
        self.prefixes = PrefixCache(settings.prefix_cache_bytes)
        self.engine = Engine(
            self.stepper,
            len(self.charset),
            settings.max_running,
            settings.max_waiting,
            settings.stall_s,
            settings.memory,
        )

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` in the API: equal fingerprints, seeds and requests give equal text.

        It abbreviates digest, precision and arithmetic.
        """
        return f"fp_{self.digest[:12]}_{self.precision}_{self.arithmetic[:12]}"


class LoadedModels:
    """The loaded versions, at most `max_models`. Loads from a store on demand. Any number of threads may use it.

    Versions are loaded one at a time, in turns between clients. An evicted model that still has texts stays
    in memory until they end. There are at most `max_models` of these too: as long as all of them are in use, no request
    gets another version loaded.
    """

    def __init__(self, store: ModelStore, max_models: int, engine_settings: EngineSettings) -> None:
        self.store, self.reads = store, StoreReads()
        self._max_models = max_models
        self._engine_settings = engine_settings
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()  # by full name, least recently used first
        self._evicted: list[LoadedModel] = []  # those that may still have texts
        self._lock = threading.Lock()  # guards both
        self._turns = Turns(_MAX_PENDING, _PENDING_WAIT_S, "too many model versions wait to be loaded")
        self.resolver = VersionResolver(store, lambda version: self._load(version, always=True))

    def get(self, ref: str) -> LoadedModel:
        """Return the model that `ref` stands for, and load it if necessary.

        The first use of a name without a number resolves it in the store; later uses get the same version until
        `resolver.refresh` switches the name. If that version was evicted and then deleted from the store, the name is
        resolved again.

        The caller may use the model for any time: an evicted model keeps working, and its engine's thread ends when it
        has nothing left to do.

        Raises:
            ModelNotFound: the store has no such version.
            InvalidArtifact: its files are damaged.
            Overloaded: it is not loaded, and too many others wait to be loaded or are in use.
        """
        resolved = self.resolver.get(ref)
        try:
            model = self._load(resolved or self._resolve(ref))
        except (ModelNotFound, InvalidArtifact):
            version = self._resolve(ref)
            if resolved in (None, version):
                raise
            model = self._load(version)  # the resolved version was evicted, and can't be loaded again
        self.resolver.replace(ref, resolved, model.version)
        return model

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that `get` would use for `ref`, without loading it. Raises ModelNotFound, Overloaded."""
        return self.resolver.get(ref) or self._resolve(ref)

    def describe(self, ref: str, param: str = "model") -> Description:
        """Return what is known about the version that `get` would use, without loading it.

        Raises ModelNotFound, which names `param`, InvalidArtifact, and Overloaded.
        """
        try:
            with self.reads.place():
                return self.store.describe(self.resolve(ref))
        except ModelNotFound as error:
            error.param = param
            raise

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait until a version is loaded."""
        return self._turns.num_waiting

    def all(self) -> list[LoadedModel]:
        """Return the models that are loaded now, least recently used first."""
        with self._lock:
            return list(self._models.values())

    def for_state(self, ref: str, identity: str) -> LoadedModel:
        """Return the model that a state was computed with, or one that computes the same to the bit.

        Args:
            ref: the full name of the version, `name@number`.
            identity: `LoadedModel.identity` of the model that computed the state.

        Raises:
            ModelChanged: the store no longer has the version, or it has another identity now; and no version that is
                loaded has this identity.
            InvalidArtifact: its files are damaged.
            Overloaded: see `get`.
        """
        model = self.loaded(ref, identity)
        if model is None:
            try:
                model = self.get(ref)
            except ModelNotFound as error:
                raise ModelChanged(f"{ref}, the version of this session, no longer exists; {_HINT}") from error
        if model.identity != identity:
            raise ModelChanged(f"{ref} has changed since this session last used it; {_HINT}")
        return model

    def loaded(self, ref: str, identity: str) -> LoadedModel | None:
        """Return a loaded model with this identity: the version `ref` if it is one, else any other; or None."""
        with self._lock:
            refs = [name for name, model in self._models.items() if model.identity == identity]
            if not refs:
                return None
            found = ref if ref in refs else refs[-1]
            self._models.move_to_end(found)
            return self._models[found]

    def close(self) -> None:
        """End all engines. Texts that they are working on fail with EngineFailed."""
        with self._lock:
            models = [*self._models.values(), *self._evicted]
        for model in models:
            model.engine.close()

    def _resolve(self, ref: str) -> ModelVersion:
        with self.reads.place():
            return self.store.resolve(ref)

    def _load(self, version: ModelVersion, *, always: bool = False) -> LoadedModel:
        """Return a version, and load it if necessary. With `always`, wait for it however much else is to be loaded."""
        found = self._find(version.ref)
        if found is not None:
            return found

        def found_or_loaded() -> LoadedModel:
            found = self._find(version.ref)
            if found is not None:
                return found
            if not always:
                self._require_room()
            loaded, artifact = self.store.load(version.ref)
            model = LoadedModel(loaded, artifact, self._engine_settings)
            if structlog.is_configured():  # a command prints no log
                for warning in artifact.warnings:
                    log.warning("a file of a model is ignored", model=version.ref, reason=warning)
            self._insert(model)
            return model

        return self._turns.once((version.ref, always), found_or_loaded, always=always)

    def _require_room(self) -> None:
        """Raise Overloaded if another model would be one too many in memory."""
        with self._lock:
            self._evicted = [model for model in self._evicted if model.engine.num_open]
            if len(self._evicted) >= self._max_models:
                raise Overloaded(
                    "all models in memory are in use, so no other one can be loaded: try again in a second"
                )

    def _find(self, ref: str) -> LoadedModel | None:
        """Return a loaded model by its full name, and mark it as used."""
        with self._lock:
            if ref in self._models:
                self._models.move_to_end(ref)
            return self._models.get(ref)

    def _insert(self, model: LoadedModel) -> None:
        with self._lock:
            self._models[model.version.ref] = model
            while len(self._models) > self._max_models:
                _, evicted = self._models.popitem(last=False)
                evicted.engine.retire()
                self._evicted.append(evicted)
