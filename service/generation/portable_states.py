"""Portable states with the models that compute them: texts that begin with one, and the state after a new text."""

from __future__ import annotations

from dataclasses import dataclass

from service.arrays import Float32
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.portable import StateHeader, StateSealer


@dataclass(frozen=True)
class PortableStart:
    """Where a text begins that continues a portable state."""

    model: LoadedModel
    hidden: Float32  # (L, H), the state at `position`; read-only
    position: int  # characters consumed before
    seed: int  # with which the text before was drawn


class PortableStates:
    """Opens portable states, and makes those of new texts. Any number of threads may use it."""

    def __init__(self, models: LoadedModels, sealer: StateSealer) -> None:
        self._models, self._sealer = models, sealer

    def open(self, state: str, ref: str | None) -> PortableStart:
        """Open a state with the model `ref`, or else with the version that it names, or one that computes the same.

        Raises InvalidState, StateExpired, StateModelMismatch, and what `LoadedModels.get` does.
        """
        opened = self._sealer.open(state)
        header = opened.header
        if ref is not None:
            model = self._models.get(ref)
        else:
            model = self._models.loaded(header.model, header.identity) or self._models.get(header.model)
        hidden = opened.hidden(model.identity, model.state_shape, model.version.ref)
        return PortableStart(model, hidden, header.position, header.seed)

    def seal(self, model: LoadedModel, hidden: Float32, position: int, seed: int) -> str:
        """Return a state that never expires. `hidden` is the (L, H) state after `position` characters."""
        header = StateHeader(
            model=model.version.ref, identity=model.identity, position=position, seed=seed, expires_at=None
        )
        return self._sealer.seal(header, hidden)
