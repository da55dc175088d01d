"""`gru-serve keys new`."""

from __future__ import annotations

import json

import click

from service.commands.options import json_option


@click.group("keys")
def keys_group() -> None:
    """Make API keys."""


@keys_group.command("new")
@click.argument("name")
@json_option
def new_command(name: str, as_json: bool) -> None:
    """Print a random key, for its user, and its entry, for GRU_SERVE_API_KEYS or the file. Nothing keeps the key.

    Sessions belong to the NAME: a new key of the same name finds those of the old one.

    Example: gru-serve keys new alice
    """
    from service.api_keys import new_key

    key, entry = new_key(name)
    if as_json:
        click.echo(json.dumps({"key": key, "entry": entry}))
    else:
        click.echo(f"key    {key}\nentry  {entry}")
