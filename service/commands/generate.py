"""`gru-serve generate`."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import cast

import click

from service.commands.options import FiniteRange, json_option, model_store_option, open_store


@click.command("generate")
@click.option("--prompt", required=True, help="The text to continue; may be empty.")
@click.option("--model", default=None, help="name, name@version or name@alias.  [the setting GRU_SERVE_MODEL]")
@click.option("--max-tokens", type=click.IntRange(1), default=500, help="Characters to generate at most.  [500]")
@click.option("--temperature", type=FiniteRange(0, 100), default=1.0, help="0 takes the likeliest.  [1.0]")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Draw from the k likeliest; 0: from all.  [0]")
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=1.0, help="Draw from this mass.  [1.0]")
@click.option(
    "--min-p", type=FiniteRange(0, 1), default=0.0, help="Leave out what is less likely than this x top.  [0]"
)
@click.option("--repetition-penalty", type=FiniteRange(0.01, 100), default=1.0, help="  [1.0]")
@click.option("--presence-penalty", type=FiniteRange(-2, 2), default=0.0, help="  [0]")
@click.option("--frequency-penalty", type=FiniteRange(-2, 2), default=0.0, help="  [0]")
@click.option("--stop", multiple=True, help="A string that ends the text; may be given several times.")
@click.option("--seed", type=int, default=None, help="Same seed, same text.  [another each time]")
@click.option("--unknown-chars", type=click.Choice(["error", "fold", "drop"]), default="error", help="  [error]")
@model_store_option
@json_option
def generate_command(
    prompt: str,
    model: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    unknown_chars: str,
    model_store: Path | None,
    as_json: bool,
) -> None:
    """Continue a text here, without a server, printing as it goes. The same as POST /v1/completions answers.

    Example: gru-serve generate --prompt ROMEO: --max-tokens 200 --seed 7
    """
    from service.engine.kernels import choose_kernel
    from service.generation.completion import Completion, CompletionRequest, SamplingSettings
    from service.model.charset import UnknownChars
    from service.registry.loaded_models import EngineSettings, LoadedModel
    from service.settings import read_settings

    if "" in stop:
        raise click.BadParameter("a stop string can't be empty", param_hint="--stop")
    settings = read_settings()
    kernel = choose_kernel(settings.kernel, num_threads=1)  # one text: a second core would mostly wait for the first
    version, artifact = open_store(model_store).load(model if model is not None else settings.model)
    loaded = LoadedModel(version, artifact, EngineSettings(kernel, settings.integer_precision))
    seed = secrets.randbits(63) if seed is None else seed
    sampling = SamplingSettings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    ids = loaded.charset.encode(prompt, cast(UnknownChars, unknown_chars))
    completion = Completion(loaded, CompletionRequest((ids,), max_tokens, seed, sampling, stop))
    try:
        pieces = (item[1].text for item in completion.pieces(0.0, 1.0) if item is not None)
        if as_json:
            text = "".join(pieces)
            facts = {"model": loaded.version.ref, "seed": seed, "text": text}
            click.echo(json.dumps(facts | {"finish_reason": completion.choices[0].finish_reason}))
            return
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
    finally:
        loaded.engine.close()
