"""The schedule of a drain, on a fake clock; and the requests that a draining application refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.gate.drain import INTERRUPT_S, Drain
from tests.harness.application import client_of
from tests.harness.wait import wait_until


class Clock:
    """A clock that only the test advances."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_drain__before_it_begins_interrupts_nothing() -> None:
    drain = Drain(30, 0, Clock())
    assert not drain.has_begun
    assert not drain.should_interrupt(0)
    assert not drain.is_overdue


def test_drain__without_open_requests_ends_after_the_notice_time() -> None:
    clock = Clock()
    drain = Drain(30, 5, clock)
    drain.begin()
    clock.now += 4.9
    drain.begin()  # a second signal changes nothing
    assert not drain.should_interrupt(0)
    clock.now += 0.1
    assert drain.should_interrupt(0)
    assert not drain.should_interrupt(1)


def test_drain__interrupts_open_requests_shortly_before_its_end() -> None:
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
def test_drain__at_once_interrupts_immediately(begun: bool) -> None:
    clock = Clock()
    drain = Drain(30, 5, clock)
    if begun:
        drain.begin()
        clock.now += 1
    drain.begin(at_once=True)
    assert drain.should_interrupt(1)
    assert not drain.is_overdue  # time remains to save the interrupted runs
    clock.now += INTERRUPT_S
    assert drain.is_overdue


def test_interrupt__runs_callbacks_in_order_and_continues_after_a_failure() -> None:
    drain, called, may_fail = Drain(30, 0), [], threading.Event()

    def fail() -> None:
        may_fail.wait(60)
        called.append("first")
        raise OSError("the disk is gone")

    drain.on_interrupt(fail)
    drain.on_interrupt(lambda: called.append("second"))
    drain.begin()
    drain.interrupt(0)
    drain.interrupt(0)
    assert not drain.is_interrupted
    may_fail.set()
    wait_until(lambda: drain.is_interrupted)
    assert called == ["first", "second"]


def test_interrupt__without_a_thread_to_start_runs_the_callbacks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    called, drain = [], Drain(10, 0)
    drain.on_interrupt(lambda: called.append(threading.current_thread()))
    drain.begin()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    drain.interrupt(0)
    assert called == [threading.current_thread()]
    assert drain.is_interrupted


@pytest.fixture
def draining(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of a draining application that has a session `a`."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        assert client.put("/v1/sessions/a", json={"text": "ROMEO:"}).status_code == 201
        client.application.extensions["gru_serve_drain"].begin()
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("POST", "/v1/completions", {"nonsense": "the body is not validated"}),
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
def test_draining_server__refuses_work_and_changes_nothing(
    draining: FlaskClient, method: str, path: str, body: object
) -> None:
    answer = draining.open(path, method=method, json=body)
    assert answer.status_code == 503
    assert answer.json
    assert answer.json["error"]["code"] == "draining"
    assert int(answer.headers["Retry-After"]) >= 1
    session = draining.get("/v1/sessions/a").json
    assert session
    assert session["position"] == 6
    assert draining.get("/v1/sessions/b").status_code == 404


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/sessions/a", "/v1/sessions/a/text", "/openapi.json"])
def test_draining_server__answers_requests_that_only_read(draining: FlaskClient, path: str) -> None:
    assert draining.get(path).status_code == 200


def test_draining_server__is_not_ready(draining: FlaskClient) -> None:
    answer = draining.get("/readyz")
    assert answer.status_code == 503
    assert answer.json
    assert answer.json["error"]["code"] == "not_ready"
    assert "Retry-After" in answer.headers
    assert draining.get("/nowhere").status_code == 404


def test_draining_server__answers_a_balancer_404_if_that_asks_for_it(draining: FlaskClient) -> None:
    """HAProxy ends the running answers of a server that fails its checks, except of one that answers 404."""
    for path in ("/readyz?unready=404", "/readyz?part=completions&unready=404"):
        answer = draining.get(path)
        assert answer.status_code == 404
        assert answer.json
        assert answer.json["error"]["code"] == "not_ready"
