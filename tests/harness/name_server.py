"""A name server that knows one name, with addresses of both kinds."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_TYPES = {1: 4, 28: 6}  # A and AAAA
_HEADER_BYTES = 12


@contextmanager
def name_server(addresses: Sequence[str]) -> Iterator[int]:
    """Answer every name with these addresses, as docker's name server does; yield the UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=_serve, args=(listener, [ipaddress.ip_address(each) for each in addresses]))
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield port
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", ("127.0.0.1", port))
            thread.join()


def _serve(listener: socket.socket, addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
    while True:
        query, client = listener.recvfrom(4096)
        if not query:
            return
        listener.sendto(_answer(query, addresses), client)


def _answer(query: bytes, addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bytes:
    """Return the answer to a query with one question: its header, the question, and a record for each address."""
    end = query.index(b"\0", _HEADER_BYTES) + 5  # after the name: type and class
    (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
    fitting = [each.packed for each in addresses if each.version == _TYPES.get(kind)]
    # The name of each record is a pointer to that of the question.
    records = [struct.pack("!HHHIH", 0xC000 | _HEADER_BYTES, kind, 1, 1, len(packed)) + packed for packed in fitting]
    header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(records), 0, 0)
    return header + query[_HEADER_BYTES:end] + b"".join(records)
