"""`gru-serve generate`."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args, get_type_hints

import click
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from service.commands.options import (
    Command,
    FiniteRange,
    echo_json,
    json_option,
    model_store_option,
    open_service,
    read_text,
    refuse_one_source,
)
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.errors import InvalidValue, plural
from service.model.charset import UnknownChars
from service.settings import read_settings

if TYPE_CHECKING:
    from service.engine.automaton.form import Form
    from service.generation.completion import Choice, CompletionRequest
    from service.registry.loaded_models import LoadedModel

_UNKNOWN_HELP = "What happens to characters of prompt and stop strings that the model does not know.  [error]"
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}  # in stop strings
_GROUP = 64  # texts that are generated side by side


def _sampling_options(command: Command) -> Command:
    """Add an option for each number of SamplingSettings, with the limits and the help that are declared there."""
    declared = get_type_hints(SamplingSettings, include_extras=True)
    for name in reversed(NUMBERS):
        kind, field = get_args(declared[name])
        default = getattr(PLAIN, name)
        option = click.option(
            f"--{name.replace('_', '-')}",
            type=_range(kind, field),
            default=default,
            help=f"{field.description[0].upper()}{field.description[1:]}.  [{default}]",
        )
        command = option(command)
    return command


def _range(kind: type, field: FieldInfo) -> click.IntRange | FiniteRange:
    """The limits of a pydantic field as a type of click."""
    limits = {type(limit): limit for limit in field.metadata}
    least, above, most = limits.get(Ge), limits.get(Gt), limits.get(Le)
    low = above.gt if above is not None else least.ge if least is not None else None
    high = most.le if most is not None else None
    return (click.IntRange if kind is int else FiniteRange)(low, high, min_open=above is not None)


def _stop_strings(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_unescaped(value, ctx, param) for value in values)


def _unescaped(value: str, ctx: click.Context, param: click.Parameter) -> str:
    """Return a stop string with the characters that its escapes stand for."""

    def char(escape: re.Match[str]) -> str:
        if escape[0] not in _ESCAPES:
            known = ", ".join(_ESCAPES)
            raise click.BadParameter(f"'{escape[0]}' is none of {known}: write \\\\ for a backslash", ctx, param)
        return _ESCAPES[escape[0]]

    if not value:
        raise click.BadParameter("a stop string must not be empty", ctx, param)
    return re.sub(r"\\.?", char, value, flags=re.DOTALL)


@click.command("generate")
@click.option(
    "--prompt",
    help="The text to continue, as it is. An empty one ('') begins a text of the model's own: after training with "
    "--lines, and with --stop '\\n', that is one line.",
)
@click.option(
    "--prompt-file",
    type=click.File("rb"),
    help="File with the text to continue, in UTF-8, all of it; -: standard input.",
)
@click.option("--model", default=None, help="Model as name, name@version or name@alias.  [the setting GRU_SERVE_MODEL]")
@click.option(
    "--max-tokens", type=click.IntRange(1, 10_000_000), default=500, help="Characters to generate at most.  [500]"
)
@click.option(
    "-n",
    "num_texts",
    type=click.IntRange(1, 1_000_000),
    default=None,
    help="Texts to generate, each with a seed of its own, which is printed before it. They are separated by these "
    "lines; if a newline ends each text, the lines are written to standard error. With --json, print a list.  [1]",
)
@_sampling_options
@click.option(
    "--stop",
    multiple=True,
    callback=_stop_strings,
    help=r"A string that ends the text and is not part of it; may be given several times. \n, \t and \r in it are a "
    r"newline, a tab and a carriage return, and \\ is a backslash.",
)
@click.option("--regex", help="A pattern that the whole generated text matches, as re.fullmatch of Python means it.")
@click.option(
    "--choice",
    "choices",
    multiple=True,
    help="A text that may be generated; given several times, the generated text is one of these.",
)
@click.option(
    "--json-schema",
    type=click.File("rb"),
    help="File with a JSON schema, in UTF-8: the generated text is JSON that fits it; -: standard input.",
)
@click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**63 - 1),
    default=None,
    help="The same seed gives the same text.  [a random one]",
)
@click.option("--unknown-chars", type=click.Choice(get_args(UnknownChars)), default="error", help=_UNKNOWN_HELP)
@model_store_option
@json_option
def generate_command(
    prompt: str | None,
    prompt_file: BinaryIO | None,
    model: str | None,
    max_tokens: int,
    num_texts: int | None,
    stop: tuple[str, ...],
    regex: str | None,
    choices: tuple[str, ...],
    json_schema: BinaryIO | None,
    seed: int | None,
    unknown_chars: UnknownChars,
    model_store: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a text without a server, printing it as it is generated. The texts are those that POST /v1/completions
    returns for the same settings and n.

    Example: gru-serve generate --prompt ROMEO: --max-tokens 200 --seed 7
    """
    from service.generation.completion import CompletionRequest
    from service.generation.reader import written_stops

    refuse_one_source(("--prompt-file", prompt_file), ("--json-schema", json_schema))
    prompt = _prompt(prompt, prompt_file)
    form, option = _form(regex, choices, json_schema)
    number, is_random = num_texts or 1, seed is None
    # One thread for one text: a second core would mostly wait for the first.
    with open_service(model_store, model, num_threads=None if number > 1 else 1) as service:
        loaded = service.models.get(service.default_model)
        request = CompletionRequest(
            (loaded.charset.encode(prompt, unknown_chars),),
            max_tokens,
            secrets.randbits(53) if seed is None else seed,
            SamplingSettings(**sampling),
            written_stops(loaded.charset, stop, unknown_chars),
            form=form,
        )
        if form is not None:
            _check_form(loaded, form, option, max_tokens)
        texts = _texts(loaded, request, number)
        if as_json:
            facts = [_facts(loaded, text) for text in texts]
            echo_json(facts[0] if num_texts is None else facts)
        else:
            _echo(texts, has_headings=number > 1 or is_random, is_separated=number > 1 and "\n" not in request.stop)


def _prompt(prompt: str | None, prompt_file: BinaryIO | None) -> str:
    """Return the text to continue. Raises UsageError unless one of the options gives it."""
    if prompt is not None and prompt_file is None:
        return prompt
    if prompt is None and prompt_file is not None:
        return read_text(prompt_file, "--prompt-file")
    what = "give the text to continue" if prompt is None else "give one text to continue, not two:"
    raise click.UsageError(f"{what} with --prompt or --prompt-file; --prompt '' begins a new text")


def _form(regex: str | None, choices: tuple[str, ...], json_schema: BinaryIO | None) -> tuple[Form | None, str]:
    """Return the form that the options name, and the option. Raises UsageError if they name several."""
    from service.engine.automaton.form import Form
    from service.engine.automaton.json_schema import MAX_SCHEMA

    forms: list[tuple[Form, str]] = []
    if regex is not None:
        forms.append((Form("regex", regex), "--regex"))
    if choices:
        forms.append((Form("choice", json.dumps(choices, ensure_ascii=False)), "--choice"))
    if json_schema is not None:
        forms.append((Form("json", read_text(json_schema, "--json-schema", MAX_SCHEMA)), "--json-schema"))
    if len(forms) > 1:
        raise click.UsageError(f"the text can't have two forms: give {forms[0][1]} or {forms[1][1]}")
    return forms[0] if forms else (None, "")


def _check_form(model: LoadedModel, form: Form, option: str, max_tokens: int) -> None:
    """Raise an error that names the option if no text of the form can be generated."""
    from service.engine.automaton.compiler import compile_form

    try:
        fewest = compile_form(form, model.charset.characters).fewest[0]
    except InvalidValue as error:
        raise click.ClickException(f"{option}: {error.message}") from error
    if fewest > max_tokens:
        raise click.ClickException(
            f"{option}: a text of this form has at least {plural(int(fewest), 'character', ',')}: raise --max-tokens"
        )


@dataclass(frozen=True)
class _Text:
    """A text that is generated."""

    seed: int
    pieces: Iterable[str]
    choice: Choice  # has a finish reason after the last piece


def _texts(model: LoadedModel, request: CompletionRequest, number: int) -> Iterator[_Text]:
    """Yield texts with the seeds of a completion's choices, in their order: a single one while it is generated."""
    from service.engine.sampling import choice_seed
    from service.generation.completion import Completion

    limits = read_settings()
    group = min(_GROUP, limits.max_batch + limits.max_queue)
    for first in range(0, number, group):
        size = min(group, number - first)
        completion = Completion(model, replace(request, n=size, best_of=size, first_choice=first))
        seeds = [choice_seed(request.seed, first + index) for index in range(size)]
        if number == 1:
            pieces: Iterator[str] = (item[1].text for item in completion.chunks(0.0, 1.0) if item is not None)
            yield _Text(seeds[0], pieces, completion.choices[0])
            return
        texts = {item[0].index: item[1].text for item in completion.wholes(1.0) if item is not None}
        for index, choice in enumerate(completion.choices):
            yield _Text(seeds[index], [texts[index]], choice)


def _facts(model: LoadedModel, text: _Text) -> dict[str, Any]:
    """Return a text, when it is over, and what is said of it with --json."""
    written = "".join(text.pieces)
    return {
        "model": model.version.ref,
        "seed": text.seed,
        "text": written,
        "finish_reason": text.choice.finish_reason,
    }


def _echo(texts: Iterable[_Text], *, has_headings: bool, is_separated: bool) -> None:
    """Print texts while they are generated, each after a line with its seed.

    is_separated: these lines are between the texts, and not on standard error.
    """
    for text in texts:
        if has_headings:
            click.echo(f"--- seed {text.seed} ---", err=not is_separated)
        for piece in text.pieces:
            click.echo(piece, nl=False)
        click.echo()
