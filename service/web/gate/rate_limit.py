"""The rate limit: how often one client may start work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request
from flask_limiter import Limiter, RequestLimit

from service.errors import InvalidSettings
from service.web.gate.access import client_key
from service.web.gate.error_responses import error_response

_STARTING = ("POST", "PUT")


def register_rate_limit(app: Flask, rate: str, storage_url: str = "memory://") -> Callable[[], None]:
    """Refuse requests that start work more often than `rate` allows. Return a function that closes connections.

    All POST and PUT requests of a client count together; other methods don't count. `rate` is a rate such as
    `600/minute`, or several separated by semicolons; empty sets no limit. `storage_url` says where requests are
    counted: `memory://` counts those of this process, any URL of the session store those of all replicas. Raises
    InvalidSettings if the URL is invalid.
    """
    if not rate:
        return lambda: None
    is_shared = not storage_url.startswith("memory:")
    options: dict[str, Any] = {}
    if is_shared:
        # Imported here, so that a server with sessions in memory starts without the redis library.
        import service.web.gate.shared_counts  # noqa: F401 - registers the scheme at the library

        options = {"url": storage_url, "key_prefix": "gru-serve:starts"}
        storage_url = "gru-serve://"
    limiter = Limiter(
        client_key,
        application_limits=[rate],
        application_limits_exempt_when=lambda: request.method not in _STARTING,
        strategy="sliding-window-counter",  # stores two numbers per client, whatever the rate
        storage_uri=storage_url,
        storage_options=options,
        in_memory_fallback_enabled=is_shared,
        # Requests that are in progress when the storage fails may not use the fallback yet. They are let through.
        swallow_errors=True,
        on_breach=_refusal,
    )
    try:
        limiter.init_app(app)
    except ValueError as error:
        raise InvalidSettings(f"GRU_SERVE_SESSION_STORE {error}", param="session_store") from None
    close: Callable[[], None] = getattr(limiter.storage, "close", lambda: None)
    return close


def _refusal(breached: RequestLimit) -> Response:
    retry_after_s = max(1, math.ceil(breached.reset_at - time.time()))
    response = error_response(f"the rate limit is {breached.limit}: try again in {retry_after_s} s", "rate_limited")
    response.headers["Retry-After"] = str(retry_after_s)
    return response
