"""The model card: which text a model was trained on, how well it predicts, and how to train it again."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from service.training.checkpoint import Evaluation

CURVE = "loss.png"


def model_card(name: str, facts: dict[str, Any], has_curve: bool) -> str:
    """Return the card as Markdown.

    Args:
        name: the name of the model.
        facts: the contents of `training.json`.
        has_curve: whether a picture of the loss curve is stored beside the card, in the file `CURVE`.
    """
    corpus, losses, settings, run = facts["corpus"], facts["losses"], facts["settings"], facts["run"]
    notes = "\n".join(f"- {note}" for note in corpus["notes"].splitlines())
    rows = "\n".join(f"| {key} | {value if value != '' else 'not given'} |" for key, value in settings.items())
    curve = f"\n![Loss by epoch]({CURVE})\n" if has_curve else ""
    by_precision = losses["validation_nats_per_char_by_precision"]
    quantized = "\n".join(
        [
            "The same loss by the precision of the recurrent weights. The server uses the marked one:",
            "",
            "| precision | nats per character |",
            "|---|---|",
        ]
        + [
            f"| {precision}{' (served)' if precision == facts['serving_precision'] else ''} | {loss:.4f} |"
            for precision, loss in by_precision.items()
        ]
    )
    quantized += "\n"
    sample = "\n".join("    " + line for line in facts["sample"]["text"].split("\n"))
    return f"""# {name}

A GRU character model: characters -> embedding ({settings["embedding_dim"]}) -> GRU ({settings["num_units"]} units x \
{settings["num_layers"]}) -> dense over {facts["vocab_size"]} characters.
{facts["num_parameters"]:,} parameters, float32.

## Training data

`{corpus["name"]}`, {corpus["num_chars"]:,} characters, SHA-256 `{corpus["sha256"]}`.
The model was trained on {corpus["num_training_chars"]:,} characters. The other {corpus["num_validation_chars"]:,} were held out: the best update was
chosen by its loss on them, and the losses below are measured on them.

{notes}

## Quality

| loss on the held-out text, with the state carried through the whole text | |
|---|---|
| nats per character | {losses["validation_nats_per_char"]:.4f} |
| bits per character | {losses["validation_bits_per_char"]:.4f} |

{quantized}
Training loss at the best update, with dropout: {losses["training_nats_per_char"]:.4f} nats per character.
{curve}
## How it was made

    {facts["command"]}

| run | |
|---|---|
| updates | {run["num_updates"]:,} ({run["num_epochs"]:.1f} epochs) |
| best update | {run["best_update"]:,} |
| how it ended | {run["ended"]} |
| duration | {run["seconds"] / 60:.0f} minutes on {settings["threads"]} threads |
| speed, evaluations included | {run["chars_per_s"]:,.0f} characters/s |
| software | gru-serve {facts["versions"]["gru-serve"]}, torch {facts["versions"]["torch"]} |

| setting | value |
|---|---|
{rows}

## Sample

Prompt {facts["sample"]["prompt"]!r}, seed {facts["sample"]["seed"]}, temperature {facts["sample"]["temperature"]}:

{sample}
"""


def loss_curve(curve: Sequence[Evaluation]) -> bytes | None:
    """Draw training and validation loss by epoch as a PNG. Return None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    epochs = [point.epoch for point in curve]
    marker = "o" if len(curve) == 1 else None
    axes.plot(epochs, [point.training_loss for point in curve], label="training, dropout on", marker=marker)
    axes.plot(epochs, [point.validation_loss for point in curve], label="validation, averaged weights", marker=marker)
    best = min(curve, key=lambda point: point.validation_loss)
    axes.plot([best.epoch], [best.validation_loss], "k.", label=f"best: {best.validation_loss:.4f}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
