"""Options that several commands share, and options made from a pydantic model's fields."""

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
    """A range of numbers; click's own also takes nan, which lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


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
    """An option for every field of a model, with the field's description and default. Not given: None.

    Secrets have none: everybody on a machine sees the command lines of everybody's processes.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            if field.annotation is SecretStr:
                continue
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


def open_store(model_store: Path | None, *, make: bool = False) -> Any:
    """The model store at the option's place, or at the setting's. Raises StoreError if nothing is there."""
    from service.errors import StoreError
    from service.settings import read_settings
    from service.store.model_store import ModelStore

    root = model_store if model_store is not None else read_settings().model_store
    if not root.is_dir() and not make:
        raise StoreError(f"there is no model store at {root}: give --model-store or set GRU_SERVE_MODEL_STORE")
    return ModelStore(root)


def _click_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return {int: int, float: float, Path: click.Path(path_type=Path)}.get(annotation, str)
