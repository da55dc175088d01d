"""Where the server listens, and how many files it may open, on systems of every kind."""

from __future__ import annotations

import resource
import socket
import sys
from contextlib import closing

import pytest

from service.errors import AddressUnusable
from service.settings import Settings
from service.web.gunicorn import server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_listen__on_ipv4(host: str) -> None:
    """`localhost` means the IPv4 address where it has both, as before."""
    with closing(server._listen(Settings(host=host, port=0))) as listener:
        assert listener.family == socket.AF_INET


def test_listen__an_unusable_address_is_told_as_urls_write_it() -> None:
    with pytest.raises(AddressUnusable, match=r"can't listen on \[2001:db8::1\]:1 \(.*check --host"):
        server._listen(Settings(host="[2001:db8::1]", port=1))
    with pytest.raises(AddressUnusable, match=r"can't listen on nowhere\.invalid:1 \(.*check --host"):
        server._listen(Settings(host="nowhere.invalid", port=1))


@pytest.mark.parametrize(("platform", "expected"), [("linux", 65_536), ("darwin", 10_240)])
def test_descriptor_limits__are_what_the_system_accepts(
    monkeypatch: pytest.MonkeyPatch, platform: str, expected: int
) -> None:
    """macOS reports no hard limit, and refuses a soft one above OPEN_MAX."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert server._descriptor_limits()[0] == expected
