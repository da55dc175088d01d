"""Who asks: every request needs a key, once there are any, unless its view says that it is open to all."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from flask import Flask, g, request

from service.api_keys import ApiKeys
from service.errors import InvalidApiKey

_OPEN = "is_open_to_all"
View = TypeVar("View", bound=Callable[..., Any])


def open_to_all(view: View) -> View:
    """Mark a view that needs no key. It goes below the decorator that registers the view."""
    setattr(view, _OPEN, True)
    return view


def is_open(app: Flask, endpoint: str | None) -> bool:
    """Whether an endpoint needs no key. What is not there needs one: nobody else is to learn what there is."""
    return getattr(app.view_functions.get(endpoint or ""), _OPEN, False)


def register_access(app: Flask, keys: ApiKeys | None) -> None:
    """Let nobody in without a key. keys: None opens everything to everybody."""

    @app.before_request
    def _admit() -> None:
        g.owner = ""
        if keys is None or is_open(app, request.endpoint):
            return
        given = request.authorization
        token = given.token if given is not None and given.type == "bearer" else None
        if not token:
            raise InvalidApiKey("a key is needed: send it as `Authorization: Bearer ...`")
        name = keys.owner_of(token)
        if name is None:
            raise InvalidApiKey("this key is not known here: it was mistyped, or has been replaced")
        g.owner = name
        structlog.contextvars.bind_contextvars(key_name=name)


def current_owner() -> str:
    """The owner of what the current request works on: its key's name; without keys everybody is the same one."""
    owner: str = g.get("owner", "")
    return owner


def client_key() -> str:
    """Whose share of the server the current request uses: its key's, or else that of the address it comes from."""
    return f"key/{current_owner()}" if current_owner() else f"address/{_network(request.remote_addr or '')}"


def is_local() -> bool:
    """Whether the current request comes from this machine, and not through a proxy on it."""
    if "X-Forwarded-For" in request.headers or "Forwarded" in request.headers:
        return False
    try:
        address = _address(request.remote_addr or "")
    except ValueError:
        return False
    return address.is_loopback


def _network(address: str) -> str:
    """An IPv6 caller has 2**64 addresses to ask from, so they count as one."""
    try:
        found = _address(address)
    except ValueError:
        return "unknown"
    return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Raises ValueError."""
    found = ipaddress.ip_address(text)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
