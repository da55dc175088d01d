"""Options that several commands share, options generated from a pydantic model, and the store that they name."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, SecretStr


class FiniteRange(click.FloatRange):
    """A range of finite numbers. click's own FloatRange also accepts nan, because no comparison with nan fails."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


Command = TypeVar("Command", bound=Callable[..., Any])


def model_store_option(command: Command) -> Command:
    """Add the option `--model-store DIR`. The command gets None if it is not given."""
    return click.option(
        "--model-store",
        type=click.Path(path_type=Path),
        help="Directory of the model store.  [the setting GRU_SERVE_MODEL_STORE]",
    )(command)


def json_option(command: Command) -> Command:
    """Add the option `--json`, with which a command prints one JSON document on standard output."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def field_options(model: type[BaseModel]) -> Callable[[Command], Command]:
    """Add an option for every field of a pydantic model, with the field's description and default as its help.

    The command gets None for an option that is not given. Secrets get no option, because every user of a machine can
    read the command lines of all processes.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            if field.annotation is SecretStr:
                continue
            words, help_text = f"--{name.replace('_', '-')}", field.description or name
            if field.annotation is bool:
                option = click.option(words, name, is_flag=True, default=None, help=help_text)
            else:
                extra = field.json_schema_extra
                shown = extra.get("shown_default", field.default) if isinstance(extra, dict) else field.default
                help_text += f"  [{shown}]"
                option = click.option(words, name, type=_click_type(field.annotation), default=None, help=help_text)
            command = option(command)
        return command

    return decorate


def corpus_option(command: Command) -> Command:
    """Add the option `--corpus`, which may be given several times. The command gets a tuple of paths."""
    return click.option(
        "--corpus",
        required=True,
        multiple=True,
        type=click.Path(path_type=Path),
        help="Text in UTF-8: a file, a folder, a pattern such as 'poems/*.txt' in quotes, or - for standard input. May "
        "be given several times; each file is a document of its own.",
    )(command)


def open_store(model_store: Path | None, *, create: bool = False) -> Any:
    """Open the model store in the directory of the option, or else of the setting GRU_SERVE_MODEL_STORE.

    Raises StoreError if the directory does not exist, unless `create` allows a store that is only about to be created.
    """
    from service.errors import StoreError
    from service.settings import read_settings
    from service.store.model_store import ModelStore

    root = model_store if model_store is not None else read_settings().model_store
    if not root.is_dir() and not create:
        raise StoreError(f"there is no model store at {root}: give --model-store or set GRU_SERVE_MODEL_STORE")
    return ModelStore(root)


def open_service(model_store: Path | None, model: str | None, num_threads: int | None) -> Any:
    """Open the service for one model, without sessions of a server. Use it as a context manager.

    Args:
        model_store: See open_store.
        model: Name of the model, or None for the setting GRU_SERVE_MODEL.
        num_threads: Engine threads, or None for the setting GRU_SERVE_ENGINE_THREADS.
    """
    from service.assembly import Service
    from service.settings import read_settings

    own = {"model_store": open_store(model_store).root, "model": model, "engine_threads": num_threads}
    return Service.open(read_settings(**own, session_store="memory://", model_poll_s=0.0))


def _click_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return {int: int, float: float, Path: click.Path(path_type=Path)}.get(annotation, str)
