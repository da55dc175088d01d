"""`gru-serve export`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Any

import click

from service.commands.options import PathOption, model_store_option, open_store
from service.commands.progress import say, tell

_SUFFIXES = {"torch": ".pt", "onnx": ".onnx", "keras": ".keras"}


@click.command("export")
@click.argument("model")
@click.option(
    "--format", "form", type=click.Choice(list(_SUFFIXES)), required=True, help="The library that reads the file."
)
@click.option(
    "--output", type=PathOption(), help="File to write; it must not exist.  [NAME-VERSION with the format's ending]"
)
@model_store_option
def export_command(model: str, form: str, output: Path | None, model_store: Path | None) -> None:
    """Write a model as a file of PyTorch, ONNX or Keras, whose functions compute the same.

    The file has the float32 weights and the charset. Importing it gives the same digest.

    Example: gru-serve export shakespeare --format onnx
    """
    store = open_store(model_store)
    version = store.resolve(model)
    path = output if output is not None else Path(f"{version.name}-{version.number}{_SUFFIXES[form]}")
    if os.path.lexists(path):
        raise click.UsageError(f"{path} exists already: remove it, or name another file with --output")
    _, artifact = store.load(version.ref)
    try:
        # A file of the name appears whole or not at all.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}-", delete=False) as file:
            try:
                _write(file, form, artifact)
                file.close()
                os.chmod(file.name, 0o666 & ~_umask())
                os.link(file.name, path)  # unlike a renaming, it replaces no file that was made meanwhile
            finally:
                os.unlink(file.name)
    except OSError as error:
        raise click.ClickException(f"can't write {path}: {error.strerror or error}") from error
    tell(str(path))
    say(f"{version.ref}, digest {artifact.digest}, for {form}")


def _write(file: IO[bytes], form: str, artifact: Any) -> None:
    if form == "torch":
        from service.exporting.torch_format import write_torch

        write_torch(file, artifact.config, artifact.tensors)
    elif form == "onnx":
        from service.exporting.onnx_format import write_onnx

        write_onnx(file, artifact.config, artifact.tensors)
    else:
        from service.exporting.keras_format import write_keras

        write_keras(file, artifact.config, artifact.tensors)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
