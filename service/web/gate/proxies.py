"""The address of a client that is connected through proxies. Only trusted proxies may say what it is."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<ipv4>[0-9.]+))(?::[0-9]{1,5})?")
_MAX_ADDRESSES = 32  # of X-Forwarded-For; more proxies in a row have no use


def register_proxies(app: Flask, trusted: int | Collection[Network]) -> None:
    """Replace the address of each request, `REMOTE_ADDR`, by the one that trusted proxies name in X-Forwarded-For.

    Args:
        app: The application.
        trusted: The number of proxies between the server and its clients, each of which adds an address. Or the
            networks of proxies: the client is the last address outside of them. 0 or no network trusts no one.
    """
    # Assigning to `wsgi_app` is how Flask's documentation adds a middleware; to mypy it is a method.
    if isinstance(trusted, int):
        if trusted:
            app.wsgi_app = ProxyFix(app.wsgi_app, x_for=trusted, x_proto=0)  # type: ignore[method-assign]
    elif trusted:
        app.wsgi_app = _TrustedNetworks(app.wsgi_app, trusted)  # type: ignore[method-assign]


def parse_address(text: str) -> Address:
    """Parse an address; one that maps IPv4 into IPv6 becomes IPv4. Some proxies add a port. Raises ValueError."""
    found = _WITH_PORT.fullmatch(text)
    address = ipaddress.ip_address(text if found is None else found["ipv6"] or found["ipv4"])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


class _TrustedNetworks:
    """WSGI middleware like ProxyFix, for proxies that are known by their networks."""

    def __init__(self, app: WSGIApplication, networks: Collection[Network]) -> None:
        self._app, self._networks = app, networks

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        named = environ.get("HTTP_X_FORWARDED_FOR", "").rsplit(",", _MAX_ADDRESSES)
        environ["REMOTE_ADDR"] = self._client(environ.get("REMOTE_ADDR", ""), reversed(named))
        return self._app(environ, start_response)

    def _client(self, peer: str, named: Iterable[str]) -> str:
        """Return the first address outside the networks, going from the server towards the client."""
        address = peer
        for before in named:
            try:
                parsed, following = parse_address(address), str(parse_address(before.strip()))
            except ValueError:
                break  # a proxy that names no address says nothing about its own client
            if not any(parsed in network for network in self._networks):
                break
            address = following
        return address
