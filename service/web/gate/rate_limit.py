"""The rate limit: how often one client may start work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import structlog
from flask import Flask, Response, current_app
from flask_limiter import Limiter, RequestLimit
from limits.strategies import SlidingWindowCounterRateLimiter

from service.errors import InvalidSettings
from service.web.gate.access import client_key
from service.web.gate.error_responses import error_response
from service.web.gate.rate_storage import ProcessStorage
from service.web.gate.route import current_route

log = structlog.get_logger(__name__)

_START_CHARS = 8192  # characters of one start; a request for more counts as several


def register_rate_limit(
    app: Flask, rate: str, storage_url: str = "memory://", max_tokens: int = 0
) -> Callable[[], None]:
    """Refuse requests that start work more often than `rate` allows. Return a function that closes connections.

    All requests of a client to routes that count as a start count together. `count_cost` lets large requests count
    several times; `max_tokens` is what it passes on. `rate` is a rate such as `600/minute`, or several separated by
    semicolons; empty sets no limit. `storage_url` says where requests are counted: `memory://` counts those of this
    process, any URL of the session store those of all replicas. Raises InvalidSettings if the URL is invalid.
    """
    if not rate:
        return lambda: None
    app.config["MAX_TOKENS"] = max_tokens
    is_shared = not storage_url.startswith("memory:")
    if not is_shared:
        storage_url = f"{ProcessStorage.STORAGE_SCHEME[0]}://"
    options: dict[str, Any] = {}
    if is_shared:
        # Imported here, so that a server with sessions in memory starts without the redis library.
        import service.web.gate.shared_counts  # noqa: F401 - registers the scheme at the library

        options = {"url": storage_url, "key_prefix": "gru-serve:starts"}
        storage_url = "gru-serve://"
    limiter = Limiter(
        client_key,
        application_limits=[rate],
        application_limits_exempt_when=lambda: not current_route().counts_as_start,
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
    if is_shared:  # instead of the library's own storage: see ProcessStorage
        limiter._fallback_limiter = SlidingWindowCounterRateLimiter(ProcessStorage())
    close: Callable[[], None] = getattr(limiter.storage, "close", lambda: None)
    return close


def count_cost(num_chars: Callable[[int], int]) -> None:
    """Count a request that reads and generates many characters several times. Does nothing without a rate limit.

    The request has been counted once, and was refused if not a single start was left. So one that counts for more than
    the whole limit is possible too, and uses it up.

    Args:
        num_chars: Returns how many characters the request reads and generates. Its argument is how many each of its
            texts may generate: a request for more is refused later, and counts once.
    """
    limiter = next(iter(current_app.extensions.get("limiter", ())), None)
    if limiter is None or not current_route().counts_as_start:
        return
    num_more = (num_chars(current_app.config["MAX_TOKENS"]) - 1) // _START_CHARS
    if num_more < 1:
        return
    try:
        for limit in limiter.current_limits:
            limiter.limiter.hit(limit.limit, *limit.request_args, cost=min(num_more, limit.remaining))
    except Exception as error:  # noqa: BLE001 - the storage has failed since it counted the request once
        log.warning("the cost of a request was not counted", error=type(error).__name__)


def _refusal(breached: RequestLimit) -> Response:
    retry_after_s = max(1, math.ceil(breached.reset_at - time.time()))
    response = error_response(f"the rate limit is {breached.limit}: try again in {retry_after_s} s", "rate_limited")
    response.headers["Retry-After"] = str(retry_after_s)
    return response
