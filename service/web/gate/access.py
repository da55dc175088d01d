"""Access control: once API keys are configured, every request needs one, except to routes that are declared open."""

from __future__ import annotations

import ipaddress

import structlog
from flask import Flask, g, request

from service.api_keys import ApiKeys
from service.errors import InvalidApiKey
from service.shares import work_for
from service.web.gate.proxies import parse_address
from service.web.gate.route import current_route


def register_access(app: Flask, keys: ApiKeys | None) -> None:
    """Refuse requests without a valid API key. If `keys` is None, every route is open to everyone."""

    @app.before_request
    def _check_key() -> None:
        g.owner = ""
        work_for(client_key())
        if keys is None or current_route().open:
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


def _network(text: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 address, because one client may have that whole network."""
    try:
        address = parse_address(text)
    except ValueError:
        return "unknown"
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))
