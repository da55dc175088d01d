"""How often one caller may start something."""

from __future__ import annotations

import math
import time
from typing import Any

from flask import Flask, Response, request
from flask_limiter import Limiter, RequestLimit

from service.web.access import client_key
from service.web.error_responses import error_response

_STORAGE_TIMEOUT_S = 0.1  # of each step of an exchange; then this process counts alone until the storage is back
_STARTING = ("POST", "PUT")


def register_rate_limit(app: Flask, rate: str, storage_url: str = "memory://") -> None:
    """Refuse starts above a rate such as `600/minute`, or several separated by semicolons; empty: none.

    A start is a request that makes the engine work: POST and PUT, all counted together. storage_url: where they are
    counted; redis:// counts for all replicas.
    """
    if not rate:
        return
    is_shared = not storage_url.startswith("memory:")
    options: dict[str, Any] = {}
    if is_shared:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = {
            "socket_connect_timeout": _STORAGE_TIMEOUT_S,
            "socket_timeout": _STORAGE_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "key_prefix": "gru-serve:starts",
        }
    Limiter(
        client_key,
        app=app,
        application_limits=[rate],
        application_limits_exempt_when=lambda: request.method not in _STARTING,
        strategy="sliding-window-counter",  # two numbers a caller, whatever the rate
        storage_uri=storage_url,
        storage_options=options,
        in_memory_fallback_enabled=is_shared,
        # Requests that are under way when the storage goes may not find the fallback yet: they are let through.
        swallow_errors=True,
        on_breach=_refusal,
    )


def _refusal(breached: RequestLimit) -> Response:
    after_s = max(1, math.ceil(breached.reset_at - time.time()))
    response = error_response(f"at most {breached.limit}: try again in {after_s} s", "rate_limited")
    response.headers["Retry-After"] = str(after_s)
    return response
