"""GET /metrics, parsed by Prometheus' own parser and compared with the requests that were sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from service import __version__
from service.api_keys import new_key
from service.engine.counters import Buckets
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.telemetry.collector import add_buckets
from service.web.telemetry.metrics import Metrics, StoreMetrics
from tests.harness.application import client_of
from tests.harness.models import publish_tiny
from tests.harness.wait import wait_until

Labels = dict[str, str]
DOCS = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[FlaskClient]:
    publish_tiny(ModelStore(tmp_path))
    key, entry = new_key("operator")
    keys = SecretStr(entry)
    settings = Settings(
        model_store=tmp_path, model="tiny", kernel="torch", max_sessions=2, model_poll_s=0, api_keys=keys
    )
    with client_of(settings, key) as client:
        yield client


def scrape(client: FlaskClient) -> dict[str, list[tuple[Labels, float]]]:
    """All samples as a dict: name of the series -> labels and value of each of its samples."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=")
    samples: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        assert family.type != "unknown"
        for sample in family.samples:
            samples.setdefault(sample.name.removeprefix("gru_serve:"), []).append((sample.labels, sample.value))
    return samples


def value(client: FlaskClient, series: str, /, **labels: str) -> float:
    """Sum of the samples of a series that have these labels. Fails if there is none."""
    values = [number for has, number in scrape(client)[series] if labels.items() <= has.items()]
    assert values, series
    return sum(values)


def test_engine_metrics__count_characters_and_continuations(fresh: FlaskClient) -> None:
    fresh.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 50, "seed": 7, "n": 3, "best_of": 3})
    assert value(fresh, "generation_tokens_total", model_name="tiny@1") == 150
    assert value(fresh, "prompt_tokens_total", model_name="tiny@1") == 6  # read once for all three
    assert value(fresh, "request_success_total", finished_reason="length") == 3
    fresh.post("/v1/completions", json={"prompt": "ROMEO: a", "max_tokens": 50, "seed": 7})
    assert value(fresh, "prompt_tokens_total") == 8
    assert value(fresh, "prefix_cache_hits_total") == 6
    assert value(fresh, "prefix_cache_queries_total") == 14
    bias = {"logit_bias": {"a": 100.0}, "stop": "aa"}
    fresh.post("/v1/completions", json={"prompt": "R", "max_tokens": 50} | bias)
    assert value(fresh, "request_success_total", finished_reason="stop") == 1
    left = fresh.post("/v1/completions", json={"prompt": "R", "max_tokens": 8000, "stream": True}, buffered=False)
    assert value(fresh, "open_streams") == 1
    left.close()
    wait_until(lambda: value(fresh, "num_requests_running") + value(fresh, "num_requests_waiting") == 0)
    assert value(fresh, "request_success_total", finished_reason="abort") == 1
    assert value(fresh, "open_streams") == 0


def test_engine_metrics__count_feeds_of_one_character(fresh: FlaskClient) -> None:
    """A feed of one character is stepped by the thread of the request, not by the engine's."""
    fresh.put("/v1/sessions/a", json={"text": "R"})
    for _ in range(5):
        fresh.post("/v1/sessions/a/feed", json={"text": "a"})
    assert value(fresh, "prompt_tokens_total") == 6
    assert value(fresh, "batch_size_count") == value(fresh, "tick_seconds_count") == 6
    assert value(fresh, "batch_size_bucket", le="1.0") == 6
    assert value(fresh, "tick_seconds_sum") > 0
    assert sum(number for _, number in scrape(fresh)["request_success_total"]) == 0  # a feed generates nothing


def test_http_requests__are_labelled_by_route_and_never_by_path(fresh: FlaskClient) -> None:
    secret = "an-id-that-is-secret"
    fresh.put(f"/v1/sessions/{secret}", json={"text": "R"})
    fresh.get(f"/v1/sessions/{secret}")
    fresh.get(f"/v1/sessions/{secret}x")
    for path in (f"/{secret}", f"/v1/sessions/{secret}/nothing"):
        fresh.get(path)
    fresh.open("/healthz", method=secret.upper())
    route = "/v1/sessions/<id>"
    assert value(fresh, "http_requests_total", method="PUT", route=route, status="201") == 1
    assert value(fresh, "http_requests_total", method="GET", route=route, status="200") == 1
    assert value(fresh, "http_requests_total", method="GET", route=route, status="404") == 1
    assert value(fresh, "http_requests_total", method="GET", route="none", status="404") == 2
    assert value(fresh, "http_requests_total", method="other", route="none", status="405") == 1
    assert value(fresh, "e2e_request_latency_seconds_count", route=route) == 2
    assert secret not in fresh.get("/metrics").text.lower()


def test_stream_latencies__are_measured_per_event_with_text(fresh: FlaskClient) -> None:
    for _ in range(2):
        stream = fresh.post("/v1/completions", json={"prompt": "R", "max_tokens": 400, "stream": True})
        events = [block for block in stream.text.split("\n\n") if block]
        stream.close()
    assert value(fresh, "time_to_first_token_seconds_count") == 2
    first_gaps = value(fresh, "inter_token_latency_seconds_count")
    assert first_gaps >= len(events) - 2  # the gaps of the second stream alone, whose [DONE] has no text
    assert value(fresh, "e2e_request_latency_seconds_count", route="/v1/completions") == 2
    body = {"prompt": "R", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
    stream = fresh.post("/v1/completions", json=body)
    assert stream.text.count('"usage": {') == 1
    texts = stream.text.count("data: {") - 1
    stream.close()
    gaps = value(fresh, "inter_token_latency_seconds_count")
    assert gaps == first_gaps + texts - 1  # the event with the usage has no text
    first_gaps = gaps
    fresh.put("/v1/sessions/a", json={"text": "R"})
    run = fresh.post("/v1/sessions/a/generate", json={"max_tokens": 400, "stream": True})
    texts = run.text.count("event: text\n")
    run.close()
    assert value(fresh, "time_to_first_token_seconds_count") == 4
    assert value(fresh, "inter_token_latency_seconds_count") == first_gaps + texts - 1
    again = fresh.get("/v1/sessions/a/generate")
    assert "event: done" in again.text
    again.close()
    assert value(fresh, "time_to_first_token_seconds_count") == 4  # a resumed stream has no time to first token


def test_session_metrics__count_sessions_and_evictions(fresh: FlaskClient) -> None:
    for name in "abc":
        fresh.put(f"/v1/sessions/{name}", json={"text": "R"})
    assert value(fresh, "sessions") == 2
    assert value(fresh, "session_bytes") > 2000
    assert value(fresh, "session_evictions_total") == 1
    assert value(fresh, "session_expirations_total") == 0


def test_info_metrics__name_version_kernel_and_served_models(fresh: FlaskClient, tmp_path: Path) -> None:
    assert scrape(fresh)["build_info"] == [({"version": __version__, "kernel": "torch"}, 1)]
    ((labels, one),) = scrape(fresh)["model_info"]
    digest = fresh.get("/v1/models/tiny").get_json()["meta"]["digest"]
    assert (labels["model_name"], labels["digest"], labels["precision"], one) == ("tiny@1", digest, "int8", 1)
    publish_tiny(ModelStore(tmp_path), seed=1)
    fresh.post("/admin/reload", json={})
    assert value(fresh, "served_version", name="tiny") == 2
    assert value(fresh, "model_reloads_total", outcome="switched") == 1
    publish_tiny(ModelStore(tmp_path), seed=2)
    (tmp_path / "tiny" / "3" / "model.safetensors").write_bytes(b"")
    fresh.post("/admin/reload", json={})
    assert value(fresh, "served_version", name="tiny") == 2
    assert value(fresh, "served_version_failing", name="tiny") == 1
    assert value(fresh, "model_reloads_total", outcome="failed") == 1
    assert {labels["model_name"] for labels, _ in scrape(fresh)["num_requests_running"]} == {"tiny@1", "tiny@2"}


def test_docs__list_exactly_the_metrics_that_exist(fresh: FlaskClient) -> None:
    """The types and labels, too."""
    rows = re.findall(r"^\| `([a-z0-9_:]+)` \| (\w+)(?:, 1)? \| ([a-z_, ]*)\|", DOCS, re.MULTILINE)
    documented = {
        name: (kind, {label.strip() for label in labels.split(",") if label.strip()}) for name, kind, labels in rows
    }
    assert len(documented) == len(rows)
    live: dict[str, tuple[str, set[str]]] = {}
    stream = fresh.post("/v1/completions", json={"prompt": "R", "stream": True})
    stream.get_data()
    stream.close()
    fresh.application.extensions["gru_serve_metrics"].store.observe("load", 0.001)
    fresh.application.extensions["gru_serve_metrics"].store.count_failure("load")
    fresh.get("/metrics")  # a scrape counts itself, so it is in the next one
    for family in text_string_to_metric_families(fresh.get("/metrics").text):
        assert family.samples, family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        live[name] = (family.type, labels)
    assert documented == live


def test_two_applications__have_separate_metrics(fresh: FlaskClient, tmp_path: Path) -> None:
    with client_of(Settings(model_store=tmp_path, model="tiny")) as other:
        for _ in range(3):
            other.get("/healthz")
        assert value(other, "http_requests_total", route="/healthz") == 3
    fresh.get("/healthz")
    assert value(fresh, "http_requests_total", route="/healthz") == 1


def test_store_metrics__are_in_the_registry() -> None:
    metrics = Metrics()
    assert isinstance(metrics.store, StoreMetrics)
    metrics.store.observe("save", 0.003)
    metrics.store.count_failure("lease")
    registry = metrics.registry
    assert registry.get_sample_value("gru_serve:session_store_seconds_sum", {"operation": "save"}) == 0.003
    assert registry.get_sample_value("gru_serve:session_store_errors_total", {"operation": "lease"}) == 1


def test_add_buckets__makes_cumulative_buckets() -> None:
    """A value equal to a bound counts in its bucket, and each bucket includes the smaller ones."""
    buckets = Buckets((1, 2.5, 4))
    for number in (0.5, 1, 1.5, 2.5, 4, 4.5, 100):
        buckets.add(number)
    family = HistogramMetricFamily("h", "h", labels=["x"])
    add_buckets(family, ["y"], buckets)

    class Collector:
        def collect(self) -> Iterator[HistogramMetricFamily]:
            yield family

    registry = CollectorRegistry()
    registry.register(Collector())
    counted = {
        bound: registry.get_sample_value("h_bucket", {"x": "y", "le": bound}) for bound in ("1.0", "2.5", "4.0", "+Inf")
    }
    assert counted == {"1.0": 2, "2.5": 4, "4.0": 5, "+Inf": 7}
    assert registry.get_sample_value("h_sum", {"x": "y"}) == 114
