"""`gru-serve import`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.commands.eval import measure
from service.commands.options import PathOption, announcing_new_store, model_store_option, open_store
from service.commands.progress import Progress, say
from service.errors import plural

if TYPE_CHECKING:
    from service.importing.detection import Source
    from service.importing.foreign import ForeignModel, Tokens
    from service.importing.publication import MeasuredText
    from service.model.config import ModelConfig
    from service.training.corpus import WholeText
    from service.training.sources import Sources

_MAX_MEASURED = 100_000  # characters, the last ones of the text
_PROMPT = "It was "


@click.command("import")
@click.argument("file", type=PathOption())
@click.option("--name", required=True, help="Name of the model; a new version is published.")
@click.option(
    "--charset",
    metavar="FILE|TEXT",
    help="The characters in the order of the model's ids: a file with them, as text or JSON, or the "
    "characters themselves, "
    "or string.printable.  [the vocabulary in the file]",
)
@click.option(
    "--charset-from",
    metavar="CORPUS",
    type=PathOption(),
    help="Text that the model was trained on: its sorted distinct characters are the charset.",
)
@click.option(
    "--layers-from",
    metavar="NAMES",
    help="Names of the GRU layers, first to last, with commas between. Needed where the file doesn't say their order.",
)
@click.option(
    "--corpus",
    multiple=True,
    type=PathOption(),
    help=f"Text to measure the model with, in each precision; its last {_MAX_MEASURED:,} characters are "
    "read. May be given "
    "several times.  [nothing is measured]",
)
@model_store_option
def import_command(
    file: Path,
    name: str,
    charset: str | None,
    charset_from: Path | None,
    layers_from: str | None,
    corpus: tuple[Path, ...],
    model_store: Path | None,
) -> None:
    """Publish a model that Keras, TensorFlow, PyTorch or ONNX has written.

    FILE is a .weights.h5, .h5 or .keras file, a TensorFlow checkpoint or SavedModel, a .pt, .pth or .safetensors file,
    or an .onnx file. Nothing in it is executed.

    Example: gru-serve import tutorial.weights.h5 --name mine --charset-from shakespeare.txt
    """
    from service.importing.conversion import convert
    from service.importing.detection import read_foreign
    from service.importing.publication import publish_import

    if charset is not None and charset_from is not None:
        raise click.UsageError("give the characters once: with --charset or with --charset-from")
    store = open_store(model_store, create=True)
    store.versions(name)  # refuses an impossible name before anything is read
    sources = _sources(corpus)
    order = [part.strip() for part in layers_from.split(",") if part.strip()] if layers_from is not None else []
    model, source = read_foreign(file, order)
    tokens, notes = _tokens(model, charset, charset_from)
    config, tensors = convert(model, tokens)
    notes = _notes(model, notes)
    model = model.without_weights()  # publishing needs memory for two more copies
    text = _read(sources, config) if sources is not None else None
    with announcing_new_store(store, model_store):
        store.check_writable(name)
    _describe(model, source, config, notes)
    measured = _measure(config, tensors, text)
    options: dict[str, str | None] = {
        "--charset": charset,
        "--charset-from": charset_from.name if charset_from is not None else None,
        "--layers-from": layers_from,
    }
    version = publish_import(
        store, name, config, tensors, model=model, source=source, notes=notes, measured=measured,
        command=_command(source.name, name, options, corpus),
    )  # fmt: skip
    say(f"published {version.ref} in {version.path}")
    option = f" --model-store {shlex.quote(str(model_store))}" if model_store else ""
    prompt = _PROMPT if set(_PROMPT) <= set(config.charset) else ""
    say(f"next: gru-serve generate --model {name} --prompt {shlex.quote(prompt)}{option}")
    say(f"      gru-serve serve --model {name}{option}        # {version.ref} over HTTP")


def _command(file: str, name: str, options: Mapping[str, str | None], corpus: Sequence[Path]) -> str:
    """Return a command that repeats the import. Paths are without their folders, and a very long command is cut."""
    words = ["gru-serve", "import", file, "--name", name]
    for option, value in (*options.items(), *(("--corpus", path.name) for path in corpus)):
        words += [option, value] if value is not None else []
    return shlex.join(words)[:2000]


def _notes(model: ForeignModel, of_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return all notes about a model, with those about its characters."""
    notes = (*model.notes, *of_tokens)
    if len(model.layers) > 1:
        notes = (*notes, f"GRU layers, first to last: {', '.join(layer.name for layer in model.layers)}")
    return notes


def _describe(model: ForeignModel, source: Source, config: ModelConfig, notes: tuple[str, ...]) -> None:
    """Say what was read."""
    say(
        f"{source.name}: {model.kind}, {plural(config.num_parameters, 'parameter', ',')}, embedding "
        f"{config.embedding_dim}, GRU {config.num_units} units x {config.num_layers}, "
        f"{plural(config.vocab_size, 'character', ',')}"
    )
    for note in notes:
        say(f"{source.name}: {note}")


def _tokens(model: Any, charset: str | None, charset_from: Path | None) -> tuple[Tokens, tuple[str, ...]]:
    """Return a token for each row of the embedding, and notes. Raises UnsupportedModel, InvalidCharset."""
    from service.errors import UnsupportedModel
    from service.importing.vocabulary import advice, fit, tokens_of_corpus, tokens_of_option

    if charset is not None:
        return fit(tokens_of_option(charset, model.vocab_size), model.vocab_size, "--charset")
    if charset_from is not None:
        return fit(tokens_of_corpus(_read_characters(charset_from)), model.vocab_size, charset_from.name)
    if model.tokens is None:
        raise UnsupportedModel(f"the file doesn't say which characters its ids are: {advice(model.vocab_size)}")
    return fit(model.tokens, model.vocab_size, "the vocabulary in the file")


def _read_characters(path: Path) -> str:
    """Return the distinct characters of a text, as they are. Raises InvalidCorpus."""
    from service.errors import InvalidCorpus

    found: set[str] = set()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    except OSError as error:
        raise InvalidCorpus(f"can't read {path}: {error.strerror}", param="charset_from") from error
    except UnicodeDecodeError as error:
        raise InvalidCorpus(f"{path} is not UTF-8: convert it", param="charset_from") from error
    return "".join(found)


def _sources(corpus: tuple[Path, ...]) -> Sources | None:
    """Find the text to measure with; return None if there is none. Raises what would end a measurement later."""
    if not corpus:
        return None
    from service.engine.kernels import check_kernel
    from service.settings import read_settings
    from service.training.sources import find_sources

    check_kernel(read_settings().kernel)
    return find_sources(corpus)


def _read(sources: Sources, config: ModelConfig) -> WholeText:
    """Read a text, as much as is measured. Raises InvalidCorpus."""
    from service.model.charset import Charset
    from service.training.corpus import last_part, read_text, require_two_chars
    from service.training.hyperparameters import Hyperparameters

    whole = read_text(sources, Hyperparameters(unknown_chars="fold"), charset=Charset(config.charset))
    if len(whole.text.ids) > _MAX_MEASURED:
        whole = replace(whole, text=last_part(whole.text, _MAX_MEASURED / len(whole.text.ids), lines=False))
    require_two_chars(whole.text)
    return whole


def _measure(config: ModelConfig, tensors: Any, whole: WholeText | None) -> MeasuredText | None:
    """Measure the weights in each precision. Returns None, and says so, if there is no text."""
    from service.importing.float_loss import float_loss
    from service.importing.publication import PRECISIONS, MeasuredText

    if whole is None:
        say("nothing was measured: with --corpus FILE the import measures the model and chooses its precision")
        return None
    text = whole.text
    losses: dict[Any, float] = {}
    for precision in PRECISIONS:
        with Progress(f"measuring {precision}", text.num_scored) as bar:
            update: Callable[[int], object] = bar.update
            if precision == "float32":
                losses[precision] = float_loss(config, tensors, text, update)
            else:
                losses[precision] = measure(config, tensors, precision, text, update)
    say(", ".join(f"{precision} {loss:.4f}" for precision, loss in losses.items()) + " nats/char")
    return MeasuredText(whole.name, whole.sha256, text.num_scored, losses)
