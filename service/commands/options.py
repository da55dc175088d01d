"""Options that several commands share, and options made from a pydantic model's fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

Command = TypeVar("Command", bound=Callable[..., Any])


def model_store_option(command: Command) -> Command:
    """`--model-store DIR`; None means the setting's value."""
    return click.option(
        "--model-store", type=click.Path(path_type=Path), help="Directory of the model store  [./model_store]"
    )(command)


def json_option(command: Command) -> Command:
    """`--json`: one JSON document on standard output."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def field_options(model: type[BaseModel]) -> Callable[[Command], Command]:
    """An option for every field of a model, with the field's description and default. Not given: None."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            default = f"  [{field.default}]"
            option = click.option(
                f"--{name.replace('_', '-')}",
                name,
                type=_click_type(field.annotation),
                default=None,
                help=(field.description or name) + default,
            )
            command = option(command)
        return command

    return decorate


def open_store(model_store: Path | None) -> Any:
    """The model store at the option's place, or at the setting's."""
    from service.config import read_settings
    from service.store import ModelStore

    return ModelStore(model_store if model_store is not None else read_settings().model_store)


def _click_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return {int: int, float: float, Path: click.Path(path_type=Path)}.get(annotation, str)
