"""`gru-serve models list|show|verify|alias|delete`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from service.commands.options import json_option, model_store_option, open_store
from service.errors import GruServeError, InvalidArtifact


@click.group("models")
def models_group() -> None:
    """List, show, verify, alias and delete the versions in a model store."""


@models_group.command("list")
@model_store_option
@json_option
def list_command(model_store: Path | None, as_json: bool) -> None:
    """List every version.

    Example: gru-serve models list
    """
    store = open_store(model_store)
    rows = [_row(store, version) for name in store.names() for version in store.versions(name)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"no models in {store.root}", err=True)
    for row in rows:
        loss = f"{row['validation_nats_per_char']:.4f} nats/char" if row["validation_nats_per_char"] else ""
        state = (
            "damaged: see `gru-serve models verify`" if row["damaged"] else f"{row['num_parameters']:>12,} parameters"
        )
        click.echo(f"{row['model']:<24} {state}  {loss:<18} {', '.join(row['aliases'])}".rstrip())


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
    if as_json:
        click.echo(json.dumps(facts | {"config": config.model_dump(), "training": training}, indent=1))
        return
    click.echo(f"model       {facts['model']}   {', '.join(described.aliases)}".rstrip())
    click.echo(f"path        {facts['path']}")
    click.echo(f"digest      {described.digest}")
    click.echo(f"parameters  {config.num_parameters:,}")
    click.echo(f"sizes       embedding {config.embedding_dim}, GRU {config.num_units} units x {config.num_layers}")
    click.echo(f"charset     {config.vocab_size} characters: {config.charset!r}")
    for section in ("corpus", "losses"):
        for name, value in training[section].items():
            click.echo(f"{section:<11} {name} = {value}")


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
    if as_json:
        click.echo(json.dumps(results, indent=1))
    else:
        for row in results:
            click.echo(f"{row['model']:<24} {row['error'] or '; '.join(['ok', *row['warnings']])}")
    if any(row["error"] for row in results):
        raise click.exceptions.Exit(1)


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
    if not yes:
        click.confirm(f"Delete {version.ref} at {version.path}?", abort=True)
    store.delete(model)
    click.echo(f"{version.ref} is deleted")


def _row(store: Any, version: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"model": version.ref}
    try:
        described = store.describe(version)
    except GruServeError:
        row |= {"damaged": True, "aliases": [], "digest": None, "num_parameters": None}
        return row | {"validation_nats_per_char": None}
    row |= {"damaged": False, "aliases": described.aliases, "digest": described.digest}
    loss = described.training.losses.validation_nats_per_char
    return row | {"num_parameters": described.config.num_parameters, "validation_nats_per_char": loss}
