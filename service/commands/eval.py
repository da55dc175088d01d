"""`gru-serve eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from service.commands.libraries import require_torch
from service.commands.options import FiniteRange, json_option, model_store_option, open_store


@click.command("eval")
@click.argument("model")
@click.option("--corpus", required=True, type=click.Path(path_type=Path), help="UTF-8 text to predict.")
@click.option("--last", type=FiniteRange(0, 1, min_open=True), default=1.0, help="Only this last part of it.  [1]")
@click.option(
    "--unknown-chars",
    type=click.Choice(["error", "fold", "drop"]),
    default="error",
    help="What happens to characters that the model doesn't know.  [error]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8", "int4"]),
    default="float32",
    help="float32: the reference. int8, int4: exactly what is served.  [float32]",
)
@model_store_option
@json_option
def eval_command(
    model: str,
    corpus: Path,
    last: float,
    unknown_chars: str,
    precision: str,
    model_store: Path | None,
    as_json: bool,
) -> None:
    """Measure how well a model predicts a text, in nats and bits a character.

    The state starts at zero and is carried through the whole text. The first character is read and not scored.

    Example: gru-serve eval shakespeare --corpus tinyshakespeare.txt --last 0.1
    """
    if precision == "float32":
        require_torch()

    from service.commands.progress import char_bar
    from service.training.corpus import read_corpus
    from service.training.loss import TextLoss, require_two

    text = read_corpus(corpus)
    version, artifact = open_store(model_store).load(model)
    part = text.text if last == 1 else text.split(last)[1]
    ids = artifact.charset.encode(part, unknown_chars)
    require_two(ids)
    with char_bar(len(ids) - 1, description=f"{version.ref} in {precision}") as bar:
        loss = TextLoss(measure(artifact.config, artifact.tensors, precision, ids, bar.update), len(ids))
    if as_json:
        facts = {"model": version.ref, "corpus": text.name, "precision": precision}
        facts |= {"nats_per_char": loss.nats_per_char, "bits_per_char": loss.bits_per_char}
        click.echo(json.dumps(facts | {"num_chars": loss.num_chars, "num_scored": loss.num_scored}))
    else:
        click.echo(
            f"{version.ref} on {text.name} in {precision}: {loss.nats_per_char:.4f} nats/char, "
            f"{loss.bits_per_char:.4f} bits/char, {loss.num_chars:,} characters"
        )


def measure(config: Any, tensors: Any, precision: str, ids: Any, progress: Callable[[int], object]) -> float:
    """Nats a character of a text (n,) int64 under these weights in one precision."""
    # One thread: one text, one step after the other, so a second core only waits for the first.
    if precision == "float32":
        import torch

        from service.model.folded import FoldedGRU
        from service.model.gru import GRUCharModel
        from service.training.evaluate import text_loss

        torch.set_num_threads(1)
        return text_loss(FoldedGRU(GRUCharModel.from_tensors(config, tensors)), ids, progress).nats_per_char

    from service.engine.kernels import choose_kernel
    from service.engine.stepper import mean_loss
    from service.model.quantize import IntegerPrecision
    from service.settings import read_settings

    kernel = choose_kernel(read_settings().kernel, num_threads=1)
    stepper, _ = kernel.load(config, tensors, cast(IntegerPrecision, precision))
    return mean_loss(stepper, ids, progress)
