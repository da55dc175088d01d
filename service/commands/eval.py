"""`gru-serve eval`, and what `gru-serve train` also needs to measure a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from service.commands.options import (
    FiniteRange,
    corpus_option,
    echo_json,
    json_option,
    limit_spinning,
    model_store_option,
    open_store,
)
from service.commands.progress import Progress
from service.errors import InvalidCorpus, MissingLibrary, plural
from service.installation import how_to_get_torch
from service.model.charset import UnknownChars
from service.model.quantize import Precision

if TYPE_CHECKING:
    from service.model.artifact import Artifact
    from service.model.encoded_text import EncodedText
    from service.training.hyperparameters import Hyperparameters
    from service.training.sources import Sources


@click.command("eval")
@click.argument("model")
@corpus_option
@click.option(
    "--last",
    type=FiniteRange(0, 1, min_open=True),
    default=1.0,
    help="Measure only this last fraction of the text.  [1]",
)
@click.option(
    "--held-out",
    is_flag=True,
    help="Measure what training held out of this corpus, read as training read it.",
)
@click.option("--lines", is_flag=True, help="Each line is a text of its own; empty lines are left out.")
@click.option("--keep-newlines", is_flag=True, help="Leave line ends of CR LF and CR as they are.")
@click.option(
    "--unknown-chars",
    type=click.Choice(get_args(UnknownChars)),
    default=None,
    help="What happens to characters that the model does not know.  [error]",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="float32",
    help="float32 is the reference; with int8 and int4 the model computes exactly as the server does.  [float32]",
)
@click.option(
    "--beginnings",
    type=click.IntRange(1, 10_000),
    help="Measure only the characters after the zero state, at this many places spread evenly over the text.",
)
@click.option(
    "--beginning-chars",
    type=click.IntRange(1, 1_000),
    help="Characters that --beginnings scores at each place, after a first one that is only read.  [100]",
)
@model_store_option
@json_option
def eval_command(
    model: str,
    corpus: tuple[Path, ...],
    last: float,
    held_out: bool,
    lines: bool,
    keep_newlines: bool,
    unknown_chars: UnknownChars | None,
    precision: str,
    beginnings: int | None,
    beginning_chars: int | None,
    model_store: Path | None,
    as_json: bool,
) -> None:
    """Measure how well a model predicts a text, in nats and bits a character.

    The state starts at zero in each document, or with --lines in each line, and is carried through all of it. The very
    first character is read but not scored. With --beginnings the state starts at zero at each of that many places: so
    well does the model continue a short prompt.

    Example: gru-serve eval shakespeare --corpus tinyshakespeare.txt --last 0.1
    """
    if held_out and (last != 1 or lines or keep_newlines or unknown_chars is not None):
        raise click.UsageError("--held-out reads the text as training did: it takes no other option about the text")
    if beginning_chars is not None and beginnings is None:
        raise click.UsageError("--beginning-chars says how much --beginnings measures: give both")
    if beginnings and lines:
        raise click.UsageError("with --lines each line starts at the zero state anyway: leave --beginnings out")
    limit_spinning()
    if precision == "float32":
        require_torch()

    from service.training.corpus import TextLoss
    from service.training.hyperparameters import Hyperparameters
    from service.training.sources import find_sources

    sources = find_sources(corpus)
    version, artifact = open_store(model_store).load(model)
    settings = Hyperparameters(lines=lines, keep_newlines=keep_newlines, unknown_chars=unknown_chars or "error")
    places = (beginnings, beginning_chars or 100) if beginnings else None
    text, name = _text(sources, version.ref, artifact, None if held_out else settings, last, places)
    with Progress(f"{version.ref} in {precision}", text.num_scored) as bar:
        nats = measure(artifact.config, artifact.tensors, precision, text, bar.update)
    loss = TextLoss(nats, len(text.ids), text.num_scored)
    facts = {"model": version.ref, "corpus": name, "precision": precision}
    facts |= {"nats_per_char": loss.nats_per_char, "bits_per_char": loss.bits_per_char}
    facts |= {"num_chars": loss.num_chars, "num_scored": loss.num_scored}
    if places:
        facts |= {"beginnings": len(text.starts), "beginning_chars": places[1]}
    (echo_json if as_json else _echo)(facts)


def _text(
    sources: Sources,
    ref: str,
    artifact: Artifact,
    settings: Hyperparameters | None,
    last: float,
    places: tuple[int, int] | None,
) -> tuple[EncodedText, str]:
    """Read the text to measure; return it, and the name of its corpus.

    Args:
        sources: where it is.
        ref: name of the model.
        artifact: the model.
        settings: how to read it; None: as training did, and only what it held out.
        last: the last fraction of the text that is measured.
        places: measure only the characters after the zero state: at how many places, and how many at each.
    """
    from service.training.corpus import beginnings_of, hold_out, last_part, read_text, require_two_chars

    reading = settings or _training_settings(ref, artifact)
    if places and reading.lines:
        raise click.UsageError(f"{ref} is a model of lines, which start at the zero state anyway")
    with Progress(f"reading {sources.name}", sources.num_bytes, "byte") as bar:
        whole = read_text(sources, reading, bar.update, charset=artifact.charset)
    if settings is not None:
        text = last_part(whole.text, last, lines=settings.lines)
    elif whole.sha256 == artifact.training.corpus.get("sha256"):
        text = hold_out(whole, reading).validation
    else:
        raise InvalidCorpus(f"{whole.name} is not the corpus that {ref} was trained on: its SHA-256 differs")
    if places:
        text = beginnings_of(text, *places)
    require_two_chars(text)
    for note in whole.notes:
        click.echo(f"{whole.name}: {note}", err=True)
    return text, whole.name


def _echo(facts: dict[str, Any]) -> None:
    """Print what was measured as a sentence."""
    what = plural(facts["num_chars"], "character", ",")
    if "beginnings" in facts:
        what = f"the first {facts['beginning_chars']:,} after the zero state at "
        what += plural(facts["beginnings"], "place", ",")
    click.echo(
        f"{facts['model']} on {facts['corpus']} in {facts['precision']}: {facts['nats_per_char']:.4f} nats/char, "
        f"{facts['bits_per_char']:.4f} bits/char, {what}"
    )


def _training_settings(ref: str, artifact: Artifact) -> Hyperparameters:
    """Return the settings with which a model's corpus was read; those that the model's version lacks are defaults."""
    from pydantic import ValidationError

    from service.training.hyperparameters import Hyperparameters

    names = ("lines", "keep_newlines", "unknown_chars", "min_count", "validation_fraction", "validation_chars")
    known = artifact.training.model_dump().get("settings")
    try:
        if not isinstance(known, dict):
            raise TypeError("no settings")
        return Hyperparameters(**{name: known[name] for name in names if name in known})
    except (TypeError, ValidationError) as error:
        raise InvalidCorpus(f"{ref} doesn't say how it was trained, so nothing is known to be held out") from error


def measure(config: Any, tensors: Any, precision: str, text: EncodedText, progress: Callable[[int], object]) -> float:
    """Return the loss of texts in nats a character, computed with these weights in one precision.

    Calls `progress` with the number of characters read since its last call.
    """
    if precision == "float32":
        import torch

        from service.model.folded import FoldedGRU
        from service.model.gru import GRUCharModel
        from service.training.evaluation import side_by_side_loss, text_loss

        model = GRUCharModel.from_tensors(config, tensors)
        if (loss := side_by_side_loss(model, text, progress)) is not None:
            return loss
        # One thread is enough: the steps of a single text depend on each other, so a second core would mostly wait.
        torch.set_num_threads(1)
        return text_loss(FoldedGRU(model), text, progress).nats_per_char

    from service.engine.kernels import choose_kernel
    from service.engine.stepper import mean_loss
    from service.model.quantize import IntegerPrecision
    from service.settings import read_settings

    kernel = choose_kernel(read_settings().kernel, num_threads=1)
    stepper, _ = kernel.load(config, tensors, cast(IntegerPrecision, precision))
    return mean_loss(stepper, text, progress)


def require_torch() -> None:
    """Raise MissingLibrary, whose message says how to install torch, if torch can't be imported."""
    try:
        import torch  # noqa: F401 - only checks that it can be imported
    except ImportError as error:
        raise MissingLibrary(f"this command needs torch, which is not installed: {how_to_get_torch()}") from error
