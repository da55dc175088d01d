"""Connections to Redis: where the servers are, and commands sent to the one that has a key.

Three kinds of URL lead to masters in different ways. A plain address is the master. Sentinels are asked for the
master's address. The nodes of a cluster are asked which master has which slots; every key belongs to one slot. What
belongs to a session in one place is one key, so no command needs two.

Sentinels and cluster nodes are asked by this module and not by redis-py's `Sentinel` and `RedisCluster`:

- The first Sentinel that answers may not know of a failover yet. All of them are asked, and the latest configuration
  (`config-epoch`) counts. `SENTINEL MASTERS`, which redis-py uses, has the old address until the failover has ended;
  `SENTINEL GET-MASTER-ADDR-BY-NAME` has the new one as soon as the replica is promoted.
- `RedisCluster` repeats a call after a time-out without telling that the first attempt may have been done, and asks for
  the slots again, and waits, on the threads of the callers.

Connections use RESP2 and ask for no maintenance notices, so servers need neither: see docs/redis.md.

Servers are not trusted with time or memory: what they answer is limited (redis_answers.py), and so is what follows from
it, such as the number of a cluster's nodes.
"""

from __future__ import annotations

import math
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha1
from typing import Any, Protocol

from redis import exceptions as errors
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from service.host_names import HostNames, connect
from service.sessions.redis_answers import Exchange, InvalidAnswer
from service.sessions.redis_url import Address, Login, RedisUrl

Command = tuple[Any, ...]
# Runs commands on a connection to an address and returns their answers. The last argument: each after ASKING.
Runner = Callable[[Address, Sequence[Command], bool], list[Any]]

_MIN_VERSION = 7  # older servers refuse the flag of the scripts (redis_server.py)
_MAX_REDIRECTIONS = 5
_MAX_NODES = 1000  # of a cluster; Redis itself recommends no more
_MAX_HOST_CHARS = 255
_DISCOVERY_TIMEOUTS = 4  # times the limit of an answer: how long the nodes of a cluster are tried in turn
_HANGING_S = 5.0  # until a Sentinel that did not answer in time is asked again
_UNKNOWN_SERVICE = "the Sentinels in GRU_SERVE_SESSION_STORE watch no master of the name in it: correct the name"
_NO_SENTINEL = "an address in GRU_SERVE_SESSION_STORE is no Sentinel's: correct the address, or the scheme"
_SENTINEL_REFUSES = "correct sentinel_username and sentinel_password in GRU_SERVE_SESSION_STORE"
_HAS_GAPS = "the cluster in GRU_SERVE_SESSION_STORE has slots that no master serves: see CLUSTER INFO of its nodes"
_OTHER_NAME = (
    "the certificate of the server in GRU_SERVE_SESSION_STORE has another name: correct the name in the URL or the "
    "certificate, or set ssl_check_hostname=false"
)
_NOT_SIGNED = (
    "the certificate of the server in GRU_SERVE_SESSION_STORE is not valid, or not signed by an authority in "
    "ssl_ca_certs: correct either"
)
_REFUSED = (
    "the server in GRU_SERVE_SESSION_STORE closes the connection, probably because it refuses this client's "
    "certificate or its lack: give ssl_certfile and ssl_keyfile that are signed by an authority which the server trusts"
)
_NO_TLS = (
    "the server in GRU_SERVE_SESSION_STORE speaks no TLS there: write redis instead of rediss, or correct the port"
)


class Unsuitable(errors.ConnectionError):
    """The server can't store sessions. The message says why, and what to do."""


class TlsFailure(errors.ConnectionError):
    """A connection could not be made because of TLS. The message says why, and what to do."""


class Script:
    """A script in Lua. A server that does not have it yet gets it at its first call."""

    def __init__(self, text: str) -> None:
        self.text, self.digest = text, sha1(text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *arguments: Any) -> Command:
        """Return the command that runs it."""
        return "EVALSHA", self.digest, len(keys), *keys, *arguments


@contextmanager
def reading_answers() -> Iterator[None]:
    """Raise InvalidAnswer for an answer of another form than the block reads."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InvalidAnswer("the server answers with something else than Redis does") from error


class _TcpConnection(Connection):
    """redis-py's connection, but to look up the host and to connect take no longer than their limits.

    redis-py sets no limit to the look-up, and one for each of the host's addresses.
    """

    def __init__(self, *, names: HostNames, timeout_s: float, ends_at: float, **options: Any) -> None:
        super().__init__(socket_timeout=timeout_s, **options)  # type: ignore[no-untyped-call] # it declares no types
        self._names, self._timeout_s, self._ends_at = names, timeout_s, ends_at

    def _connect(self) -> socket.socket:
        places = self._names.places(self.host, self.port)
        sock = connect(places, min(self._ends_at, time.monotonic() + self._timeout_s))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in self.socket_keepalive_options.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.settimeout(max(0.001, min(self._timeout_s, self._ends_at - time.monotonic())))
        except OSError:
            sock.close()
            raise
        return sock


class _TlsConnection(SSLConnection, _TcpConnection):
    """The same, with TLS."""


class Link:
    """A connection to one server, for one thread at a time. An error closes it, but not one that the server answers.

    Args:
        connection: Of redis-py, whose parser is an Exchange.
        scripts: Texts by digest.
        timeout_s: How long an exchange may take, beside the time that large texts take.
    """

    def __init__(self, connection: Any, scripts: dict[str, str], timeout_s: float) -> None:
        self._connection, self._scripts, self._timeout_s = connection, scripts, timeout_s
        self.first_answers: list[Any] = []  # to the commands that were sent when the connection was made
        self.change, self.run_id = 0, b""  # for RedisServer

    def run(self, commands: Sequence[Command], is_asking: bool = False, *, ends_at: float = math.inf) -> list[Any]:
        """Run commands in one round trip. Return their answers: a RedisError for each that the server refused.

        Raises ConnectionError or TimeoutError if the connection broke. Some commands may have been done then.

        Args:
            commands: What to run.
            is_asking: Each is for a key that a cluster is about to move to this node.
            ends_at: When the round trip has to end at the latest, monotonic.
        """
        answers = self._exchange(commands, is_asking, ends_at)
        unknown = [number for number, answer in enumerate(answers) if isinstance(answer, errors.NoScriptError)]
        if unknown:
            digests = {commands[number][1] for number in unknown}
            without_errors(self._exchange([("SCRIPT", "LOAD", self._scripts[one]) for one in digests], False, ends_at))
            repeated = self._exchange([commands[number] for number in unknown], is_asking, ends_at)
            for number, answer in zip(unknown, repeated, strict=True):
                answers[number] = answer
        return answers

    def require(self, commands: Sequence[Command], *, ends_at: float = math.inf) -> list[Any]:
        """Run commands, and raise the first error that is among the answers."""
        return without_errors(self.run(commands, ends_at=ends_at))

    def info(self, *sections: str) -> dict[bytes, bytes]:
        """Return what INFO answers. Raises RedisError."""
        return facts(*self.require([("INFO", *sections)]))

    def is_closed(self) -> bool:
        """Whether a connection that no thread uses was closed at its other end, or has an answer that nobody waits for.

        A command sent on it may have an unknown outcome.
        """
        sock = self._connection._sock
        if sock is None:
            return True
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))  # from a connection that is idle and open nothing can be read

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _exchange(self, commands: Sequence[Command], is_asking: bool, ends_at: float) -> list[Any]:
        connection, exchange = self._connection, self._connection._parser
        sent = [part for command in commands for part in (("ASKING",), command)] if is_asking else commands
        try:
            exchange.begin(self._timeout_s, ends_at)
            exchange.send(b"".join(connection.pack_commands(sent)))
            answers = [exchange.read_response() for _ in sent]
            if exchange.has_more():  # so which answer belongs to which command?
                raise InvalidAnswer("the server answers more than it was sent")
        except BaseException:
            self.close()
            raise
        return answers[1::2] if is_asking else answers


class _Topology(Protocol):
    """Knows where the masters are."""

    def discover(self, elsewhere: bool, /) -> list[Address]:
        """See RedisConnections."""

    def address_of(self, key: str, /) -> Address:
        """Return the address of the master that has a key, as it was discovered last."""

    def note_moved(self, slot: int, address: Address) -> None:
        """Note that a node named another one for a slot."""

    def close(self) -> None:
        """Close the connections that it has."""


class RedisConnections:
    """Connects to the masters of a URL, and sends each command to the one that has its key.

    Args:
        url: Where the servers are.
        timeout_s: How long a name server may take to name a host's addresses, and a server to accept a connection, and
            for an answer.
        scripts: Scripts that commands may call.
    """

    def __init__(self, url: RedisUrl, timeout_s: float, scripts: Iterable[Script] = ()) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._scripts = {script.digest: script.text for script in scripts}
        self._names = HostNames(timeout_s)
        self._topology: _Topology
        if url.kind == "sentinel":
            self._topology = _Sentinels(url, self._connect)
        elif url.kind == "cluster":
            self._topology = _Cluster(url, self._connect, timeout_s)
        else:
            self._topology = _OneServer(url.addresses[0])

    def discover(self, *, elsewhere: bool = False) -> list[Address]:
        """Find out where the masters are, and return their addresses. For one thread at a time. Raises RedisError.

        elsewhere: What was discovered last doesn't work, so do not rely on the cluster node that said it.
        """
        return self._topology.discover(elsewhere)

    def connect(self, address: Address, *first: Command, ends_at: float = math.inf) -> Link:
        """Return a new connection to a server. Raises RedisError.

        Args:
            address: Where the server is.
            first: Commands that are sent together with the login: see `Link.first_answers`.
            ends_at: When all this has to end at the latest, monotonic.
        """
        return self._connect(address, self._url.login, self._url.db, first, ends_at)

    def address_of(self, key: str) -> Address:
        """Return the address of the master that has a key. Asks nobody. Raises ConnectionError if none is known."""
        return self._topology.address_of(key)

    def execute(self, commands: Sequence[Command], run: Runner) -> list[Any]:
        """Run commands, each with a key, on the masters that have the keys; in one round trip for each master.

        Return their answers: a RedisError for each that was refused. Raises what `run` raises.
        """
        answers: list[Any] = [None] * len(commands)
        pending: dict[tuple[Address, bool], list[int]] = {}
        for number, command in enumerate(commands):
            pending.setdefault((self.address_of(_key(command)), False), []).append(number)
        for _ in range(1 + _MAX_REDIRECTIONS):
            redirected: dict[tuple[Address, bool], list[int]] = {}
            for (address, is_asking), numbers in pending.items():
                results = run(address, [commands[number] for number in numbers], is_asking)
                for number, answer in zip(numbers, results, strict=True):
                    answers[number] = answer
                    # The class of MOVED is a subclass of that of ASK.
                    if isinstance(answer, errors.AskError) and self._url.kind == "cluster":
                        if not 0 <= answer.slot_id < REDIS_CLUSTER_HASH_SLOTS:
                            raise InvalidAnswer("a node names a slot that does not exist")
                        # The host is left out if it is that of the node that answers.
                        target = (answer.node_addr[0].strip("[]") or address[0], answer.node_addr[1])
                        is_moved = isinstance(answer, errors.MovedError)
                        if is_moved:
                            self._topology.note_moved(answer.slot_id, target)
                        redirected.setdefault((target, not is_moved), []).append(number)
            if not redirected:
                break
            pending = redirected
        return answers

    def require_suitable(self, info: dict[bytes, bytes]) -> None:
        """Raise Unsuitable, with advice, if a server is not what the URL says, or can't store sessions.

        info: What it answers to `INFO server`. Valkey has other names for some fields.
        """
        version = info.get(b"redis_version", b"0")[:20].decode(errors="replace")
        mode = info.get(b"redis_mode", info.get(b"server_mode", b"standalone"))
        if mode == b"sentinel":
            raise Unsuitable(
                "GRU_SERVE_SESSION_STORE leads to a Sentinel: write redis+sentinel://host:port,host:port/service"
            )
        if mode == b"cluster" and self._url.kind != "cluster":
            raise Unsuitable(
                "GRU_SERVE_SESSION_STORE leads to a node of a Redis Cluster: write redis+cluster://host:port,host:port"
            )
        if mode != b"cluster" and self._url.kind == "cluster":
            raise Unsuitable("GRU_SERVE_SESSION_STORE leads to a server without a cluster: write redis://host:port/0")
        major = re.match("[0-9]{1,9}", version)
        if major is None or int(major[0]) < _MIN_VERSION:
            raise Unsuitable(
                f"the server in GRU_SERVE_SESSION_STORE is Redis {version}: sessions need Redis 7 or later"
            )
        if not info.get(b"run_id"):
            raise Unsuitable(
                "the server in GRU_SERVE_SESSION_STORE doesn't say its run_id in INFO: let it, or use another"
            )

    def close(self) -> None:
        """Close the connections to Sentinels and to cluster nodes by which masters are discovered."""
        self._topology.close()

    def _connect(
        self,
        address: Address,
        login: Login,
        db: int = 0,
        first: Sequence[Command] = (),
        ends_at: float = math.inf,
    ) -> Link:
        options: dict[str, Any] = {
            "parser_class": Exchange,
            "protocol": 2,
            "driver_info": None,
            # Nothing is sent but what `_login` returns: no HELLO, CLIENT SETINFO, CLIENT MAINT_NOTIFICATIONS.
            "redis_connect_func": lambda connection: connection._parser.on_connect(connection),
        }
        connect: Any
        if self._url.kind == "unix":
            connect, options["path"] = UnixDomainSocketConnection, address[0]
            options["socket_timeout"] = options["socket_connect_timeout"] = self._timeout_s
        else:
            connect = _TcpConnection
            options |= {"names": self._names, "timeout_s": self._timeout_s, "ends_at": ends_at}
            options["host"], options["port"] = address
            if (tls := self._url.tls) is not None:
                connect = _TlsConnection
                options["ssl_ca_certs"], options["ssl_check_hostname"] = tls.ca_certs, tls.check_hostname
                options["ssl_certfile"], options["ssl_keyfile"] = tls.certfile, tls.keyfile
        connection = connect(**options)
        try:
            connection.connect()
            if self._url.tls is None:
                _time_out_in_kernel(connection._sock, self._timeout_s)
            link = Link(connection, self._scripts, self._timeout_s)
            before = _login(login, db)
            link.first_answers = link.require([*before, *first], ends_at=ends_at)[len(before) :]
        except errors.RedisError as error:
            connection.disconnect()
            if self._url.tls is not None and not error.status_code and (advice := _tls_advice(error)):
                raise TlsFailure(advice) from error
            raise
        return link


def _login(login: Login, db: int) -> list[Command]:
    """Return the commands with which a connection begins, which servers and users' permissions have to allow."""
    commands: list[Command] = [("CLIENT", "SETNAME", "gru-serve")]
    if login.password is not None or login.username is not None:
        user = (login.username,) if login.username is not None else ()
        commands.insert(0, ("AUTH", *user, login.password or ""))
    if db:
        commands.append(("SELECT", db))
    return commands


def _time_out_in_kernel(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel limit how long the calls of a socket wait.

    With Python's time-outs each call is two system calls, and releases the interpreter's lock for both: a busy server
    waits for it longer than for Redis. TLS needs Python's.
    """
    seconds, microseconds = divmod(round(timeout_s * 1e6), 10**6)
    sock.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))


class _OneServer:
    """One server, whose address never changes."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def discover(self, _elsewhere: bool) -> list[Address]:
        return [self._address]

    def address_of(self, _key: str) -> Address:
        return self._address

    def note_moved(self, slot: int, address: Address) -> None:
        """Never called: execute follows no redirection that a single server gives."""

    def close(self) -> None:
        """It has no connections."""


class _Sentinels:
    """The master that Sentinels name."""

    def __init__(self, url: RedisUrl, connect: Callable[[Address, Login], Link]) -> None:
        self._url, self._connect = url, connect
        self._links: dict[Address, Link] = {}
        self._master: Address | None = None
        self._hanging: dict[Address, float] = {}  # Sentinels that let time run out, with the time to ask them again
        # All at once, for the same thread renews leases.
        self._threads = ThreadPoolExecutor(len(url.addresses), thread_name_prefix="sentinels")

    def discover(self, _elsewhere: bool) -> list[Address]:
        """Ask all Sentinels. Those that have not heard of the last failover yet have a lower epoch."""
        now = time.monotonic()
        awake = [address for address in self._url.addresses if self._hanging.get(address, 0) <= now]
        answers = list(self._threads.map(self._ask, awake or self._url.addresses))
        found = [answer for answer in answers if not isinstance(answer, errors.RedisError)]
        if not found:
            # What a Sentinel that answers says is more useful than that another one can't be reached.
            raise min(
                (answer for answer in answers if isinstance(answer, errors.RedisError)),
                key=lambda error: not isinstance(error, Unsuitable),
            )
        _, self._master = max(found, key=lambda answer: answer[0])
        return [self._master]

    def address_of(self, _key: str) -> Address:
        if self._master is None:
            raise errors.ConnectionError("no Sentinel has named a master yet")
        return self._master

    def note_moved(self, slot: int, address: Address) -> None:
        """Never called: see _OneServer."""

    def close(self) -> None:
        self._threads.shutdown()
        for link in self._links.values():
            link.close()

    def _ask(self, sentinel: Address) -> tuple[int, Address] | errors.RedisError:
        """Return the epoch and the master of a Sentinel, or why it has none."""
        link = self._links.pop(sentinel, None)
        try:
            if link is not None and not link.is_closed():
                try:
                    return self._named(sentinel, link)
                except errors.ConnectionError:
                    pass  # the Sentinel may have restarted
            if link is not None:
                link.close()
            link = self._connect(sentinel, self._url.sentinel_login)
            return self._named(sentinel, link)
        except errors.RedisError as error:
            if link is not None:
                link.close()
            if isinstance(error, errors.TimeoutError):
                self._hanging[sentinel] = time.monotonic() + _HANGING_S
            if isinstance(error, errors.AuthenticationError | errors.NoPermissionError):
                return Unsuitable(_SENTINEL_REFUSES)
            return error

    def _named(self, sentinel: Address, link: Link) -> tuple[int, Address]:
        state, address = link.run(
            [
                ("SENTINEL", "MASTER", self._url.service),
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.service),
            ]
        )
        for answer in (state, address):
            if isinstance(answer, errors.AuthenticationError | errors.NoPermissionError):
                raise answer
            if isinstance(answer, errors.ResponseError):
                raise Unsuitable(_NO_SENTINEL if "unknown command" in str(answer) else _UNKNOWN_SERVICE)
        if address is None:
            raise Unsuitable(_UNKNOWN_SERVICE)
        with reading_answers():
            found = dict(zip(state[::2], state[1::2], strict=True))
            named = int(found.get(b"config-epoch", 0)), _address(*address)
        self._links[sentinel] = link
        return named


class _Cluster:
    """The masters of a cluster.

    One node is asked for the slots as long as its answer works; then another one.
    """

    def __init__(self, url: RedisUrl, connect: Callable[[Address, Login], Link], timeout_s: float) -> None:
        self._url, self._connect, self._timeout_s = url, connect, timeout_s
        self._asked: tuple[Address, Link] | None = None
        self._answer: Any = None  # what was read last, and from which node
        self._nodes = list(url.addresses)  # masters and replicas; the one to ask next is the first
        self._masters: list[Address] = []
        self._slots: list[Address] = []  # the master of each slot

    def discover(self, elsewhere: bool) -> list[Address]:
        """Ask a node for the slots. Raises Unsuitable if no node knows a master for each."""
        if self._asked is not None:
            address, link = self._asked
            with suppress(errors.ConnectionError, errors.TimeoutError):
                if not elsewhere and not link.is_closed() and self._read(address, link):
                    return self._masters
            link.close()
            self._asked = None
            self._ask_later(address)
        failure: errors.RedisError = Unsuitable(_HAS_GAPS)
        ends_at = time.monotonic() + _DISCOVERY_TIMEOUTS * self._timeout_s
        for address in list(self._nodes):
            if time.monotonic() > ends_at:
                break  # the same thread renews leases: the other nodes are tried the next time
            self._ask_later(address)
            try:
                link = self._connect(address, self._url.login)
            except errors.RedisError as error:
                failure = error
                continue
            try:
                if self._read(address, link):
                    self._asked = address, link
                    return self._masters
            except errors.RedisError as error:
                failure = error
            link.close()
        raise failure

    def _ask_later(self, address: Address) -> None:
        if address in self._nodes:
            self._nodes.remove(address)
        self._nodes.append(address)

    def address_of(self, key: str) -> Address:
        if not self._slots:
            raise errors.ConnectionError("no node of the cluster has answered yet")
        return self._slots[key_slot(key.encode())]

    def note_moved(self, slot: int, address: Address) -> None:
        self._slots[slot] = address
        self._answer = None  # so that the next one is read, even if it is the same

    def close(self) -> None:
        if self._asked is not None:
            self._asked[1].close()

    def _read(self, asked: Address, link: Link) -> bool:
        """Ask a node; return whether it knows a master for each slot."""
        (answer,) = link.run([("CLUSTER", "SLOTS")])
        if isinstance(answer, errors.ResponseError):
            if "cluster support disabled" in str(answer):
                raise Unsuitable(
                    "GRU_SERVE_SESSION_STORE leads to a server without a cluster: write redis://host:port/0"
                )
            raise answer
        if (asked, answer) == self._answer:
            return True
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        nodes: dict[Address, None] = {}  # in order
        with reading_answers():
            for first, last, *places in answer:
                if not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS:
                    raise InvalidAnswer("a node names slots that do not exist")
                # The host is left out if it is that of the node that answers.
                found = [_address(host or asked[0].encode(), port) for host, port, *_ in places]
                slots[first : last + 1] = [found[0]] * (last + 1 - first)
                nodes.update(dict.fromkeys(found))
                if len(nodes) > _MAX_NODES:
                    raise InvalidAnswer("a node names too many others")
        known = [address for address in slots if address is not None]
        if len(known) < REDIS_CLUSTER_HASH_SLOTS:
            return False
        self._slots, self._masters, self._answer = known, list(dict.fromkeys(known)), (asked, answer)
        self._nodes = list(dict.fromkeys([asked, *nodes, *self._url.addresses]))
        return True


def _address(host: bytes, port: int | bytes) -> Address:
    """Return an address that a server names. Raises ValueError."""
    number = int(port)
    if not 0 < number < 2**16 or not 0 < len(host) <= _MAX_HOST_CHARS:
        raise ValueError("no address")
    return host.decode(), number


def facts(answer: Any) -> dict[bytes, bytes]:
    """Return what is in an answer to INFO."""
    lines = answer.splitlines() if isinstance(answer, bytes) else []
    return dict(line.split(b":", 1) for line in lines if b":" in line)


def without_errors(answers: list[Any]) -> list[Any]:
    """Return answers, or raise the first error that is among them."""
    for answer in answers:
        if isinstance(answer, errors.RedisError):
            raise answer
    return answers


def _tls_advice(error: BaseException) -> str | None:
    """Return what to do about a connection that could not be made, if the reason is TLS."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError | ConnectionResetError | BrokenPipeError):
        if isinstance(cause, TimeoutError) and "handshake" in str(cause):
            return _NO_TLS
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if isinstance(cause, ssl.SSLCertVerificationError):
        is_other_name = cause.verify_code in (62, 64)  # OpenSSL's codes for another host name and another address
        return _OTHER_NAME if is_other_name else _NOT_SIGNED
    # In TLS 1.3 the client has finished its handshake when the server refuses its certificate, and may only find that
    # the connection is closed.
    if not isinstance(cause, ssl.SSLError) or isinstance(cause, ssl.SSLEOFError):
        return _REFUSED
    return _REFUSED if "ALERT" in (cause.reason or "") else _NO_TLS


def _key(command: Command) -> str:
    key: str = command[3] if command[0] == "EVALSHA" else command[1]
    return key
