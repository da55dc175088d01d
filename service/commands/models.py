"""`gru-serve models list|show|verify|tokenizer|alias|chat|delete`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from service.commands.options import (
    ChatTemplateType,
    PathOption,
    echo_json,
    json_option,
    model_store_option,
    open_store,
)
from service.errors import GruServeError, InvalidArtifact, plural
from service.model import hugging_face
from service.model.artifact import CHAT
from service.model.charset import Charset


@click.group("models")
def models_group() -> None:
    """List, show, verify, alias and delete versions, write their tokenizers, and give them chat templates."""


@models_group.command("list")
@model_store_option
@json_option
def list_command(model_store: Path | None, as_json: bool) -> None:
    """List every version.

    Example: gru-serve models list
    """
    store = open_store(model_store)
    rows = [_row(store, version) for name in store.names() for version in store.versions(name)]
    rows += [_damaged_row(name) for name in store.unreadable()]
    if as_json:
        echo_json(rows, indent=1)
        return
    if not rows:
        click.echo(f"no models in {store.root}", err=True)
        return
    table = [("model", "parameters", "nats/char", "aliases")]
    for row in rows:
        if row["damaged"]:
            what = "damaged" if "@" in row["model"] else "unreadable"  # a name, whose versions nobody knows
            size = f"{what}: see models verify"
        else:
            size = f"{row['num_parameters']:,}"
        loss = row["validation_nats_per_char"]
        table.append((row["model"], size, f"{loss:.4f}" if loss is not None else "", ", ".join(row["aliases"])))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for model, size, loss, aliases in table:
        click.echo(f"{model:<{widths[0]}}  {size:>{widths[1]}}  {loss:>{widths[2]}}  {aliases}".rstrip())


@models_group.command("show")
@click.argument("model")
@model_store_option
@json_option
def show_command(model: str, model_store: Path | None, as_json: bool) -> None:
    """Show one version: its sizes, charset, training text and losses.

    Example: gru-serve models show shakespeare@1
    """
    store = open_store(model_store)
    described = store.describe(store.resolve(model))
    config, training = described.config, described.training.model_dump()
    facts: dict[str, Any] = {"model": described.version.ref, "path": str(described.version.path)}
    facts |= {"digest": described.digest, "aliases": described.aliases, "num_parameters": config.num_parameters}
    chat = described.chat.model_dump() if described.chat else None
    if as_json:
        echo_json(facts | {"config": config.model_dump(), "chat": chat, "training": training}, indent=1)
        return
    rows = [
        ("model", ", ".join([facts["model"], *described.aliases])),
        ("path", facts["path"]),
        ("digest", described.digest),
        ("parameters", f"{config.num_parameters:,}"),
        ("sizes", f"embedding {config.embedding_dim}, GRU {config.num_units} units x {config.num_layers}"),
        ("charset", f"{plural(config.vocab_size, 'character')}: {config.charset!r}"),
        ("chat", json.dumps(chat, ensure_ascii=False) if chat else "no template, see models chat"),
    ]
    for section in ("corpus", "losses"):
        rows += [(f"{section}: {name}", value) for name, value in _facts(training[section])]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@models_group.command("verify")
@click.argument("model", required=False)
@model_store_option
@json_option
def verify_command(model: str | None, model_store: Path | None, as_json: bool) -> None:
    """Check the checksums, names, shapes and numbers of one version or of all. Exits with 1 if one is damaged.

    Example: gru-serve models verify shakespeare@1
    """
    store = open_store(model_store)
    versions = [store.resolve(model)] if model else [v for name in store.names() for v in store.versions(name)]
    results: list[dict[str, Any]] = []
    for version in versions:
        try:
            results.append({"model": version.ref, "error": None, "warnings": list(store.verify(version.ref))})
        except InvalidArtifact as error:
            results.append({"model": version.ref, "error": error.message, "warnings": []})
    if not model:
        results += [{"model": name, "error": error, "warnings": []} for name, error in store.unreadable().items()]
    if as_json:
        echo_json(results, indent=1)
    else:
        for row in results:
            click.echo(f"{row['model']:<24} {row['error'] or '; '.join(['ok', *row['warnings']])}")
    if any(row["error"] for row in results):
        raise click.exceptions.Exit(1)


@models_group.command("tokenizer")
@click.argument("model")
@click.option(
    "--folder",
    type=PathOption(),
    help="Write tokenizer.json and tokenizer_config.json into this folder, for transformers, instead of printing the "
    "first.",
)
@model_store_option
def tokenizer_command(model: str, folder: Path | None, model_store: Path | None) -> None:
    """Print a version's tokenizer.json, which Hugging Face's tokenizers loads: each character is a token.

    Example: gru-serve models tokenizer shakespeare --folder shakespeare-tokenizer
    """
    store = open_store(model_store)
    described = store.describe(store.resolve(model))
    charset = Charset(described.config.charset)
    tokenizer = hugging_face.tokenizer(charset)
    if folder is None:
        echo_json(tokenizer)
        return
    config = hugging_face.tokenizer_config(charset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((hugging_face.TOKENIZER, tokenizer), (hugging_face.CONFIG, config)):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"can't write into {folder}: {error.strerror}") from error
    click.echo(f"the tokenizer of {described.version.ref} is in {folder}", err=True)


@models_group.command("alias")
@click.argument("model")
@click.argument("alias")
@click.option("--remove", is_flag=True, help="Remove the alias. MODEL is then a name without a version.")
@model_store_option
def alias_command(model: str, alias: str, remove: bool, model_store: Path | None) -> None:
    """Set an alias: name@ALIAS then means the version MODEL. With --remove, remove the alias.

    Example: gru-serve models alias shakespeare@1 stable
    """
    store = open_store(model_store)
    if remove:
        store.remove_alias(model, alias)
        click.echo(f"{model}@{alias} is removed")
    else:
        version = store.resolve(model)
        store.set_alias(version.name, alias, version.number)
        click.echo(f"{version.name}@{alias} is {version.ref}")


@models_group.command("chat")
@click.argument("model")
@click.argument("template", type=ChatTemplateType())
@model_store_option
def chat_command(model: str, template: Any, model_store: Path | None) -> None:
    """Publish MODEL again with a chat template, so that it answers chats: a file, or play, dialogue or lines.

    A version never changes, so this publishes a new one, with the same weights.

    Example: gru-serve models chat shakespeare@1 play
    """
    store = open_store(model_store)
    described = store.describe(store.resolve(model))
    before = described.version
    if described.chat == template:
        click.echo(f"{before.ref} has this chat template already")
        return
    if unknown := template.unknown_to(Charset(described.config.charset)):
        reason = f"{before.ref} doesn't know {unknown}, which the template writes"
        raise click.BadParameter(reason, param_hint="TEMPLATE")
    newest = store.versions(before.name)[-1]
    version = store.republish(before.ref, {CHAT: template.to_json().encode()})
    click.echo(f"{version.ref} is {before.ref} with this chat template")
    if newest != before:
        click.echo(f"{version.name}@latest is {version.ref} now, and was {newest.ref}", err=True)


@models_group.command("delete")
@click.argument("model")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@model_store_option
def delete_command(model: str, yes: bool, model_store: Path | None) -> None:
    """Delete one version, given as name@number. Its number is never used again.

    Example: gru-serve models delete shakespeare@1
    """
    store = open_store(model_store)
    version = store.resolve(model)
    if model != version.ref:
        raise click.UsageError(f"give the version to delete by its number, such as {version.ref}")
    store.check_deletable(model)  # refuses before the user is asked
    if not yes:
        click.confirm(f"Delete {version.ref} at {version.path}?", abort=True)
    store.delete(model)
    click.echo(f"{version.ref} is deleted")


def _damaged_row(model: str) -> dict[str, Any]:
    """Return the row of a version, or of a whole name, that can't be read."""
    row: dict[str, Any] = {"model": model, "damaged": True, "aliases": [], "digest": None, "num_parameters": None}
    return row | {"validation_nats_per_char": None}


def _row(store: Any, version: Any) -> dict[str, Any]:
    try:
        described = store.describe(version)
    except GruServeError:
        return _damaged_row(version.ref)
    row: dict[str, Any] = {"model": version.ref, "damaged": False, "aliases": described.aliases}
    row |= {"digest": described.digest, "num_parameters": described.config.num_parameters}
    loss = described.training.losses.validation_nats_per_char
    return row | {"validation_nats_per_char": loss}


def _facts(section: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and values of a part of `training.json` as people read them, also those of parts inside it."""
    for name, value in section.items():
        words = before + name.replace("num_", "").replace("_", " ")
        if isinstance(value, dict):
            yield from _facts(value, f"{words}, ")
        elif value is not None:  # what was not measured, as of an imported model, is left out
            yield (
                words,
                f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value),
            )
