"""Looks up the addresses of hosts, and connects to them, within a limited time."""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

# What `connect` of a socket needs: the family, and the address with its port.
Place = tuple[socket.AddressFamily, tuple[Any, ...]]

_KNOWN_SHARE = 0.25  # of the limit is waited for an answer, if the answer before it can be used instead
_MAX_NAMES = 1000  # whose answers are stored
_MAX_LOOK_UPS = 64  # at once: each has a thread, and a cluster may name thousands of hosts that don't exist
# A name server has answered that there is no such name, or that it has no address.
_DEFINITE = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)}


@dataclass(frozen=True)
class _LookUp:
    began: float = field(default_factory=time.monotonic)
    places: Future[list[Place]] = field(default_factory=Future)


class HostNames:
    """Looks up hosts as `socket.getaddrinfo` does, but in `timeout_s` at most.

    The system's function waits for half a minute if a name server does not answer. So it runs on a thread of its own,
    one for each name at a time. If it is too slow, or fails for now, the places that it returned before are used. Any
    thread may call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards the following
        self._running: dict[tuple[str, int], _LookUp] = {}
        self._known: dict[tuple[str, int], list[Place]] = {}

    def places(self, host: str, port: int) -> list[Place]:
        """Return where a host can be reached, best first; at least one place.

        Raises socket.gaierror if the name does not exist, and OSError, such as TimeoutError, if no place is known yet.
        """
        with suppress(socket.gaierror):
            return _ask(host, port, socket.AI_NUMERICHOST)  # an address: nobody has to be asked
        name = host, port
        with self._lock:
            known, look_up = self._known.get(name), self._running.get(name)
            if look_up is None:
                if len(self._running) >= _MAX_LOOK_UPS:
                    if known is not None:
                        return known
                    raise OSError("too many names of hosts are looked up at once")
                look_up = self._running[name] = _LookUp()
                try:
                    threading.Thread(target=self._run, args=(name, look_up), name="look up host", daemon=True).start()
                except RuntimeError as error:  # there are too many threads
                    del self._running[name]
                    look_up.places.set_exception(OSError(str(error)))
        # The limit counts from the beginning of the look-up, so that one which hangs delays only those who began it.
        limit_s = self._timeout_s if known is None else _KNOWN_SHARE * self._timeout_s
        try:
            return look_up.places.result(max(0.0, look_up.began + limit_s - time.monotonic()))
        except OSError as error:
            if known is None or (isinstance(error, socket.gaierror) and error.errno in _DEFINITE):
                raise type(error)(*error.args) from None  # several threads may get the one of the look-up
            return known

    def _run(self, name: tuple[str, int], look_up: _LookUp) -> None:
        places: list[Place] = []
        failure = OSError("the host has no address")
        try:
            places = _ask(*name)
        except OSError as error:
            failure = error
        with self._lock:
            del self._running[name]
            if places:
                if len(self._known) >= _MAX_NAMES:
                    self._known.clear()
                self._known[name] = places
        if places:
            look_up.places.set_result(places)
        else:
            look_up.places.set_exception(failure)


def connect(places: Sequence[Place], ends_at: float) -> socket.socket:
    """Return a connection to the place that accepts first, before a monotonic time. Raises OSError.

    Each place has a share of the time before the next one is tried as well: it may be slow, or silent for ever.
    """
    failure: OSError = TimeoutError("the server did not accept a connection in time")
    poll, pending = select.poll(), dict[int, socket.socket]()
    try:
        for number, (family, place) in enumerate(places):
            share_ends_at = time.monotonic() + max(0.0, ends_at - time.monotonic()) / (len(places) - number)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # this machine has no addresses of this family, or no descriptor left
                failure = error
                continue
            pending[sock.fileno()] = sock
            sock.setblocking(False)
            try:
                sock.connect(place)
            except BlockingIOError:
                pass  # it is under way
            except OSError as error:
                pending.pop(sock.fileno()).close()
                failure = error
                continue
            poll.register(sock, select.POLLOUT)
            while pending and (ready := poll.poll(math.ceil(1000 * max(0.0, share_ends_at - time.monotonic())))):
                for descriptor, _ in ready:
                    poll.unregister(descriptor)
                    sock = pending.pop(descriptor)
                    number_of_error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not number_of_error:
                        return sock
                    sock.close()
                    failure = OSError(number_of_error, os.strerror(number_of_error))
        raise failure
    finally:
        for sock in pending.values():
            sock.close()


def _ask(host: str, port: int, flags: int = 0) -> list[Place]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (ValueError, OverflowError) as error:  # a label is empty or too long, or has a NUL; there is no such port
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    return [(family, place) for family, _, _, _, place in found]
