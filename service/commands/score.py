"""`gru-serve score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

import click

from service.commands.options import (
    echo_json,
    json_option,
    model_store_option,
    open_service,
    read_text,
    refuse_one_source,
)
from service.errors import InvalidValue, UnknownCharacters, plural
from service.model.charset import Charset, UnknownChars
from service.settings import read_settings

if TYPE_CHECKING:
    from service.arrays import Ids
    from service.generation.candidates import Normalize


@click.command("score")
@click.argument("candidates", nargs=-1)
@click.option(
    "--candidates-file",
    type=click.File("rb"),
    help="File with more candidates, in UTF-8, one in each line; -: standard input.",
)
@click.option("--prompt", help="The text that the candidates may follow, as it is.  [none]")
@click.option("--prompt-file", type=click.File("rb"), help="File with that text, in UTF-8, all of it.")
@click.option("--model", default=None, help="Model as name, name@version or name@alias.  [the setting GRU_SERVE_MODEL]")
@click.option(
    "--normalize",
    type=click.Choice(["none", "length", "candidates"]),
    default="none",
    help="The score is the log-probability, its mean per character, or the log-probability given that it is one of the "
    "candidates.  [none]",
)
@click.option(
    "--unknown-chars",
    type=click.Choice(get_args(UnknownChars)),
    default="error",
    help="What happens to characters that the model does not know.  [error]",
)
@model_store_option
@json_option
def score_command(
    candidates: tuple[str, ...],
    candidates_file: BinaryIO | None,
    prompt: str | None,
    prompt_file: BinaryIO | None,
    model: str | None,
    normalize: Normalize,
    unknown_chars: UnknownChars,
    model_store: Path | None,
    as_json: bool,
) -> None:
    r"""Print how likely each candidate follows a text, in nats, the likeliest first. The numbers are those of
    POST /v1/score. Each candidate is one line; a newline in it is printed as \n. With --json, the candidates keep
    their order, and their characters are as they are.

    Example: gru-serve score --prompt 'But soft, what ' light night knight
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give one text before the candidates, not two: with --prompt or --prompt-file")
    refuse_one_source(("--prompt-file", prompt_file), ("--candidates-file", candidates_file))
    if prompt_file is not None:
        prompt = read_text(prompt_file, "--prompt-file")
    texts = [*candidates, *(_lines(candidates_file) if candidates_file is not None else ())]
    _check(texts)
    with open_service(model_store, model, num_threads=None) as service:
        loaded = service.models.get(service.default_model)
        facts = _scored(loaded, prompt or "", texts, normalize, unknown_chars)
        if as_json:
            echo_json({"model": loaded.version.ref, "data": facts})
            return
        for fact in sorted(facts, key=lambda fact: -fact["score"]):
            click.echo(f"{fact['score']:12.4f}  {_on_one_line(fact['text'])}")


def _on_one_line(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _lines(file: BinaryIO) -> list[str]:
    """Return the lines of a file that are not empty."""
    lines = read_text(file, "--candidates-file").replace("\r\n", "\n").split("\n")
    return [line for line in lines if line]


def _check(texts: list[str]) -> None:
    from service.generation.candidates import MAX_CANDIDATES

    if not texts:
        raise click.UsageError("give candidates as arguments, or in a file with --candidates-file")
    if len(texts) > MAX_CANDIDATES:
        raise click.UsageError(f"at most {MAX_CANDIDATES:,} candidates at a time, not {len(texts):,}")
    if "" in texts:
        raise click.UsageError("a candidate must not be empty")
    max_chars = read_settings().max_prompt_chars
    if sum(map(len, texts)) > max_chars:
        raise click.UsageError(
            f"the candidates have more than {plural(max_chars, 'character', ',')}: set GRU_SERVE_MAX_PROMPT_CHARS"
        )


def _scored(
    model: Any, prompt: str, texts: list[str], normalize: Normalize, unknown_chars: UnknownChars
) -> list[dict[str, Any]]:
    from service.engine.prefix_cache import NOBODY
    from service.generation.branches import state_after
    from service.generation.candidates import Origin, normalized, score_candidates

    before = model.charset.encode(prompt, unknown_chars)
    encoded = [_ids_of(model.charset, text, unknown_chars) for text in texts]
    hidden, _ = state_after(model, NOBODY, before)
    logprobs = score_candidates(model, Origin(hidden, len(before)), encoded)
    return [
        {"text": model.charset.decode(ids), "logprob": round(logprob, 7), "score": round(score, 7)}
        for ids, logprob, score in zip(encoded, *normalized(logprobs, normalize), strict=True)
    ]


def _ids_of(charset: Charset, text: str, unknown_chars: UnknownChars) -> Ids:
    try:
        ids = charset.encode(text, unknown_chars)
    except UnknownCharacters as error:
        raise error.within(repr(text)) from None
    if not len(ids):
        raise InvalidValue(f"{text!r}: the model knows none of its characters: leave this candidate out")
    return ids
