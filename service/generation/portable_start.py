"""Portable states and the models that computed them: texts that begin with one, and the state after a new text."""

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


def open_start(models: LoadedModels, sealer: StateSealer, state: str, ref: str | None) -> PortableStart:
    """Open a portable state with the model `ref`, or else with the version that it names or one that computes the same.

    Raises InvalidState, StateExpired, StateModelMismatch, and what `LoadedModels.get` does.
    """
    opened = sealer.open(state)
    header = opened.header
    if ref is not None:
        model = models.get(ref)
    else:
        model = models.loaded(header.model, header.identity) or models.get(header.model)
    return PortableStart(model, opened.hidden(model.identity, model.state_shape), header.position, header.seed)


def seal_state(sealer: StateSealer, model: LoadedModel, hidden: Float32, position: int, seed: int) -> str:
    """Return a portable state that never expires. `hidden` is the (L, H) state after `position` characters."""
    header = StateHeader(
        model=model.version.ref, identity=model.identity, position=position, seed=seed, expires_at=None
    )
    return sealer.seal(header, hidden)
