"""The rate limit: how often one client may start work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import structlog
from flask import Flask, Response, request
from flask_limiter import Limiter, RequestLimit
from limits.strategies import SlidingWindowCounterRateLimiter

from service.errors import InvalidSettings
from service.web.gate.access import client_key
from service.web.gate.error_responses import error_response
from service.web.gate.rate_storage import ProcessStorage
from service.web.gate.route import current_route

log = structlog.get_logger(__name__)

_READ_FIELDS = ("text", "messages", "input", "candidates")  # that have the characters to read, besides `prompt`
_START_CHARS = 8192  # characters of one start; a request for more counts as several


def register_rate_limit(app: Flask, rate: str, storage_url: str = "memory://") -> Callable[[], None]:
    """Refuse requests that start work more often than `rate` allows. Return a function that closes connections.

    All requests of a client to routes that count as a start count together. `register_start_costs` lets large requests
    count several times. `rate` is a rate such as `600/minute`, or several separated by semicolons; empty sets
    no limit. `storage_url` says where requests are counted: `memory://` counts those of this process, any URL of the
    session store those of all replicas. Raises InvalidSettings if the URL is invalid.
    """
    if not rate:
        return lambda: None
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


def register_start_costs(app: Flask, max_chars: int, max_texts: int, chat_chars: int) -> None:
    """Count large requests several times. Does nothing without a rate limit.

    A request is refused only if not a single start is left. So one that counts for more than the whole limit is
    possible too, and uses it up. Register this after the check of the body, which it reads.

    Args:
        app: The application.
        max_chars: Characters that a text may have. A request for more is refused later, and counts once.
        max_texts: The same for its texts.
        chat_chars: Characters that a chat generates at most if it doesn't say.
    """

    @app.before_request
    def _count_cost() -> None:
        limiter = next(iter(app.extensions.get("limiter", ())), None)
        if limiter is None or not current_route().counts_as_start:
            return
        num_more = (_num_chars(request.get_json(), max_chars, max_texts, chat_chars) - 1) // _START_CHARS
        if num_more < 1:
            return
        try:
            for limit in limiter.current_limits:
                limiter.limiter.hit(limit.limit, *limit.request_args, cost=min(num_more, limit.remaining))
        except Exception as error:  # noqa: BLE001 - the storage has failed since it counted the request once
            log.warning("the cost of a request was not counted", error=type(error).__name__)


def _num_chars(body: Any, max_chars: int, max_texts: int, chat_chars: int) -> int:
    """Return how many characters a request reads and generates: 0 for a body that will be refused.

    The body is JSON that no schema has seen yet.
    """

    def number(name: str, default: int, largest: int) -> int:
        value = body.get(name)
        return default if value is None else value if type(value) is int and 0 <= value <= largest else -1

    prompts = body.get("prompt")
    # A list is a text of ids if its first element is one.
    prompts = prompts if isinstance(prompts, list) and prompts and type(prompts[0]) is not int else [prompts]
    num_read = sum(map(_length, (*prompts, *map(body.get, _READ_FIELDS))))
    num_choices = number("beam", 0, max_texts) or number("best_of", 0, max_texts) or number("n", 1, max_texts)
    max_tokens = number("max_completion_tokens", 0, max_chars) or number("max_tokens", 0, max_chars)
    if max_tokens == 0 and "messages" in body:
        max_tokens = min(chat_chars, max_chars)
    if min(num_choices, max_tokens) < 0 or len(prompts) > max_texts:
        return 0
    return int(num_read + max_tokens * num_choices * len(prompts))


def _length(text: Any, depth: int = 4) -> int:
    """Return the number of characters of a text, and of what a list of texts, ids, messages or parts has.

    depth: How far lists and objects are looked into. The deepest text that is read is one in a part of a message.
    """
    if isinstance(text, dict) and depth:
        return _length(text.get("content"), depth - 1) + _length(text.get("text"), depth - 1)
    if isinstance(text, list) and depth:
        return sum(_length(one, depth - 1) for one in text)
    return len(text) if isinstance(text, str) else 1 if isinstance(text, int) else 0


def _refusal(breached: RequestLimit) -> Response:
    retry_after_s = max(1, math.ceil(breached.reset_at - time.time()))
    response = error_response(f"the rate limit is {breached.limit}: try again in {retry_after_s} s", "rate_limited")
    response.headers["Retry-After"] = str(retry_after_s)
    return response
