"""The plan of a shutdown, on a clock of its own; and what an application that drains refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.drain import INTERRUPT_S, Drain
from tests.harness.application import client_of
from tests.harness.wait import wait_until


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_cut_before_it_begins() -> None:
    drain = Drain(30, 0, Clock())
    assert not drain.has_begun
    assert not drain.should_interrupt(0)
    assert not drain.is_overdue


def test_who_has_nothing_to_do_goes_when_everybody_could_notice() -> None:
    clock = Clock()
    drain = Drain(30, 5, clock)
    drain.begin()
    clock.now += 4.9
    drain.begin()  # a second signal changes nothing
    assert not drain.should_interrupt(0)
    clock.now += 0.1
    assert drain.should_interrupt(0)
    assert not drain.should_interrupt(1)


def test_work_has_nearly_all_the_time() -> None:
    clock = Clock()
    drain = Drain(30, 5, clock)
    drain.begin()
    clock.now += 30 - INTERRUPT_S - 0.1
    assert not drain.should_interrupt(1)
    clock.now += 0.1
    assert drain.should_interrupt(1)
    assert not drain.is_overdue
    clock.now += INTERRUPT_S
    assert drain.is_overdue


@pytest.mark.parametrize("begun", [False, True])
def test_at_once_is_at_once(begun: bool) -> None:
    clock = Clock()
    drain = Drain(30, 5, clock)
    if begun:
        drain.begin()
        clock.now += 1
    drain.begin(at_once=True)
    assert drain.should_interrupt(1)
    assert not drain.is_overdue  # what is cut off can still be saved
    clock.now += INTERRUPT_S
    assert drain.is_overdue


def test_what_ends_work_is_called_in_order_and_one_failure_stops_no_other() -> None:
    drain, called, hold = Drain(30, 0), [], threading.Event()

    def fail() -> None:
        hold.wait(20)
        called.append("first")
        raise OSError("the disk is gone")

    drain.on_interrupt(fail)
    drain.on_interrupt(lambda: called.append("second"))
    drain.begin()
    drain.interrupt(0)
    drain.interrupt(0)
    assert not drain.is_interrupted
    hold.set()
    wait_until(lambda: drain.is_interrupted)
    assert called == ["first", "second"]


@pytest.fixture
def draining(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of an application that has a session `a`, and drains."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        assert client.put("/v1/sessions/a", json={"text": "ROMEO:"}).status_code == 201
        client.application.extensions["gru_serve_drain"].begin()
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("POST", "/v1/completions", {"nonsense": "refused all the same: nobody looks at it"}),
        ("PUT", "/v1/sessions/b", {"text": "a"}),
        ("POST", "/v1/sessions", {}),
        ("POST", "/v1/sessions/a/feed", {"text": "a"}),
        ("POST", "/v1/sessions/a/generate", {}),
        ("GET", "/v1/sessions/a/generate", None),
        ("POST", "/v1/sessions/a/rewind", {"position": 1}),
        ("POST", "/v1/sessions/a/fork", {}),
        ("GET", "/v1/sessions/a/state", None),
        ("DELETE", "/v1/sessions/a", None),
    ],
)
def test_work_is_refused_and_nothing_is_done(draining: FlaskClient, method: str, path: str, body: object) -> None:
    answer = draining.open(path, method=method, json=body)
    assert answer.status_code == 503
    assert answer.json
    assert answer.json["error"]["code"] == "draining"
    assert int(answer.headers["Retry-After"]) >= 1
    shown = draining.get("/v1/sessions/a").json
    assert shown
    assert shown["position"] == 6
    assert draining.get("/v1/sessions/b").status_code == 404


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/models", "/v1/sessions", "/v1/sessions/a", "/v1/sessions/a/text", "/openapi.json"]
)
def test_what_costs_nothing_is_answered(draining: FlaskClient, path: str) -> None:
    assert draining.get(path).status_code == 200


def test_it_is_not_ready(draining: FlaskClient) -> None:
    answer = draining.get("/readyz")
    assert answer.status_code == 503
    assert answer.json
    assert answer.json["error"]["code"] == "not_ready"
    assert "Retry-After" in answer.headers
    assert draining.get("/nowhere").status_code == 404
