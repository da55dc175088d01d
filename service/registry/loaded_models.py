"""Model versions in memory, each with its engine: loaded once, shared by all requests, the least recently used let go.

May not: know of HTTP.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from service.engine.arithmetic import VERSION
from service.engine.engine import Engine
from service.engine.gate_values import GateValues
from service.engine.kernels import Kernel
from service.engine.prefix_cache import PrefixCache
from service.errors import InvalidArtifact, ModelChanged, ModelNotFound
from service.model.artifact import Artifact
from service.model.charset import Charset
from service.model.quantize import IntegerPrecision
from service.registry.version_resolver import VersionResolver
from service.store.model_store import ModelStore, ModelVersion

_REBASE = "feed it with rebase, which names another version, to read its text into that"


@dataclass(frozen=True)
class EngineSettings:
    """How engines are made. Each model has one of its own.

    kernel: the implementation of the stepper. precision: None takes what the version's training found to be enough. max_running,
    max_waiting, stall_s: see Engine. prefix_cache_bytes: for states after prompts.
    """

    kernel: Kernel
    precision: IntegerPrecision | None = None
    max_running: int = 256
    max_waiting: int = 256
    stall_s: float = 30.0
    prefix_cache_bytes: int = 2**26


class LoadedModel:
    """A model version ready to generate. Any number of threads may use it."""

    def __init__(self, version: ModelVersion, artifact: Artifact, settings: EngineSettings) -> None:
        self.version = version
        self.charset: Charset = artifact.charset
        self.digest = artifact.digest
        self.precision: IntegerPrecision = settings.precision or artifact.training.serving_precision
        stepper, quantized = settings.kernel.load(artifact.config, artifact.tensors, self.precision)
        self.arithmetic = hashlib.sha256(f"{VERSION} {quantized.digest}".encode()).hexdigest()
        # What has to be equal for a state of one to be a state of the other.
        self.identity = hashlib.sha256(f"{self.digest} {self.arithmetic}".encode()).hexdigest()
        self.state_shape = (artifact.config.num_layers, artifact.config.num_units)
        self.gates = GateValues(quantized)
        self.embedding = artifact.tensors["embedding.weight"].astype(np.float16)  # (V, E), to be looked at
        self.prefixes = PrefixCache(settings.prefix_cache_bytes)
        self.engine = Engine(
            stepper,
            len(self.charset),
            settings.max_running,
            settings.max_waiting,
            settings.stall_s,
        )

    @property
    def fingerprint(self) -> str:
        """What has to be equal for equal seeds to give equal text: the model, and each number of the arithmetic."""
        return f"fp_{self.digest[:12]}_{self.precision}_{self.arithmetic[:12]}"


class LoadedModels:
    """Loads from a store on demand and keeps at most `max_models` versions. Safe for any number of threads."""

    def __init__(self, store: ModelStore, max_models: int, engine_settings: EngineSettings) -> None:
        self.store = store
        self._max_models = max_models
        self._engine_settings = engine_settings
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.resolver = VersionResolver(store, self._load)

    def get(self, ref: str) -> LoadedModel:
        """The model that `ref` means. Raises ModelNotFound, InvalidArtifact.

        What a name without a number means stays until `served` is refreshed: nobody waits for a new version. A version
        that is loaded stays usable by whoever holds it, also after it was let go of here.
        """
        served = self.resolver.get(ref)
        try:
            model = self._load(served or self.store.resolve(ref))
        except (ModelNotFound, InvalidArtifact):
            version = self.store.resolve(ref)
            if served in (None, version):
                raise
            model = self._load(version)  # the other was let go of, and is no longer there
        self.resolver.replace(ref, served, model.version)
        return model

    def resolve(self, ref: str) -> ModelVersion:
        """The version that `ref` means, loaded or not. Raises ModelNotFound."""
        return self.resolver.get(ref) or self.store.resolve(ref)

    def all(self) -> list[LoadedModel]:
        """Those that are loaded."""
        with self._lock:
            return list(self._models.values())

    def _load(self, version: ModelVersion) -> LoadedModel:
        model = self._find(version.ref)
        if model is not None:
            return model
        with self._lock:
            loading = self._loading.setdefault(version.ref, threading.Lock())
        with loading:  # two requests for one version must not read it twice, and others must not wait for them
            model = self._find(version.ref)
            if model is None:
                model = LoadedModel(*self.store.load(version.ref), self._engine_settings)
                self._keep(model)
        return model

    def for_state(self, ref: str, identity: str) -> LoadedModel:
        """The version that a state belongs to: as it is loaded, or as it is in the store. Raises ModelChanged."""
        model = self._find(ref)
        if model is None or model.identity != identity:
            try:
                model = self.get(ref)
            except ModelNotFound as error:
                raise ModelChanged(f"{ref}, which this session began with, is no longer there; {_REBASE}") from error
        if model.identity != identity:
            raise ModelChanged(f"{ref} is no longer what this session began with; {_REBASE}")
        return model

    def close(self) -> None:
        """End all engines, and what they are at."""
        for model in self.all():
            model.engine.close()

    def _find(self, ref: str) -> LoadedModel | None:
        with self._lock:
            if ref in self._models:
                self._models.move_to_end(ref)
            return self._models.get(ref)

    def _keep(self, model: LoadedModel) -> None:
        with self._lock:
            self._models[model.version.ref] = model
            self._loading.pop(model.version.ref, None)
            while len(self._models) > self._max_models:
                _, evicted = self._models.popitem(last=False)
                evicted.engine.retire()
