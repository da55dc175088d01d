"""Access control: once API keys are configured, every request needs one, except to routes marked as open to all."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from flask import Flask, g, request

from service.api_keys import ApiKeys
from service.errors import InvalidApiKey
from service.shares import work_for

_OPEN = "is_open_to_all"
View = TypeVar("View", bound=Callable[..., Any])


def open_to_all(view: View) -> View:
    """Mark a view that needs no key. Write this decorator below the one that registers the view."""
    setattr(view, _OPEN, True)
    return view


def is_open(app: Flask, endpoint: str | None) -> bool:
    """Return whether an endpoint needs no key.

    A path without a route needs a key too, so that nobody can find out without one which routes exist.
    """
    return getattr(app.view_functions.get(endpoint or ""), _OPEN, False)


def register_access(app: Flask, keys: ApiKeys | None) -> None:
    """Refuse requests without a valid API key. If `keys` is None, every route is open to everyone."""

    @app.before_request
    def _check_key() -> None:
        g.owner = ""
        work_for(client_key())
        if keys is None or is_open(app, request.endpoint):
            return
        authorization = request.authorization
        token = authorization.token if authorization is not None and authorization.type == "bearer" else None
        if not token:
            raise InvalidApiKey("an API key is required: send it as `Authorization: Bearer ...`")
        name = keys.owner_of(token)
        if name is None:
            raise InvalidApiKey("this API key is not known to the server: it has a typo, or it was replaced")
        g.owner = name
        work_for(client_key())
        structlog.contextvars.bind_contextvars(key_name=name)


def current_owner() -> str:
    """Return the owner of the sessions that the current request can use: the name of its key.

    Without API keys all requests have the same owner, "".
    """
    owner: str = g.get("owner", "")
    return owner


def client_key() -> str:
    """Return the client that the current request counts against in limits: its key's name, or else its address."""
    return f"key/{current_owner()}" if current_owner() else f"address/{_network(request.remote_addr or '')}"


def is_local() -> bool:
    """Return whether the current request was sent from this machine, and not forwarded by a proxy on it."""
    if "X-Forwarded-For" in request.headers or "Forwarded" in request.headers:
        return False
    try:
        address = _address(request.remote_addr or "")
    except ValueError:
        return False
    return address.is_loopback


def _network(text: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 address, because one client may have that whole network."""
    try:
        address = _address(text)
    except ValueError:
        return "unknown"
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an address; one that maps IPv4 into IPv6 becomes IPv4. Raises ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
