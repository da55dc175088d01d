"""The rate limit: how often one client may start work."""

from __future__ import annotations

import math
import time
from typing import Any

from flask import Flask, Response
from flask_limiter import Limiter, RequestLimit

from service.errors import InvalidSettings
from service.web.gate.access import client_key
from service.web.gate.error_responses import error_response
from service.web.gate.route import current_route

_STORAGE_TIMEOUT_S = 0.1  # of each call; after it this process counts alone until the storage answers again
_MAX_CONNECTIONS = 2**31 - 1  # every request uses one for a moment, so the number of threads is the limit


def register_rate_limit(app: Flask, rate: str, storage_url: str = "memory://") -> None:
    """Refuse requests that start work more often than `rate` allows.

    All requests of a client to routes that count as a start count together. `rate` is a rate such as
    `600/minute`, or several separated by semicolons; empty sets no limit. `storage_url` says where requests are
    counted: `memory://` counts those of this process, any URL of a Redis server (`redis://`, `rediss://`, `unix://`)
    those of all replicas. Raises InvalidSettings if the URL is invalid.
    """
    if not rate:
        return
    is_shared = not storage_url.startswith("memory:")
    if storage_url.startswith("unix:"):
        storage_url = f"redis+{storage_url}"  # the name that the library has for it
    try:
        Limiter(
            client_key,
            app=app,
            application_limits=[rate],
            application_limits_exempt_when=lambda: not current_route().counts_as_start,
            strategy="sliding-window-counter",  # stores two numbers per client, whatever the rate
            storage_uri=storage_url,
            storage_options=_redis_options() if is_shared else {},
            in_memory_fallback_enabled=is_shared,
            # Requests that are in progress when the storage fails may not use the fallback yet. They are let through.
            swallow_errors=True,
            on_breach=_refusal,
        )
    except ValueError:
        # The message of the cause may have parts of the URL, such as the password.
        raise InvalidSettings("GRU_SERVE_SESSION_STORE is not a valid URL of Redis", param="session_store") from None


def _redis_options() -> dict[str, Any]:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return {
        "socket_connect_timeout": _STORAGE_TIMEOUT_S,
        "socket_timeout": _STORAGE_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": _MAX_CONNECTIONS,
        "key_prefix": "gru-serve:starts",
    }


def _refusal(breached: RequestLimit) -> Response:
    retry_after_s = max(1, math.ceil(breached.reset_at - time.time()))
    response = error_response(f"the rate limit is {breached.limit}: try again in {retry_after_s} s", "rate_limited")
    response.headers["Retry-After"] = str(retry_after_s)
    return response
