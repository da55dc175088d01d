"""Refusals that an EventSource waits out: only those that may pass, and only when it reconnects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok

BROWSER = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
RECONNECT = BROWSER | {"Last-Event-ID": "7"}


@pytest.fixture
def client(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    with client_of(Settings(model_store=tiny_store.root, model="tiny", max_streams=1)) as client:
        ok(client.put("/v1/sessions/a", json={"text": "ROMEO:", "seed": 7}), 201)
        body = {"max_tokens": 100}
        ok(client.post("/v1/sessions/a/generate", json=body))
        yield client


def is_empty_stream(response: TestResponse) -> bool:
    with response:
        text = response.get_data(as_text=True)
        is_stream = (response.status_code, response.mimetype) == (200, "text/event-stream")
        return is_stream and text.startswith("retry: 1000\n: ") and "data" not in text


def resume(client: FlaskClient, headers: dict[str, str], path: str = "a/generate") -> TestResponse:
    return client.get(f"/v1/sessions/{path}", headers=headers)


def test_stream__begins_with_its_pause_in_the_block_of_the_first_event(client: FlaskClient) -> None:
    with resume(client, {}) as response:
        assert response.get_data(as_text=True).startswith("retry: 1000\nid: ")
        assert response.get_data(as_text=True).count("retry:") == 1
    with client.post("/v1/completions", json={"prompt": "R", "stream": True}) as response:
        assert response.get_data(as_text=True).startswith("data: ")


def test_reconnect__waits_while_the_client_has_too_many_streams(client: FlaskClient) -> None:
    holder = client.post("/v1/completions", json={"prompt": "R", "max_tokens": 8000, "stream": True}, buffered=False)
    assert is_empty_stream(resume(client, RECONNECT))
    for headers in (BROWSER, {"Last-Event-ID": "7"}, {}):
        with resume(client, headers) as response:
            assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
    holder.close()
    with resume(client, RECONNECT) as response:
        assert "event: done" in response.get_data(as_text=True)
    counted = client.get("/metrics").text
    assert 'http_requests_total{method="GET",route="/v1/sessions/<id>/generate",status="429"} 4.0' in counted


def test_reconnect__waits_while_the_server_drains(client: FlaskClient) -> None:
    client.application.extensions["gru_serve_drain"].begin()
    waiting = resume(client, RECONNECT)
    assert "draining" in waiting.text
    assert is_empty_stream(waiting)
    assert "Retry-After" not in waiting.headers
    with resume(client, BROWSER) as response:
        assert response.status_code == 503
    with client.post("/v1/sessions/a/generate", json={"max_tokens": 5}, headers=RECONNECT) as response:
        assert response.status_code == 503


def test_reconnect__gets_refusals_that_do_not_pass(client: FlaskClient) -> None:
    for path, headers, status in (
        ("unknown/generate", RECONNECT, 404),
        ("a/generate", RECONNECT | {"Last-Event-ID": "99999"}, 409),
        ("a/generate", RECONNECT | {"Last-Event-ID": "x"}, 400),
        ("a", RECONNECT, 200),
    ):
        with resume(client, headers, path) as response:
            assert (response.status_code, response.mimetype) == (status, "application/json")
