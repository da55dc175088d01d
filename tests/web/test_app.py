"""`create_app` as a whole: a failure while it builds the application closes what is open (`no_leaks` checks that)."""

from __future__ import annotations

import pytest
from flask import Flask

from service.assembly import Service
from service.errors import InvalidSettings
from service.sessions.session_store import StoreObserver
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web import app


def test_create_app__that_fails_after_the_service_was_opened_closes_it(
    tiny_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_service = Service.open

    def opening(settings: Settings, observer: StoreObserver) -> Service:
        opened.append(open_service(settings, observer))
        return opened[-1]

    def fail(flask_app: Flask, max_body_bytes: int, _budget: object) -> None:
        raise InvalidSettings(f"{flask_app.name} {max_body_bytes}")

    monkeypatch.setattr(Service, "open", opening)
    monkeypatch.setattr(app, "register_body_check", fail)
    with pytest.raises(InvalidSettings):
        app.create_app(Settings(model_store=tiny_store.root, model="tiny"))
    assert len(opened) == 1
