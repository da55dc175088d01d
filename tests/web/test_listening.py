"""Where the server listens, how many files it may open, on systems of every kind, and what its worker prepares."""

from __future__ import annotations

import gc
import resource
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import AddressUnusable
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.gunicorn import server
from tests.harness.models import publish_tiny


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


def test_worker__leaves_what_exists_at_its_start_out_of_collections(tmp_path: Path) -> None:
    """A collection of all objects stops every thread for some 60 ms, and a form that is compiled causes one."""
    publish_tiny(ModelStore(tmp_path))
    application = server.Server(Settings(model_store=tmp_path, model="tiny", log_level="error"))
    frozen = gc.get_freeze_count()
    app = application.load()
    try:
        assert gc.get_freeze_count() > frozen + 10_000
    finally:
        gc.unfreeze()
        app.extensions["gru_serve"].close()
