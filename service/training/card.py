"""The model card: which text a model was trained on, how well it predicts, and how to train it again."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from service.errors import plural
from service.training.checkpoint import Evaluation

CURVE = "loss.png"


def model_card(name: str, facts: Mapping[str, Any], has_curve: bool) -> str:
    """Return the card as Markdown.

    Args:
        name: the name of the model.
        facts: the contents of `training.json`.
        has_curve: whether a picture of the loss curve is stored beside the card, in the file `CURVE`.
    """
    settings = facts["settings"]
    head = f"""# {name}

A GRU character model: characters -> embedding ({settings["embedding_dim"]}) -> GRU ({settings["num_units"]} units x \
{settings["num_layers"]}) -> dense over {facts["vocab_size"]} characters.
{facts["num_parameters"]:,} parameters, float32.
"""
    return "\n".join([head, _data(facts), _quality(facts, has_curve), _making(facts), _sample(facts["sample"])])


def _data(facts: Mapping[str, Any]) -> str:
    corpus, initial = facts["corpus"], facts["initial"]
    notes = "".join(f"- {note}\n" for note in corpus["notes"].splitlines())
    began = f"The run began with the weights of `{initial['ref']}`, digest `{initial['digest']}`.\n" if initial else ""
    return f"""## Training data

`{corpus["name"]}`, {corpus["num_chars"]:,} characters, SHA-256 `{corpus["sha256"]}`.
The model was trained on {corpus["num_training_chars"]:,} characters. The other {corpus["num_validation_chars"]:,} were held out: the best
update was chosen by its loss on them, and the losses below are measured on them.
{began}
{notes}"""


def _quality(facts: Mapping[str, Any], has_curve: bool) -> str:
    losses, served = facts["losses"], facts["serving_precision"]
    rows = "\n".join(
        f"| {precision}{' (served)' if precision == served else ''} | {loss:.4f} |"
        for precision, loss in losses["validation_nats_per_char_by_precision"].items()
    )
    training = losses["training_nats_per_char"]
    in_training = (
        "The best weights are those that the run began with.\n"
        if training is None
        else f"Training loss at the best update, with dropout: {training:.4f} nats per character.\n"
    )
    curve = f"\n![Loss by epoch]({CURVE})\n" if has_curve else ""
    return f"""## Quality

| loss on the held-out text, with the state carried through each text | |
|---|---|
| nats per character | {losses["validation_nats_per_char"]:.4f} |
| bits per character | {losses["validation_bits_per_char"]:.4f} |

The same loss by the precision of the recurrent weights. The server uses the marked one:

| precision | nats per character |
|---|---|
{rows}

{in_training}{curve}"""


def _making(facts: Mapping[str, Any]) -> str:
    run, settings, versions = facts["run"], facts["settings"], facts["versions"]
    rows = "\n".join(f"| {key} | {value if value != '' else 'not given'} |" for key, value in settings.items())
    changes = "".join(
        f"| changed on the way | {change['setting']} became {change['value']:,} after update {change['step']:,} |\n"
        for change in run["changes"]
    )
    threads = settings["threads"]
    place = f"{plural(threads, 'thread')}" if run["device"] == "cpu" else f"a GPU ({run['device']})"
    return f"""## How it was made

    {facts["command"]}

| run | |
|---|---|
| updates | {run["num_updates"]:,} ({run["num_epochs"]:.1f} epochs) |
| best update | {run["best_update"]:,} |
| how it ended | {run["ended"]} |
{changes}| duration | {run["seconds"] / 60:.0f} minutes on {place} |
| speed, evaluations included | {run["chars_per_s"]:,.0f} characters/s |
| software | gru-serve {versions["gru-serve"]}, torch {versions["torch"]} |

| setting | value |
|---|---|
{rows}
"""


def _sample(sample: Mapping[str, Any]) -> str:
    text = "\n".join("    " + line for line in sample["text"].split("\n"))
    return f"""## Sample

Prompt {sample["prompt"]!r}, seed {sample["seed"]}, temperature {sample["temperature"]}:

{text}
"""


def loss_curve(curve: Sequence[Evaluation]) -> bytes | None:
    """Draw training and validation loss by epoch as a PNG. Return None if that is not possible.

    A version without a picture is better than none, so every failure counts: matplotlib may be missing, or find no fonts.
    """
    try:
        return _drawn(curve)
    except Exception:  # noqa: BLE001
        return None


def _drawn(curve: Sequence[Evaluation]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    epochs = [point.epoch for point in curve]
    marker = "o" if len(curve) == 1 else None
    axes.plot(
        epochs,
        [math.nan if point.training_loss is None else point.training_loss for point in curve],
        label="training, dropout on",
        marker=marker,
    )
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
