"""`gru-serve serve`."""

from __future__ import annotations

from typing import Any

import click

from service.commands.options import field_options, open_store, suggesting_models
from service.settings import Settings, read_settings


@click.command("serve")
@field_options(Settings)
def serve_command(**options: Any) -> None:
    """Serve the models of a store over HTTP.

    Every option can also be given as an environment variable GRU_SERVE_<OPTION>. The option takes precedence. Three
    settings hold secrets and are environment variables only: GRU_SERVE_SESSION_STORE, GRU_SERVE_STATE_KEYS and
    GRU_SERVE_API_KEYS.

    Example: gru-serve serve --port 8000 --model shakespeare
    """
    settings = read_settings(**options)

    from service.api_keys import read_keys
    from service.assembly import check_session_store, default_chat_template
    from service.engine.kernels import check_kernel
    from service.web.gunicorn.server import Server

    # Checked before the server starts, so that a mistake is reported in one line and not by a crashing worker.
    check_kernel(settings.kernel)
    read_keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    check_session_store(settings)
    default_chat_template(settings)
    with suggesting_models():
        open_store(settings.store_root).verify(settings.model)
    Server(settings).run()
