"""`gru-serve keys new`."""

from __future__ import annotations

import click

from service.commands.options import echo_json, json_option


@click.group("keys")
def keys_group() -> None:
    """Create API keys."""


@keys_group.command("new")
@click.argument("name")
@json_option
def new_command(name: str, as_json: bool) -> None:
    """Print a new random key and its entry. The key is for its user; it is stored nowhere.

    The entry is for the server: add it to GRU_SERVE_API_KEYS or to GRU_SERVE_API_KEYS_FILE. Sessions belong to NAME, so
    a new key of the same name has access to the sessions of the old one.

    Example: gru-serve keys new alice
    """
    from service.api_keys import new_key

    key, entry = new_key(name)
    if as_json:
        echo_json({"key": key, "entry": entry})
    else:
        click.echo(f"key    {key}\nentry  {entry}")
