"""`python -m service.health`: ask the server in this container whether it answers. The image's HEALTHCHECK runs it.

It asks where the server really listens, whichever options and variables it was started with: Linux lists the listening
sockets of every process. It runs every few seconds, so it imports only the standard library, and may import nothing of
this project.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_TIMEOUT_S = 4
_LISTENS = "0A"
_SERVER = re.compile(rb"(?:gru-serve|service(?:/__main__\.py)?)\0serve(?:\0|$)")


def main() -> int:
    """Return 0 if a server of this container answers /healthz, else 1, after saying what is wrong."""
    found = list(addresses())
    if not found:
        sys.stderr.write("no gru-serve listens here\n")
        return 1
    for host, port in found:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/healthz")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            sys.stderr.write(f"{host} port {port}: {error}\n")
            return 1
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            sys.stderr.write(f"{host} port {port}: status {status}\n")
            return 1
    return 0


def addresses(proc: Path = Path("/proc")) -> Iterator[tuple[str, int]]:
    """Yield host and port of each socket on which a `gru-serve serve` of this user listens."""
    seen = set()
    for process in proc.glob("[0-9]*"):
        try:
            if not _SERVER.search((process / "cmdline").read_bytes()):
                continue
            links = [os.readlink(each) for each in (process / "fd").iterdir()]
            tables = [
                (process / "net" / name).read_text() for name in ("tcp", "tcp6") if (process / "net" / name).exists()
            ]
        except OSError:
            continue  # another user's, or it has ended
        inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
        for line in "\n".join(tables).splitlines():
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTENS and fields[9] in inodes and fields[1] not in seen:
                seen.add(fields[1])
                yield _parse(fields[1])


def _parse(address: str) -> tuple[str, int]:
    """Parse an address of /proc/net/tcp: hexadecimal words in the machine's byte order, and a port."""
    words, _, port = address.partition(":")
    packed = b"".join(struct.pack("=I", int(words[place : place + 8], 16)) for place in range(0, len(words), 8))
    host = ipaddress.ip_address(packed)
    if host.is_unspecified:
        return ("127.0.0.1" if host.version == 4 else "::1"), int(port, 16)
    return str(host), int(port, 16)


if __name__ == "__main__":
    sys.exit(main())
