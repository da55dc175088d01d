"""`gru-serve eval`, and what `gru-serve train` also needs to measure a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from service.commands.options import FiniteRange, json_option, model_store_option, open_store
from service.errors import MissingLibrary
from service.model.charset import UnknownChars
from service.model.quantize import Precision

if TYPE_CHECKING:
    from tqdm import tqdm


@click.command("eval")
@click.argument("model")
@click.option("--corpus", required=True, type=click.Path(path_type=Path), help="File with the text, in UTF-8.")
@click.option(
    "--last",
    type=FiniteRange(0, 1, min_open=True),
    default=1.0,
    help="Measure only this last fraction of the text.  [1]",
)
@click.option(
    "--unknown-chars",
    type=click.Choice(get_args(UnknownChars)),
    default="error",
    help="What happens to characters that the model does not know.  [error]",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="float32",
    help="float32 is the reference; with int8 and int4 the model computes exactly as the server does.  [float32]",
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

    The state starts at zero and is carried through the whole text. The first character is read but not scored.

    Example: gru-serve eval shakespeare --corpus tinyshakespeare.txt --last 0.1
    """
    if precision == "float32":
        require_torch()

    from service.training.corpus import TextLoss, read_corpus, require_two_chars

    text = read_corpus(corpus)
    version, artifact = open_store(model_store).load(model)
    part = text.text if last == 1 else text.split(last)[1]
    ids = artifact.charset.encode(part, unknown_chars)
    require_two_chars(ids)
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
    """Return the loss of a text (n,) int64 in nats a character, computed with these weights in one precision.

    Calls `progress` with the number of characters read since its last call.
    """
    # One thread is enough: the steps of a single text depend on each other, so a second core would mostly wait.
    if precision == "float32":
        import torch

        from service.model.folded import FoldedGRU
        from service.model.gru import GRUCharModel
        from service.training.evaluation import text_loss

        torch.set_num_threads(1)
        return text_loss(FoldedGRU(GRUCharModel.from_tensors(config, tensors)), ids, progress).nats_per_char

    from service.engine.kernels import choose_kernel
    from service.engine.stepper import mean_loss
    from service.model.quantize import IntegerPrecision
    from service.settings import read_settings

    kernel = choose_kernel(read_settings().kernel, num_threads=1)
    stepper, _ = kernel.load(config, tensors, cast(IntegerPrecision, precision))
    return mean_loss(stepper, ids, progress)


def char_bar(total: int, initial: int = 0, description: str | None = None) -> tqdm[Any]:
    """Return a progress bar on standard error that counts characters, characters a second and the time left."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # tqdm's monitor thread would outlive the bar
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="char",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds; a log file gets few lines
    )


def require_torch() -> None:
    """Raise MissingLibrary, whose message says how to install torch, if torch can't be imported."""
    try:
        import torch  # noqa: F401 - only checks that it can be imported
    except ImportError as error:
        raise MissingLibrary(
            "this command needs torch, which is not installed: run pip install 'gru-serve[train]', or build the "
            "image with --build-arg WITH_TORCH=1"
        ) from error
