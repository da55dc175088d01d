"""Options that several commands share, options generated from a pydantic model, and the store that they name."""

from __future__ import annotations

import json
import math
import os
import platform
import stat
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click
from pydantic import BaseModel, SecretStr

from service.errors import plural


class FiniteRange(click.FloatRange):
    """A range of finite numbers. click's own FloatRange also accepts nan, because no comparison with nan fails."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class PathOption(click.Path):
    """A path that is not empty. An empty one means the current folder to pathlib, and to a user an unset variable."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty, perhaps because a variable is not set; '.' is the current folder", param, ctx)
        return super().convert(value, param, ctx)


class ChatTemplateType(click.ParamType[Any]):
    """A chat template: the name of a preset, or the path of a file. The command gets a `ChatTemplate`."""

    name = "template"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from service.errors import InvalidArtifact
        from service.model.chat_template import find_template

        try:
            return find_template(value) if isinstance(value, str) else value
        except InvalidArtifact as error:
            self.fail(error.message, param, ctx)


Command = TypeVar("Command", bound=Callable[..., Any])

# How often a waiting thread of libgomp looks before it sleeps, which takes about 0.05 ms. On x86 it pauses between two
# looks, elsewhere it doesn't.
_SPINS = 2_000 if platform.machine() in ("x86_64", "AMD64", "i686") else 50_000
_BLOCKTIME_MS = 1  # the same for the OpenMP of LLVM and Intel, in milliseconds


def model_store_option(command: Command) -> Command:
    """Add the option `--model-store DIR`. The command gets None if it is not given."""
    return click.option(
        "--model-store",
        type=PathOption(),
        help="Directory of the model store.  [the setting GRU_SERVE_MODEL_STORE]",
    )(command)


def json_option(command: Command) -> Command:
    """Add the option `--json`, with which a command prints one JSON document on standard output."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def echo_json(document: object, indent: int | None = None) -> None:
    """Print a JSON document on standard output. A character is escaped only if the output can't have it."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding if sys.stdout is not None else "utf-8")
    except UnicodeEncodeError:  # the locale's encoding lacks a character, or a file's name is no text
        text = json.dumps(document, indent=indent)
    click.echo(text)


def field_options(model: type[BaseModel]) -> Callable[[Command], Command]:
    """Add an option for every field of a pydantic model, with the field's description and default as its help.

    The command gets None for an option that is not given. Secrets get no option, because every user of a machine can
    read the command lines of all processes.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            if field.annotation is SecretStr:
                command = _refused_option(name)(command)
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
        type=PathOption(),
        help="Text in UTF-8: a file, a folder, a pattern such as 'poems/*.txt' in quotes, or - for standard input. May "
        "be given several times; each file is a document of its own.",
    )(command)


def _refused_option(name: str) -> Callable[[Command], Command]:
    """Add an option, which no help shows, that is refused with the name of the variable to set instead."""

    def refuse(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            variable = f"GRU_SERVE_{name.upper()}"
            raise click.UsageError(f"every user of a machine can read its command lines: set {variable} instead", ctx)

    words = f"--{name.replace('_', '-')}"
    return click.option(words, hidden=True, expose_value=False, callback=refuse)


def limit_spinning() -> None:
    """Let the threads of OpenMP spin only briefly while they wait for each other, then sleep, unless the user chose.

    It has an effect before torch is imported. A thread that spins takes a core from the thread that it waits for, if
    another process needs one of the cores too. A thread that sleeps at once is late for the next operation, which
    follows within microseconds.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)
        os.environ["KMP_BLOCKTIME"] = str(_BLOCKTIME_MS)


def open_store(model_store: Path | None, *, create: bool = False) -> Any:
    """Open the model store in the directory of the option, or else of the setting GRU_SERVE_MODEL_STORE.

    If neither is given and the current directory has no store, this opens the shipped models, which can't be changed.
    It says on standard error which store is used if nobody named it.

    Args:
        model_store: The option's value.
        create: Allows a store that is only about to be created, and never opens the shipped models.

    Raises StoreError if the directory does not exist, can't be read, or is a folder inside a model store.
    """
    from service.errors import StoreError
    from service.model.manifest import describe_os_error
    from service.settings import read_settings
    from service.store.model_store import ModelStore

    settings = read_settings()
    root = model_store if model_store is not None else settings.model_store
    if model_store is None and settings.uses_shipped_models:
        if not create:
            root = settings.store_root
            click.echo(
                f"using the shipped models in {root}, because there is no ./{settings.model_store} here", err=True
            )
            return ModelStore(root, default=settings.model.partition("@")[0], read_only=True)
        click.echo(
            f"{root.absolute()} will be the model store of this folder, once a version is published in it", err=True
        )
    try:
        is_there = stat.S_ISDIR(os.stat(root).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_there = False
    except OSError as error:
        raise StoreError(describe_os_error(root, error)) from error
    store = ModelStore(root, default=settings.model.partition("@")[0])
    if not is_there:
        store.names()  # raises if something else has this name, such as a file or a link to nothing
        if not create:
            raise StoreError(f"there is no model store at {root}: give --model-store or set GRU_SERVE_MODEL_STORE")
    elif around := store.around():
        raise StoreError(f"{root} is inside a model store: name {around}")
    return store


@contextmanager
def suggesting_models() -> Iterator[None]:
    """Add to an error about the default model which one to name instead, for a command that has the option --model."""
    from service.errors import ModelNotFound

    try:
        yield
    except ModelNotFound as error:
        if error.others is None:
            raise
        if not error.others:
            advice = "Name another store with --model-store, or train a model with gru-serve train"
        elif len(error.others) == 1:
            advice = f"Choose --model {error.others[0]}, or set GRU_SERVE_MODEL"
        else:
            advice = "Choose one with --model, or set GRU_SERVE_MODEL"
        raise ModelNotFound(f"{error.message}. {advice}") from None


def open_service(model_store: Path | None, model: str | None, num_threads: int | None) -> Any:
    """Open the service for one model, without sessions of a server. Use it as a context manager.

    Args:
        model_store: See open_store.
        model: Name of the model, or None for the setting GRU_SERVE_MODEL.
        num_threads: Engine threads, or None for the setting GRU_SERVE_ENGINE_THREADS.
    """
    from service.assembly import Service
    from service.settings import read_settings

    store = open_store(model_store)
    own = {"model_store": store.root, "model": model, "engine_threads": num_threads}
    with suggesting_models():
        store.resolve(model or read_settings().model)  # first: its errors list the default model first
        return Service.open(read_settings(**own, session_store="memory://", model_poll_s=0.0))


def read_text(file: BinaryIO, option: str, max_chars: int | None = None) -> str:
    """Return the text of a file in UTF-8. Raises UsageError if it is no text, or too long.

    Args:
        file: It is read up to the limit.
        option: Names the file.
        max_chars: The limit; None for the setting GRU_SERVE_MAX_PROMPT_CHARS.
    """
    from service.settings import read_settings

    limit = read_settings().max_prompt_chars if max_chars is None else max_chars
    data = file.read(4 * limit + 4)  # a character has up to four bytes, and a byte order mark three
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) < 4 * limit + 4:
            raise click.UsageError(
                f"{option}: not UTF-8 at byte {error.start}: convert the file, for example with "
                "iconv -f WINDOWS-1252 -t UTF-8"
            ) from None
        text = data.decode(errors="replace")
    if len(text) > limit:
        fault = (
            f"more than {plural(limit, 'character', ',')}: set GRU_SERVE_MAX_PROMPT_CHARS"
            if max_chars is None
            else f"at most {plural(limit, 'character', ',')} are supported"
        )
        raise click.UsageError(f"{option}: {fault}")
    return text


def refuse_one_source(first: tuple[str, BinaryIO | None], second: tuple[str, BinaryIO | None]) -> None:
    """Raise UsageError if two options, each with its file, read standard input: the second would find it empty."""
    if first[1] is not None and first[1] is second[1]:  # click opens it once
        raise click.UsageError(f"{first[0]} and {second[0]} can't both be -: give one of them a file")


def _click_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return {int: int, float: float, Path: PathOption()}.get(annotation, str)
