"""Requests that no row of the engine can represent: each is refused alone, and the real server serves all others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from service.arrays import MAX_POSITION
from service.registry.loaded_models import LoadedModel
from service.sessions.portable import StateHeader, StateSealer
from service.store.model_store import ModelStore
from tests.harness.models import engine_settings, publish_tiny
from tests.harness.server import KEYS, SERVE, Server, serving

_RACING_S = 2.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """`tiny@1`, and `few@1`, which knows three of its characters."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store)
    publish_tiny(store, "few", charset=" ab")
    return store


@pytest.fixture(scope="module")
def server(store: ModelStore) -> Iterator[Server]:
    with serving(SERVE, {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "tiny"}) as server:
        yield server


def require_alive(server: Server) -> None:
    """Check that the engines of both models compute, and that none has ever failed."""
    for model in ("tiny", "few"):
        assert server.call("POST", "/v1/completions", {"model": model, "prompt": "ab", "max_tokens": 5})[0] == 200
    assert server.is_ready()
    assert not server.logged("the engine failed")
    assert not server.logged("texts can't be computed")
    assert not server.logged("unforeseen error")


def test_generate__biases_belong_to_the_model_that_the_lease_gives(server: Server) -> None:
    """Another caller moves the session to a model with fewer characters while this one's biases get their ids."""
    assert server.call("PUT", "/v1/sessions/moving", {"text": "ab ab"})[0] == 201
    answers: list[tuple[int, Any]] = []
    deadline = time.monotonic() + _RACING_S

    def move() -> None:
        while time.monotonic() < deadline:
            for model in ("few", "tiny"):
                server.call("POST", "/v1/sessions/moving/feed", {"text": "", "rebase": model, "num_next": 1})

    def generate() -> None:
        while time.monotonic() < deadline:
            body = {"max_tokens": 2, "logit_bias": {"z": -100.0, "a": 100.0}}
            answers.append(server.call("POST", "/v1/sessions/moving/generate", body))

    threads = [threading.Thread(target=target) for target in (move, move, generate, generate, generate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {status for status, _ in answers}
    assert statuses <= {200, 400, 409}, statuses
    assert {error["error"]["code"] for status, error in answers if status == 400} <= {"unknown_characters"}
    assert {answer["text"] for status, answer in answers if status == 200} <= {"aa"}
    assert 200 in statuses
    require_alive(server)


def test_state__at_the_end_of_all_positions_is_refused_alone(server: Server, store: ModelStore) -> None:
    model = LoadedModel(*store.load("tiny@1"), engine_settings())
    sealer, hidden = StateSealer(list(KEYS.values())), np.zeros(model.state_shape, np.float32)

    def create(position: int) -> tuple[int, Any]:
        header = StateHeader.model_construct(
            model="tiny@1", identity=model.identity, position=position, seed=1, expires_at=None
        )
        state = sealer.seal(header, hidden)
        return server.call("POST", "/v1/sessions", {"state": state})

    for position in (2**63 - 1, 2**63, MAX_POSITION + 1, -1):
        status, answer = create(position)
        assert (status, answer["error"]["code"]) == (400, "invalid_state")
    status, session = create(MAX_POSITION - 5)
    assert status == 201
    path = f"/v1/sessions/{session['id']}"
    for route, body in (("feed", {"text": "abcdef"}), ("generate", {"max_tokens": 6})):
        status, answer = server.call("POST", f"{path}/{route}", body)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "out_of_range", "position")
    assert server.call("POST", f"{path}/generate", {"max_tokens": 5})[0] == 200
    assert server.call("GET", path)[1]["position"] == MAX_POSITION
    assert server.call("POST", f"{path}/feed", {"text": "a"})[0] == 400
    assert server.call("POST", f"{path}/feed", {"text": "", "num_next": 2})[0] == 200
    require_alive(server)
