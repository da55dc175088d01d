"""An application with a small model, in the process of the test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of


@pytest.fixture(scope="module")
def client(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of an application with small limits, shared by the tests of a module."""
    settings = Settings(
        model_store=tiny_store.root, model="tiny", max_tokens=500, max_prompt_chars=1000, max_body_bytes=65_536
    )
    handlers, level = list(logging.root.handlers), logging.root.level
    with client_of(settings) as client:
        # A first request, because the engine's thread starts with its first work.
        client.post("/v1/completions", json={"prompt": "z", "max_tokens": 1})
        yield client
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
