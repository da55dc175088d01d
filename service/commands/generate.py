"""`gru-serve generate`."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import click
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from service.commands.options import Command, FiniteRange, json_option, model_store_option, open_service
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.model.charset import UnknownChars

_UNKNOWN_HELP = "What happens to characters of the prompt that the model does not know.  [error]"


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


@click.command("generate")
@click.option("--prompt", required=True, help="The text to continue; may be empty.")
@click.option("--model", default=None, help="Model as name, name@version or name@alias.  [the setting GRU_SERVE_MODEL]")
@click.option("--max-tokens", type=click.IntRange(1), default=500, help="Characters to generate at most.  [500]")
@_sampling_options
@click.option("--stop", multiple=True, help="A string that ends the text; may be given several times.")
@click.option("--seed", type=int, default=None, help="The same seed gives the same text.  [a random one]")
@click.option("--unknown-chars", type=click.Choice(get_args(UnknownChars)), default="error", help=_UNKNOWN_HELP)
@model_store_option
@json_option
def generate_command(
    prompt: str,
    model: str | None,
    max_tokens: int,
    stop: tuple[str, ...],
    seed: int | None,
    unknown_chars: str,
    model_store: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a text without a server, printing it as it is generated. The text is the one that POST /v1/completions
    returns for the same settings.

    Example: gru-serve generate --prompt ROMEO: --max-tokens 200 --seed 7
    """
    from service.generation.completion import Completion, CompletionRequest

    if "" in stop:
        raise click.BadParameter("a stop string must not be empty", param_hint="--stop")
    seed = secrets.randbits(63) if seed is None else seed
    # One thread, because there is one text: a second core would mostly wait for the first.
    with open_service(model_store, model, num_threads=1) as service:
        loaded = service.models.get(service.default_model)
        ids = loaded.charset.encode(prompt, cast(UnknownChars, unknown_chars))
        completion = Completion(loaded, CompletionRequest((ids,), max_tokens, seed, SamplingSettings(**sampling), stop))
        pieces = (item[1].text for item in completion.chunks(0.0, 1.0) if item is not None)
        if as_json:
            text = "".join(pieces)
            facts = {"model": loaded.version.ref, "seed": seed, "text": text}
            click.echo(json.dumps(facts | {"finish_reason": completion.choices[0].finish_reason}))
            return
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
