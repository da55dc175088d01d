"""Model versions in memory, ready to generate: loaded once, shared by all requests, the least recently used let go.

May not: know of HTTP.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from service.model.artifact import Artifact
from service.model.charset import Charset
from service.model.folded import FoldedGRU
from service.model.gru import GRUCharModel
from service.store import ModelStore, ModelVersion


class LoadedModel:
    """A model version ready to generate. Read only: any number of threads may use it."""

    def __init__(self, version: ModelVersion, artifact: Artifact) -> None:
        self.version = version
        self.charset: Charset = artifact.charset
        self.digest = artifact.digest
        self.network = FoldedGRU(GRUCharModel.from_tensors(artifact.config, artifact.tensors))

    @property
    def fingerprint(self) -> str:
        """What has to be equal for equal seeds to give equal text: the model and the arithmetic."""
        return f"fp_{self.digest[:16]}_float32"


class LoadedModels:
    """Loads from a store on demand and keeps at most `max_models` versions. Safe for any number of threads."""

    def __init__(self, store: ModelStore, max_models: int) -> None:
        self.store = store
        self._max_models = max_models
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, ref: str) -> LoadedModel:
        """The model that `ref` means now. Raises ModelNotFound, InvalidArtifact.

        A version that is loaded stays usable by whoever holds it, also after it was let go of here.
        """
        version = self.store.resolve(ref)
        model = self._find(version.ref)
        if model is not None:
            return model
        with self._lock:
            loading = self._loading.setdefault(version.ref, threading.Lock())
        with loading:  # two requests for one version must not read it twice, and others must not wait for them
            model = self._find(version.ref)
            if model is None:
                model = LoadedModel(*self.store.load(version.ref))
                self._keep(model)
        return model

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
                self._models.popitem(last=False)
