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
    stop: tuple[str, ...],
    seed: int | None,
    unknown_chars: str,
    model_store: Path | None,
    as_json: bool,
) -> None:
    """Continue a text here, without a server, printing as it goes. The same as POST /v1/completions answers.

    Example: gru-serve generate --prompt ROMEO: --max-tokens 200 --seed 7
    """
    import torch

    from service.config import read_settings
    from service.engine.sampling import SamplingSettings
    from service.generation import Generation, GenerationRequest
    from service.loaded import LoadedModel
    from service.model.charset import UnknownChars

    if "" in stop:
        raise click.BadParameter("a stop string can't be empty", param_hint="--stop")
    torch.set_num_threads(1)  # as in the server: other thread counts may round a product differently
    loaded = LoadedModel(*open_store(model_store).load(model if model is not None else read_settings().model))
    seed = secrets.randbits(63) if seed is None else seed
    request = GenerationRequest(
        prompt=loaded.charset.encode(prompt, cast(UnknownChars, unknown_chars)),
        max_tokens=max_tokens,
        sampling=SamplingSettings(temperature, top_k, top_p),
        seed=seed,
        stop=stop,
    )
    generation = Generation(loaded.network, loaded.charset, request)
    if as_json:
        text = "".join(generation)
        facts = {"model": loaded.version.ref, "seed": seed, "text": text, "finish_reason": generation.finish_reason}
        click.echo(json.dumps(facts))
        return
    for piece in generation:
        click.echo(piece, nl=False)
    click.echo()
