"""The files for deployment agree with each other and with the code: settings, metrics and timeouts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from service.settings import Settings, read_settings
from service.store.model_store import ModelStore
from service.web.gunicorn.server import gunicorn_config
from tests.deploy.containers import Containers
from tests.harness.application import client_of
from tests.harness.balancer import CONFIGURATION, balancing
from tests.harness.programs import free_port

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
KUBERNETES = "\n".join(path.read_text() for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")))
FILES = {"compose": COMPOSE, "kubernetes": KUBERNETES, "Dockerfile": (ROOT / "Dockerfile").read_text()}
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "gru-serve.json").read_text())


def number(pattern: str, text: str) -> float:
    """Return the number that a pattern finds; it must match exactly once."""
    (found,) = re.findall(pattern, text)
    return float(found)


@pytest.mark.parametrize("name", FILES)
def test_settings__that_a_file_names_exist(name: str) -> None:
    named = set(re.findall(r"GRU_SERVE_([A-Z_]+)", FILES[name]))
    assert named
    assert named <= {field.upper() for field in Settings.model_fields}


def test_files__depend_on_no_kind_of_processor() -> None:
    """So the image is built for ARM64 from the same Dockerfile, and the files for deployment run it there."""
    for name, text in FILES.items():
        instructions = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        found = re.findall(r"(?i)amd64|x86|arm64|aarch64|linux/|--platform|platform:|kubernetes\.io/arch", instructions)
        assert found == [], name


def test_compose__passes_every_setting_that_it_does_not_fix() -> None:
    """So that a key or a limit in `.env` is never ignored. The container's own address and store are the image's."""
    named = set(re.findall(r"^ +GRU_SERVE_([A-Z_]+):", COMPOSE, re.MULTILINE))
    passed = dict(re.findall(r'^ +GRU_SERVE_([A-Z_]+): "\$\{GRU_SERVE_([A-Z_]+):-[^}]*\}"$', COMPOSE, re.MULTILINE))
    assert {field.upper() for field in Settings.model_fields} - named == {"HOST", "PORT", "MODEL_STORE"}
    assert named - set(passed) == {"SESSION_STORE", "DRAIN_NOTICE_S", "DRAIN_S", "TRUSTED_PROXIES"}
    assert all(name == variable for name, variable in passed.items())


def test_settings__that_compose_passes_on_empty_have_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.setenv(f"GRU_SERVE_{field.upper()}", "")
    empty = read_settings()
    assert empty == Settings()


def test_liveness__of_balancer_and_redis_is_probed() -> None:
    for name, files in (("balancer", _balancer()), ("redis", (ROOT / "deploy/kubernetes/redis.yaml").read_text())):
        assert "livenessProbe:" in files, name
    for service in ("lb", "redis"):
        (section,) = re.findall(rf"^  {service}:\n(?:    .*\n|\n)+", COMPOSE, re.MULTILINE)
        assert "healthcheck:" in section, service


def test_liveness__probe_of_the_compose_file_finds_a_balancer_that_runs_without_replicas() -> None:
    (line,) = re.findall(r"^ +- '(exec 3.*)'$", COMPOSE, re.MULTILINE)
    with balancing([free_port()]) as balancer:
        probe = line.replace("$$", "$").replace("8404", str(balancer.metrics_port))
        assert subprocess.run(["bash", "-c", probe], timeout=30, check=False).returncode == 0
    assert subprocess.run(["bash", "-c", probe], timeout=30, check=False, stderr=subprocess.DEVNULL).returncode != 0


def drain_of(text: str) -> tuple[float, float]:
    """Return the drain time and the notice period that a file sets."""
    return (
        number(r'GRU_SERVE_DRAIN_S(?::|, value:) "(\d+)"', text),
        number(r'GRU_SERVE_DRAIN_NOTICE_S(?::|, value:) "(\d+)"', text),
    )


def test_grace_periods__are_longer_than_the_shutdown() -> None:
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


def test_notice_period__is_longer_than_the_balancers_checks_take() -> None:
    text = CONFIGURATION.read_text()
    interval_ms, fall = number(r"inter (\d+)ms fast", text), number(r"fall (\d+)", text)
    check_s, valid_s = number(r"timeout check (\d+)s", text), number(r"hold valid +(\d+)s", text)
    for files in (COMPOSE, KUBERNETES):
        assert drain_of(files)[1] > fall * interval_ms / 1000 + check_s + 0.5
        assert drain_of(files)[1] > valid_s


def test_slots__of_the_balancer_are_enough_for_all_replicas_and_as_many_that_drain() -> None:
    slots = set(re.findall(r"server-template app (\d+) ", CONFIGURATION.read_text()))
    assert slots == {str(2 * int(number(r"maxReplicas: (\d+)", KUBERNETES)))}


def test_addresses__are_held_until_their_replicas_have_drained() -> None:
    held_s = min(number(rf"hold {why} +(\d+)s", CONFIGURATION.read_text()) for why in ("obsolete", "nx", "timeout"))
    app = (ROOT / "deploy" / "kubernetes" / "app.yaml").read_text()
    assert held_s >= number(r"terminationGracePeriodSeconds: (\d+)", app)
    assert held_s >= number(r"stop_grace_period: (\d+)s  # longer than GRU_SERVE_DRAIN_S", COMPOSE)


def test_mounts__of_the_compose_file_are_folders() -> None:
    """In a container, a mounted file stays what it was when an editor or git replaces it on the host."""
    paths = re.findall(r"(\./[\w./-]+):/", re.sub(r"(?m)^ *#.*$", "", COMPOSE))
    assert paths
    assert [path for path in paths if not (ROOT / path).is_dir()] == []
    named = re.findall(r"/etc/gru-serve/([\w.-]+)", COMPOSE)
    assert named
    assert [name for name in named if not (ROOT / "deploy" / name).is_file()] == []


@pytest.fixture(scope="module")
def client(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        client.post("/v1/completions", json={"prompt": "a"})
        yield client


def test_metrics__that_the_dashboard_and_the_autoscaler_use_exist(client: FlaskClient) -> None:
    text = client.get("/metrics").get_data(as_text=True)
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    named = set(re.findall(r"gru_serve:[a-z_]+", " ".join(queries) + KUBERNETES))
    assert len(named) > 10
    assert {name for name in named if not exported & {name, re.sub("_(bucket|sum|count)$", "", name)}} == set()


def test_panels__have_a_title_a_description_and_a_target() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert panels
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_failure__of_a_test_with_the_compose_file_tells_what_its_containers_did(tmp_path: Path) -> None:
    """Played by a script in place of docker: the balancer writes more than a report may have."""
    engine = tmp_path / "engine"
    engine.write_text(
        "#!/bin/bash\n"
        'case "$1" in\n'
        "ps) echo gru-serve-test_lb_1; echo gru-serve-test_redis_1 ;;\n"
        """inspect) echo '{"Status": "exited", "ExitCode": 137}' ;;\n"""
        'logs) if [[ ${!#} == *redis* ]]; then echo "Redis is full" >&2; exit; fi\n'
        '  for number in {1..1000}; do printf "line %d %01000d\\n" $number 0; done | tail -n $4 ;;\n'
        "esac\n"
    )
    engine.chmod(0o755)
    with pytest.raises(ValueError, match="why") as raised, Containers(str(engine), ()).explaining():
        raise ValueError("why")
    (report,) = raised.value.__notes__
    for part in ("gru-serve-test_lb_1", "line 1000 0", "gru-serve-test_redis_1", '"ExitCode": 137', "Redis is full"):
        assert part in report
    assert len(report) < 100_000
