"""URLs of Redis: one server, the master that Sentinels name, or a cluster."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, unquote

Address = tuple[str, int]  # host and port; of a unix socket its path and 0
Kind = Literal["server", "unix", "sentinel", "cluster"]

_KINDS: dict[str, tuple[Kind, bool]] = {  # by the scheme: what the URL leads to, and whether by TLS
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = {*_FILES, "ssl_check_hostname"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_MAX_CHARS, _MAX_ADDRESSES = 8192, 100
_INVALID = (
    "must be redis://[user:password@]host[:port][/db], unix://[user:password@]/path[?db=0], "
    "redis+sentinel://[user:password@]host[:port],.../service[/db] or redis+cluster://[user:password@]host[:port],..., "
    "with rediss instead of redis for TLS; write special characters in the user and the password as %XX, and give only "
    "the parameters that docs/redis.md lists"
)


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password. Without a user, the password is that of the user `default`."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """How connections are encrypted. Files are in PEM format."""

    ca_certs: str | None = None  # file of the authorities that sign servers' certificates; None: those of the system
    certfile: str | None = None  # file of this client's certificate, if servers require one
    keyfile: str | None = None  # file of its private key; None: it is in `certfile`
    check_hostname: bool = True  # whether a server's certificate has to have the name in the URL


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A URL in its parts."""

    kind: Kind
    addresses: tuple[Address, ...]  # of the server, of Sentinels, or of some of a cluster's nodes
    login: Login = Login()
    db: int = 0
    tls: Tls | None = None
    service: str = ""  # the master's name at the Sentinels
    sentinel_login: Login = Login()


def parse(url: str) -> RedisUrl:
    """Return the parts of a URL. Raises ValueError, whose message has nothing of the URL, if it is invalid."""
    try:
        parsed = _parse(url)
    except ValueError:
        # The message of the cause may have parts of the URL, such as the password.
        raise ValueError(_INVALID) from None
    if parsed.tls is not None:
        _require_readable(parsed.tls)
    return parsed


def _parse(url: str) -> RedisUrl:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _KINDS or len(url) > _MAX_CHARS or "#" in url:
        raise ValueError
    kind, is_encrypted = _KINDS[scheme]
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    username, _, password = userinfo.partition(":")
    parameters = _parameters(query, kind, is_encrypted)
    if kind == "unix":
        if hosts or not path:
            raise ValueError
        addresses, db, service = [(f"/{unquote(path)}", 0)], parameters.get("db", "0"), ""
    else:
        service, db = _path(path, kind)
        default_port = 26379 if kind == "sentinel" else 6379
        addresses = [_address(host, default_port) for host in hosts.split(",", _MAX_ADDRESSES)]
    if len(addresses) > 1 and kind not in ("sentinel", "cluster"):
        raise ValueError
    return RedisUrl(
        kind,
        tuple(addresses),
        Login(unquote(username) or None, unquote(password) or None),
        _number(db),
        _tls(parameters) if is_encrypted else None,
        service,
        Login(parameters.get("sentinel_username") or None, parameters.get("sentinel_password") or None),
    )


def _parameters(query: str, kind: Kind, is_encrypted: bool) -> dict[str, str]:
    allowed = _TLS if is_encrypted else set()
    if kind == "unix":
        allowed = {"db"}
    elif kind == "sentinel":
        allowed = allowed | {"sentinel_username", "sentinel_password"}
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=20)
    if len(dict(pairs)) < len(pairs) or not allowed.issuperset(dict(pairs)):
        raise ValueError
    return dict(pairs)


def _path(path: str, kind: Kind) -> tuple[str, str]:
    """Return the service's name and the database."""
    if kind != "sentinel":
        if kind == "cluster" and path not in ("", "0"):
            raise ValueError  # a cluster has this one database
        return "", path or "0"
    service, _, db = path.partition("/")
    if not service:
        raise ValueError
    return unquote(service), db or "0"


def _address(text: str, default_port: int) -> Address:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]*)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError
    port = int(found[2] or default_port)
    if not 0 < port < 65_536:
        raise ValueError
    found[1].encode("idna")  # raises UnicodeError, a ValueError, for what can't be looked up
    return found[1].strip("[]") or "localhost", port


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError
    return int(text)


def _tls(parameters: dict[str, str]) -> Tls:
    ca_certs, certfile, keyfile = (parameters.get(name) or None for name in _FILES)
    if keyfile is not None and certfile is None:
        raise ValueError
    check_hostname = parameters.get("ssl_check_hostname", "true").lower()
    if check_hostname not in _BOOLEANS:
        raise ValueError
    return Tls(ca_certs, certfile, keyfile, _BOOLEANS[check_hostname])


def _require_readable(tls: Tls) -> None:
    """Raise ValueError if the files can't be used. They are read again for each connection, so they may be replaced."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.ca_certs is not None:
            context.load_verify_locations(cafile=tls.ca_certs)
    except OSError:
        raise ValueError("has a parameter ssl_ca_certs that is no readable file of certificates in PEM") from None
    try:
        if tls.certfile is not None:
            # The library would read the password of an encrypted key from the terminal, and wait.
            context.load_cert_chain(tls.certfile, tls.keyfile, password="")
    except (OSError, ValueError):
        raise ValueError(
            "has parameters ssl_certfile and ssl_keyfile that are no readable certificate and its private key in PEM, "
            "without a password"
        ) from None
