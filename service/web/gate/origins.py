"""Which names the server answers to, and which pages may call it.

A web page may not read another site's answers, unless its own name resolves to this server's address: then the browser
takes both for one site (DNS rebinding). The header Host still has the page's name, so the server refuses names that are
not its own. A page that uses the server's own name is foreign by its Origin, and needs the setting `allowed_origins`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from functools import lru_cache

from flask import Flask, Response, request

from service.web.gate.error_responses import error_response
from service.web.gate.route import current_route

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/?#@]+)")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_ANY = "*"

_METHODS = "GET, HEAD, POST, PUT, DELETE"
_HEADERS = ("Authorization", "Content-Type", "Last-Event-ID", "X-Request-Id")
_CLIENT_HEADER = re.compile(r"x-stainless-[a-z-]{1,32}")  # OpenAI's client sends about ten of these
_EXPOSED = "Retry-After, X-Request-Id"
_MAX_AGE_S = "7200"  # the longest that browsers accept


class HostPolicy:
    """The values of the header Host that a server answers to."""

    def __init__(self, bind_address: str, allowed: Collection[str]) -> None:
        """Create the policy of a server.

        Args:
            bind_address: Where the server listens.
            allowed: More names, in lower case: `api.example.org`, `*.example.org` for all names below it, `*` for any.
                Without any, a server accepts only loopback names on a loopback address, and all names elsewhere.
        """
        self._names = {name for name in allowed if not name.startswith("*")}
        self._suffixes = tuple(name[1:] for name in allowed if name.startswith("*."))
        self._is_local = is_loopback(bind_address)
        self._accepts_all = _ANY in allowed or not (self._is_local or allowed)

    def accepts(self, host: str) -> bool:
        """Return whether the server answers a request with this Host, a name or address with or without a port."""
        if self._accepts_all:
            return True
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name: str = found["ipv6"] or found["name"]
        if is_loopback(name) or name in self._names or name.endswith(self._suffixes):
            return True
        # No page can make a browser take a name for an address, so addresses are safe. They are what probes and most
        # balancers send.
        return not self._is_local and _is_address(name)


@lru_cache(maxsize=256)  # parsing an address takes longer than the rest of the check
def is_loopback(host: str) -> bool:
    """Return whether a name or address means the machine itself. An IPv6 address has no brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def register_origins(app: Flask, hosts: HostPolicy, allowed_origins: Collection[str]) -> None:
    """Refuse foreign names and the pages of foreign origins; let the pages of allowed origins call the service (CORS).

    Register it before everything that asks for a key: browsers send none with the question whether a page may call.

    Args:
        app: The application.
        hosts: The names that the server answers to.
        allowed_origins: Origins in lower case, such as `https://example.org`; `*` for all.
    """
    is_for_all = _ANY in allowed_origins

    @app.before_request
    def _check_origin() -> Response | None:
        names, origin = _requested_hosts(), request.headers.get("Origin")
        # Health checks say nothing about texts, and balancers send any Host with them.
        if not current_route().is_check and not all(hosts.accepts(name) for name in names):
            return error_response(
                "the server does not answer to the name in the header Host: if the name is right, its operator has to "
                "add it to GRU_SERVE_ALLOWED_HOSTS",
                "host_not_allowed",
            )
        is_allowed = is_for_all or (origin is not None and origin.lower() in allowed_origins)
        if not is_allowed and _is_foreign(names, origin):
            return error_response(
                "pages of this origin may not call the server: if they should, its operator has to add the origin to "
                "GRU_SERVE_ALLOWED_ORIGINS",
                "origin_not_allowed",
            )
        if is_allowed and request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return _preflight_response()
        return None

    @app.after_request
    def _let_read(response: Response) -> Response:
        if not allowed_origins:
            return response
        origin = request.headers.get("Origin")
        response.vary.add("Origin")  # also on answers to others, so that a cache keeps them apart
        if origin is not None and (is_for_all or origin.lower() in allowed_origins):
            response.headers["Access-Control-Allow-Origin"] = _ANY if is_for_all else origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response


def _preflight_response() -> Response:
    """Answer a browser that asks whether a page may send a request. `_let_read` adds the origin."""
    requested = request.headers.get("Access-Control-Request-Headers", "").split(",")
    of_clients = [name.strip() for name in requested if _CLIENT_HEADER.fullmatch(name.strip().lower())]
    response = Response(status=204)
    response.headers["Access-Control-Allow-Methods"] = _METHODS
    response.headers["Access-Control-Allow-Headers"] = ", ".join([*_HEADERS, *of_clients])
    response.headers["Access-Control-Max-Age"] = _MAX_AGE_S
    return response


def _requested_hosts() -> list[str]:
    """Return the names, with ports, under which the client called; none if it sent none, because then it is no browser.

    A proxy that replaces Host may send the client's in another header.
    """
    sent = [request.headers.get("Host", ""), *request.headers.get("X-Forwarded-Host", "").split(",")]
    return [name.strip() for name in sent if name.strip()]


def _is_foreign(names: list[str], origin: str | None) -> bool:
    """Return whether a page of another origin made a browser send the current request.

    Only browsers send these headers, and no page can change them. Sec-Fetch-Site is the browser's own comparison, so it
    also holds through a proxy that replaces Host; browsers send it to HTTPS and loopback addresses only.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site in ("same-origin", "none"):
        return False
    if origin is not None:
        return not any(_is_same_host(origin.lower(), name.lower()) for name in names)
    # A link on another site may open the page: what it opens can't be read there.
    is_link = (
        request.method in ("GET", "HEAD")
        and request.headers.get("Sec-Fetch-Mode") == "navigate"
        and request.headers.get("Sec-Fetch-Dest") == "document"
    )
    return site is not None and not is_link


def _is_same_host(origin: str, host: str) -> bool:
    """Return whether an origin has the name and port of a Host. Schemes may differ: a balancer may have ended TLS."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return False
    default = ":" + _DEFAULT_PORTS.get(found["scheme"], "")
    return found["host"].removesuffix(default) == host.removesuffix(default)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
