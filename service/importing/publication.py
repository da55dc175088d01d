"""Publishes an imported model: measures it if there is a text, chooses the serving precision, writes the card."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service import __version__
from service.importing.detection import Source
from service.importing.foreign import ForeignModel
from service.model.artifact import CARD, Tensors, write_artifact
from service.model.config import ModelConfig
from service.model.quantize import MAX_ADDED_LOSS, Precision, choose_precision
from service.store.model_store import ModelStore, ModelVersion

PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "int4")


@dataclass(frozen=True)
class MeasuredText:
    """The text of a measurement, and what was found."""

    name: str
    sha256: str
    num_scored: int  # characters
    losses: Mapping[Precision, float]  # nats a character


def publish_import(
    store: ModelStore,
    name: str,
    config: ModelConfig,
    tensors: Tensors,
    *,
    model: ForeignModel,
    source: Source,
    notes: Sequence[str],
    measured: MeasuredText | None,
    command: str,
) -> ModelVersion:
    """Publish a converted model as a new version of `name`. Return it.

    Args:
        store: where it is published.
        name: the model's name.
        config: its sizes and charset.
        tensors: its weights.
        model: what was read, for the card; only its descriptions are used.
        source: the file, for the card.
        notes: lines for the card.
        measured: the losses; None if nothing was measured.
        command: repeats the import, for the card.

    Raises StoreError, InvalidArtifact, InvalidValue.
    """
    facts: dict[str, Any] = {
        "format": 1,
        "published_at": int(time.time()),
        "command": command,
        "imported": {**asdict(source), "kind": model.kind, "library": model.library, "notes": "\n".join(notes)},
        "vocab_size": config.vocab_size,
        "num_parameters": config.num_parameters,
        "versions": {"gru-serve": __version__},
    }
    if measured is not None:
        facts["serving_precision"] = choose_precision(measured.losses)
        facts["losses"] = {
            "validation_nats_per_char": measured.losses["float32"],
            "validation_num_scored": measured.num_scored,
            "validation_text": measured.name,
            "validation_text_sha256": measured.sha256,
            "validation_nats_per_char_by_precision": dict(measured.losses),
        }
    card = {CARD: _card(name, config, facts, measured).encode()}

    def write(directory: Path) -> None:
        write_artifact(directory, config, tensors, facts, card)

    return store.publish(name, write)


def _card(name: str, config: ModelConfig, facts: Mapping[str, Any], measured: MeasuredText | None) -> str:
    imported = facts["imported"]
    notes = "".join(f"- {note}\n" for note in imported["notes"].splitlines())
    return f"""# {name}

A GRU character model: characters -> embedding ({config.embedding_dim}) -> GRU ({config.num_units} units x \
{config.num_layers}) -> dense over {config.vocab_size} characters.
{config.num_parameters:,} parameters, float32.

## Where it is from

Imported from `{imported["name"]}` ({imported["kind"]}, {imported["library"]}), {imported["num_bytes"]:,} bytes, SHA-256
`{imported["sha256"]}`:

    {facts["command"]}

{notes}
The weights are those of the file. Who trained them, and on which text, the file doesn't say.

{_quality(facts, measured)}"""


def _quality(facts: Mapping[str, Any], measured: MeasuredText | None) -> str:
    if measured is None:
        return f"""## Quality

Nothing was measured, because the import was given no `--corpus`. The model is served in int8. If 4 bits lose at most
{MAX_ADDED_LOSS} nats a character on a text, `gru-serve import --corpus` marks the version to be served in 4 bits.
"""
    served = facts["serving_precision"]
    rows = "\n".join(
        f"| {precision}{' (served)' if precision == served else ''} | {loss:.4f} |"
        for precision, loss in measured.losses.items()
    )
    return f"""## Quality

The loss on {measured.num_scored:,} characters of `{measured.name}`, SHA-256
`{measured.sha256}`. If the model was trained on
this text, the loss says how well it is remembered, and not how well the model writes.

| precision | nats per character |
|---|---|
{rows}
"""
