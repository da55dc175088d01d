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
        self._lock = threading.Lock()

    def get(self, ref: str) -> LoadedModel:
        """The model that `ref` means now. Raises ModelNotFound, InvalidArtifact.

        A version that is loaded stays usable by whoever holds it, also after it was let go of here.
        """
        version = self.store.resolve(ref)
        with self._lock:  # one load at a time: two requests for one version must not read it twice
            model = self._models.get(version.ref)
            if model is None:
                model = LoadedModel(*self.store.load(version.ref))
                self._models[version.ref] = model
            self._models.move_to_end(version.ref)
            while len(self._models) > self._max_models:
                self._models.popitem(last=False)
        return model
