"""POST /admin/reload, and the versions that requests get before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of
from tests.harness.models import publish_tiny

KEY, ENTRY = new_key("operator")


@contextmanager
def operated(store: Path) -> Iterator[FlaskClient]:
    """A client that sends the operator's key, of an application that does not poll for new versions."""
    settings = Settings(model_store=store, model="tiny", model_poll_s=0, api_keys=SecretStr(ENTRY))
    with client_of(settings, KEY) as client:
        yield client


def completed_by(client: FlaskClient, **body: object) -> str:
    """The version that answers a completion."""
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | body)
    assert answer.status_code == 200, answer.text
    model: str = answer.get_json()["model"]
    return model


def test_reload__of_a_broken_version_keeps_serving_the_old_one(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    with operated(tmp_path) as client:
        publish_tiny(store, seed=1)
        (tmp_path / "tiny" / "2" / "model.safetensors").write_bytes(b"")
        answer = client.post("/admin/reload", json={})
        assert answer.status_code == 200
        assert answer.get_json() == {
            "data": [{"name": "tiny", "model": "tiny@1", "failed": "tiny@2", "code": "invalid_artifact"}]
        }
        assert client.get("/readyz").status_code == 200
        assert completed_by(client) == completed_by(client, model="tiny") == "tiny@1"
        named = client.post("/v1/completions", json={"prompt": "a", "model": "tiny@2"})
        assert (named.status_code, named.get_json()["error"]["code"]) == (503, "invalid_artifact")
        assert client.get("/v1/models/tiny").get_json()["meta"]["version"] == "tiny@1"
        assert client.put("/v1/sessions/a", json={}).get_json()["model"] == "tiny@1"


def test_session__keeps_its_version_after_a_reload(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    with operated(tmp_path) as client:
        for name in ("a", "twin"):
            client.put(f"/v1/sessions/{name}", json={"text": "ROMEO:", "seed": 7})
        body = {"max_tokens": 50}
        text = client.post("/v1/sessions/twin/generate", json=body).get_json()["text"]
        publish_tiny(store, seed=1)
        assert client.post("/admin/reload", json={}).get_json()["data"][0]["model"] == "tiny@2"
        assert completed_by(client) == "tiny@2"
        assert client.post("/v1/sessions/a/generate", json=body).get_json()["text"] == text
        assert client.get("/v1/sessions/a").get_json()["model"] == "tiny@1"
        assert client.put("/v1/sessions/new", json={}).get_json()["model"] == "tiny@2"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", ""])
def test_reload__without_keys_is_refused_from_any_address(client: FlaskClient, address: str) -> None:
    refused = client.post("/admin/reload", json={}, environ_base={"REMOTE_ADDR": address})
    assert refused.status_code == 403
    assert refused.get_json()["error"]["code"] == "forbidden"


def test_reload__with_keys_needs_a_key_from_any_address(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path))
    with operated(tmp_path) as client:
        for address in ("127.0.0.1", "10.0.0.1"):
            known = {"REMOTE_ADDR": address}
            unknown = known | {"HTTP_AUTHORIZATION": ""}
            assert client.post("/admin/reload", json={}, environ_overrides=unknown).status_code == 401
            assert client.post("/admin/reload", json={}, environ_overrides=known).status_code == 200


def test_reload__accepts_only_an_empty_json_object(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path))
    with operated(tmp_path) as client:
        assert client.post("/admin/reload", json={"model": "x"}).status_code == 400
        assert client.post("/admin/reload", data=b"").status_code == 415  # so a page of another site can't send it
        assert client.get("/admin/reload").status_code == 405
