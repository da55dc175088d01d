"""A real Prometheus scrapes the real server: vLLM's example dashboard gets data, and promtool finds no fault."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.programs import free_port, program
from tests.harness.redis_process import redis_process
from tests.harness.server import BODY, SERVE, Endpoint, Server, serving
from tests.harness.wait import wait_until

MODEL = '{model_name="tiny@1"}'
RANGE = "[1m]"
LATENCIES = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
# What the panels of vLLM's examples/observability/prometheus_grafana/grafana.json query, by the kinds of their queries.
RATES = (
    "prompt_tokens_total", "generation_tokens_total", "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "request_max_num_generation_tokens_sum",
)  # fmt: skip
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HEATMAPS = ("request_prompt_tokens_bucket", "request_generation_tokens_bucket")
QUERIES = [
    *(
        f"histogram_quantile({quantile}, sum by(le) (rate(vllm:{name}_bucket{MODEL}{RANGE})))"
        for name in LATENCIES
        for quantile in (0.99, 0.95, 0.9, 0.5)
    ),
    *(f"rate(vllm:{name}_sum{MODEL}{RANGE}) / rate(vllm:{name}_count{MODEL}{RANGE})" for name in LATENCIES),
    *(f"rate(vllm:{name}{MODEL}{RANGE})" for name in RATES),
    *(f"vllm:{name}{MODEL}" for name in GAUGES),
    *(f"sum by(le) (increase(vllm:{name}{MODEL}{RANGE}))" for name in HEATMAPS),
    f"sum by(finished_reason) (increase(vllm:request_success_total{MODEL}{RANGE}))",
]


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_process(tmp_path_factory.mktemp("redis")) as redis:
        environment = {
            "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
            "GRU_SERVE_MODEL": "tiny",
            "GRU_SERVE_KERNEL": "torch",  # slow enough for several events
            "GRU_SERVE_METRICS_PREFIXES": "gru_serve_,vllm:",
            "GRU_SERVE_SESSION_STORE": redis.url,
        }
        with serving(SERVE, environment) as server:
            yield server


@contextmanager
def prometheus(target: Server, directory: Path) -> Iterator[Endpoint]:
    """Start a Prometheus that scrapes a server four times a second."""
    (directory / "prometheus.yml").write_text(
        "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
        f"scrape_configs: [{{job_name: test, static_configs: [{{targets: ['127.0.0.1:{target.port}']}}]}}]\n"
    )
    port = free_port()
    command = [program("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: is_up(Endpoint(port)))
            yield Endpoint(port)
        finally:
            process.kill()


def is_up(database: Endpoint) -> bool:
    try:
        return [sample["value"][1] for sample in query(database, "up")] == ["1"]
    except (OSError, ValueError, http.client.HTTPException):
        return False


def query(database: Endpoint, expression: str) -> list[dict[str, Any]]:
    answer = database.call("GET", f"/api/v1/query?query={quote(expression)}")[1]
    assert answer["status"] == "success", answer
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def has_data(database: Endpoint, expression: str) -> bool:
    return any(sample["value"][1] != "NaN" for sample in query(database, expression))


def test_dashboard_of_vllm__gets_data_for_every_query(server: Server, tmp_path: Path) -> None:
    with prometheus(server, tmp_path) as database:
        # A single request is enough: Prometheus has scraped every series at 0 before it.
        streamed = {"stream": True, "max_tokens": 4000}
        with closing(server.connect()) as connection:
            body = json.dumps(BODY | streamed).encode()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        wait_until(lambda: has_data(database, QUERIES[0]))
        silent = [expression for expression in QUERIES if not has_data(database, expression)]
        assert silent == []
        assert float(query(database, f"sum(increase(gru_serve_generation_tokens_total{RANGE}))")[0]["value"][1]) > 0
        # An alert on errors has a series before the first error.
        for metric in ("session_store_errors_total", 'http_requests_total{status="500"}'):
            assert has_data(database, f"sum(rate(gru_serve_{metric}{RANGE}))"), metric


def test_metrics__pass_promtools_checks_under_names_without_colons(server: Server) -> None:
    with Client(f"http://127.0.0.1:{server.port}") as client:
        "".join(client.create("ROMEO:").generate(20))
    with closing(server.connect()) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    without = "".join(line for line in text.splitlines(keepends=True) if "vllm:" not in line)
    assert "gru_serve_session_store_seconds_count" in without
    result = subprocess.run(
        [program("promtool"), "check", "metrics"], input=without, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
