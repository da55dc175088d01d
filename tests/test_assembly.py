"""`Service.open`: what it builds, what it closes, and that a failure leaves nothing open (`no_leaks` checks that)."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from service.assembly import Service
from service.engine.request import Request
from service.errors import EngineFailed, InvalidSettings, ModelNotFound
from service.generation.inspector import InspectionRequest
from service.generation.session_service import NewSession
from service.sessions.session import SessionKey
from service.settings import Settings
from service.store.model_store import ModelStore


def test_service__connects_its_parts(tiny_store: ModelStore) -> None:
    with Service.open(Settings(model_store=tiny_store.root, model="tiny")) as service:
        assert [model.version.ref for model in service.models.all()] == ["tiny@1"]
        assert service.models.get(service.default_model).stepper is not None
        session, is_new = service.sessions.create("owner", NewSession("a", "tiny", "ROMEO:"))
        assert is_new
        assert service.store.load(SessionKey("owner", "a")).position == session.position == 6
        assert service.inspector.inspect("owner", InspectionRequest(session="a")).text == "ROMEO:"
        service.store.check()


def test_service__closes_engines_and_is_harmless_to_close_again(tiny_store: ModelStore) -> None:
    service = Service.open(Settings(model_store=tiny_store.root, model="tiny"))
    model = service.models.get("tiny")
    request = Request(model.charset.encode("R"), 1, 0)
    model.engine.submit([request])[0].wait()
    service.close()
    service.close()
    with pytest.raises(EngineFailed):
        model.engine.submit([request])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "nope"}, ModelNotFound),
        ({"session_store": SecretStr("redis://127.0.0.1:notaport/0")}, InvalidSettings),
        ({"model": "nope", "session_store": SecretStr("redis://127.0.0.1:1/0")}, ModelNotFound),
    ],
)
def test_service__that_can_not_be_opened_leaves_nothing_open(
    tiny_store: ModelStore, changes: dict[str, object], error: type[Exception]
) -> None:
    settings = Settings(model_store=tiny_store.root, model="tiny").model_copy(update=changes)
    with pytest.raises(error):
        Service.open(settings)


def test_service__signs_states_with_the_configured_keys(tiny_store: ModelStore) -> None:
    """Without keys each process has a random one, and does not accept the states of others."""
    settings = Settings(model_store=tiny_store.root, model="tiny", state_keys=SecretStr("0123456789abcdef"))
    with Service.open(settings) as first:
        first.sessions.create("", NewSession("a", "tiny", "ROMEO:"))
        state, _ = first.sessions.export(SessionKey("", "a"), 60.0)
    with Service.open(settings) as second:
        session, _ = second.sessions.create("", NewSession("b", None, state=state))
        assert session.position == 6
