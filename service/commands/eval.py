"""`gru-serve eval`."""

from __future__ import annotations

import json
from pathlib import Path

import click

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
@model_store_option
@json_option
def eval_command(
    model: str, corpus: Path, last: float, unknown_chars: str, model_store: Path | None, as_json: bool
) -> None:
    """Measure how well a model predicts a text, in nats and bits a character.

    The state starts at zero and is carried through the whole text. The first character is read and not scored.

    Example: gru-serve eval shakespeare --corpus tinyshakespeare.txt --last 0.1
    """
    import torch

    from service.commands.progress import char_bar
    from service.model.folded import FoldedGRU
    from service.model.gru import GRUCharModel
    from service.training.corpus import read_corpus
    from service.training.evaluate import text_loss

    text = read_corpus(corpus)
    version, artifact = open_store(model_store).load(model)
    part = text.text if last == 1 else text.split(last)[1]
    ids = artifact.charset.encode(part, unknown_chars)
    torch.set_num_threads(1)  # one text, one step after the other: a second core only waits for the first
    network = FoldedGRU(GRUCharModel.from_tensors(artifact.config, artifact.tensors))
    with char_bar(max(0, len(ids) - 1), description=version.ref) as bar:
        loss = text_loss(network, ids, bar.update)
    if as_json:
        facts = {"model": version.ref, "corpus": text.name, "nats_per_char": loss.nats_per_char}
        facts |= {"bits_per_char": loss.bits_per_char, "num_chars": loss.num_chars, "num_scored": loss.num_scored}
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"{version.ref} on {text.name}: {loss.nats_per_char:.4f} nats/char, {loss.bits_per_char:.4f} bits/char, "
            f"{loss.num_chars:,} characters"
        )
