"""The files that deploy the server fit each other and the code: settings, metrics, and who waits for whom."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.server import gunicorn_config
from tests.harness.application import client_of
from tests.harness.balancer import CONFIGURATION

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
KUBERNETES = "\n".join(path.read_text() for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")))
FILES = {"compose": COMPOSE, "kubernetes": KUBERNETES, "Dockerfile": (ROOT / "Dockerfile").read_text()}
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "gru-serve.json").read_text())


def number(pattern: str, text: str) -> float:
    """The one number that a pattern finds."""
    (found,) = re.findall(pattern, text)
    return float(found)


@pytest.mark.parametrize("name", FILES)
def test_every_setting_that_is_named_exists(name: str) -> None:
    named = set(re.findall(r"GRU_SERVE_([A-Z_]+)", FILES[name]))
    assert named
    assert named <= {field.upper() for field in Settings.model_fields}


def drain_of(text: str) -> tuple[float, float]:
    """The time to drain and the notice that are set."""
    return (
        number(r'GRU_SERVE_DRAIN_S(?::|, value:) "(\d+)"', text),
        number(r'GRU_SERVE_DRAIN_NOTICE_S(?::|, value:) "(\d+)"', text),
    )


def test_who_waits_for_a_server_waits_longer_than_it_takes() -> None:
    for text in (COMPOSE, KUBERNETES):
        drain_s, notice_s = drain_of(text)
        takes_s = gunicorn_config(Settings(drain_s=int(drain_s), drain_notice_s=notice_s))["graceful_timeout"]
        if text is COMPOSE:
            given_s = number(r"stop_grace_period: (\d+)s  # longer than GRU_SERVE_DRAIN_S", text)
        else:
            app = (ROOT / "deploy" / "kubernetes" / "app.yaml").read_text()
            given_s = number(r"terminationGracePeriodSeconds: (\d+)", app)
            takes_s += number(r'command: \["sleep", "(\d+)"\]', app)
        assert given_s > takes_s
    stops_s = number(r"hard-stop-after (\d+)s", CONFIGURATION.read_text())
    assert number(r"stop_signal: SIGUSR1.*\n +stop_grace_period: (\d+)s", COMPOSE) > stops_s
    assert number(r"terminationGracePeriodSeconds: (\d+)", _balancer()) > stops_s + 5


def _balancer() -> str:
    return (ROOT / "deploy" / "kubernetes" / "balancer.yaml").read_text()


def test_a_balancer_has_noticed_before_a_server_ends() -> None:
    text = CONFIGURATION.read_text()
    interval_ms, fall = number(r"inter (\d+)ms fast", text), number(r"fall (\d+)", text)
    check_s, valid_s = number(r"timeout check (\d+)s", text), number(r"hold valid +(\d+)s", text)
    for files in (COMPOSE, KUBERNETES):
        assert drain_of(files)[1] > fall * interval_ms / 1000 + check_s + 0.5
        assert drain_of(files)[1] > valid_s


def test_as_many_replicas_as_the_balancer_has_slots_for() -> None:
    slots = set(re.findall(r"server-template app (\d+) ", CONFIGURATION.read_text()))
    assert slots == {str(int(number(r"maxReplicas: (\d+)", KUBERNETES)))}


def test_what_is_mounted_is_there() -> None:
    for path in re.findall(r"(\./[\w./-]+):/", re.sub(r"(?m)^ *#.*$", "", COMPOSE)):
        assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def client(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        client.post("/v1/completions", json={"prompt": "a"})
        yield client


def test_every_metric_that_is_shown_or_scaled_on_exists(client: FlaskClient) -> None:
    text = client.get("/metrics").get_data(as_text=True)
    there = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    named = set(re.findall(r"gru_serve:[a-z_]+", " ".join(asked) + KUBERNETES))
    assert len(named) > 10
    assert {name for name in named if not there & {name, re.sub("_(bucket|sum|count)$", "", name)}} == set()


def test_each_panel_says_what_it_shows() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
