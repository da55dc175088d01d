"""The application in this process, without gunicorn and without a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask.testing import FlaskClient

from service.settings import Settings
from service.web.app import create_app


@contextmanager
def client_of(settings: Settings, key: str | None = None) -> Iterator[FlaskClient]:
    """Return a client of an application, which sends `key` if there is one; its engines end with the block."""
    app = create_app(settings)
    try:
        with app.test_client() as client:
            if key is not None:
                client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
            yield client
    finally:
        app.extensions["gru_serve"].close()


def described(client: FlaskClient) -> dict[str, Any]:
    """Return the API description, which has more values than the application reads from a body."""
    with client.get("/openapi.json") as response:
        description: dict[str, Any] = json.loads(response.get_data(as_text=True))
        return description


def ok(response: Any, status: int = 200) -> Any:
    """Check the status of an answer; return its JSON. Close it, as a server does when it has sent it."""
    with response:
        assert response.status_code == status, response.text
        return response.get_json()


def refused(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Check the status, code and parameter of an error; return the error."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.get_json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    return error
