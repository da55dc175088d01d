"""Spans of requests: in memory, and as a real receiver gets them; and the trace id in the log."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from flask.testing import FlaskClient

from service.settings import Settings, otlp_is_configured
from service.store.model_store import ModelStore
from service.web import app as web_app
from service.web.gate.trace_context import trace_id_of
from tests.harness.application import client_of, ok
from tests.harness.server import BODY, SERVE, serving
from tests.harness.wait import wait_until

try:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("OpenTelemetry is not installed", allow_module_level=True)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "ROMEO: never to be seen"
STAGES = ["queue", "prompt", "generation"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"00-{TRACE}-{PARENT}-00", TRACE),
        (f" 00-{TRACE}-{PARENT}-01 ", TRACE),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-brings", TRACE),
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"cc-{TRACE}-{PARENT}-01-" + "a" * 1000, None),
        ("", None),
        ("a trace", None),
    ],
)
def test_traceparent__gives_a_trace_id_only_if_it_is_valid(header: str, expected: str | None) -> None:
    assert trace_id_of(header) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces__are_off_unless_an_endpoint_is_configured(environment: dict[str, str], expected: bool) -> None:
    assert otlp_is_configured(environment) == expected


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(
    tiny_store: ModelStore, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FlaskClient]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(web_app, "otlp_is_configured", lambda: True)
    monkeypatch.setattr(web_app, "otlp_provider", lambda: provider)
    with client_of(Settings(model_store=tiny_store.root, model="tiny", max_batch=4, max_queue=4)) as client:
        yield client


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = {span.name: span for span in spans.get_finished_spans()}
    spans.clear()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_spans__of_a_completion_cover_its_stages(
    client: FlaskClient, spans: InMemorySpanExporter, stream: bool
) -> None:
    body = {"prompt": SECRET, "max_tokens": 30, "seed": 7, "n": 2, "stream": stream, "user": SECRET}
    with client.post("/v1/completions", json=body | {"stop": "zz"}, headers=SENT) as response:
        assert response.status_code == 200
        response.get_data()
    found = by_name(spans)
    assert sorted(found) == sorted(["POST /v1/completions", "text_completion tiny@1", *STAGES])
    request, inference = found["POST /v1/completions"], found["text_completion tiny@1"]
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    assert inference.parent is not None
    assert inference.parent.span_id == request.context.span_id
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    attributes = dict(inference.attributes or {})
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == "tiny@1"
    assert (attributes["gen_ai.request.max_tokens"], attributes["gen_ai.request.choice.count"]) == (30, 2)
    assert attributes["gen_ai.usage.input_tokens"] == 2 * len(SECRET)
    assert attributes["gen_ai.usage.output_tokens"] == 60
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attributes["gen_ai.request.stream"] == stream
    times = [request.start_time, inference.start_time]
    for stage in STAGES:
        assert found[stage].parent.span_id == inference.context.span_id  # type: ignore[union-attr]
        times += [found[stage].start_time, found[stage].end_time]
    times += [inference.end_time, request.end_time]
    # The clocks of the two outer spans and of the stages are read one after the other.
    assert all(one <= other + 5_000_000 for one, other in pairwise(times)), times  # type: ignore[operator]
    assert [event.name for event in inference.events] == ["first character"]
    assert SECRET not in " ".join(span.to_json() for span in found.values())


@pytest.mark.parametrize("stream", [False, True])
def test_spans__of_a_session_do_not_name_it(client: FlaskClient, spans: InMemorySpanExporter, stream: bool) -> None:
    ok(client.put("/v1/sessions/nobody-knows-it", json={"text": SECRET}), 201)
    by_name(spans)
    for max_tokens in (5, 300):
        body = {"max_tokens": max_tokens, "stream": stream}
        with client.post("/v1/sessions/nobody-knows-it/generate", json=body) as response:
            assert response.status_code == 200
            response.get_data()
        found = by_name(spans)
        assert found["POST /v1/sessions/<id>/generate"].parent is None
        attributes = dict(found["text_completion tiny@1"].attributes or {})
        assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (0, max_tokens)
        assert "nobody-knows-it" not in " ".join(span.to_json() for span in found.values())


def test_spans__of_refusals_and_checks(client: FlaskClient, spans: InMemorySpanExporter) -> None:
    client.get("/healthz").close()
    assert by_name(spans) == {}
    client.post("/v1/completions", json={"prompt": SECRET, "n": 100}).close()
    client.get("/v1/unknown").close()
    client.open("/v1/completions", method=SECRET.split(":")[0]).close()
    found = by_name(spans)
    assert sorted(found) == ["GET", "POST /v1/completions", "_OTHER"]
    assert dict(found["POST /v1/completions"].attributes or {})["http.response.status_code"] == 400
    # A client that asks not to be sampled is not.
    client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).close()
    assert by_name(spans) == {}


def test_spans__of_a_stream_whose_client_leaves_end_with_it(client: FlaskClient, spans: InMemorySpanExporter) -> None:
    body = {"prompt": "R", "max_tokens": 8000, "stream": True}
    response = client.post("/v1/completions", json=body, buffered=False)
    assert by_name(spans) == {}
    response.close()
    assert set(by_name(spans)) >= {"POST /v1/completions", "text_completion tiny@1"}


@pytest.mark.parametrize("traced", [False, True])
def test_log_line__has_the_trace_id(tiny_store: ModelStore, request: pytest.FixtureRequest, traced: bool) -> None:
    if traced:
        request.getfixturevalue("client")  # patches the application
    logged = io.StringIO()
    with client_of(Settings(model_store=tiny_store.root, model="tiny", log_format="json")) as client:
        (handler,) = [handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler)]
        handler.setStream(logged)
        for headers in (SENT, {}, {"traceparent": "nonsense"}):
            client.get("/v1/models", headers=headers)
        logging.root.removeHandler(handler)
    first, second, third = [json.loads(line).get("trace_id") for line in logged.getvalue().splitlines()]
    assert first == TRACE
    assert (second is not None, third is not None) == (traced, traced)


class Receiver(ThreadingHTTPServer):
    """Gets what is exported with OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ReceivingHandler)
        self.requests: list[ExportTraceServiceRequest] = []

    def names(self) -> list[str]:
        return [
            span.name
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _ReceivingHandler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's parameter
        """Print nothing."""


def test_server__exports_to_the_endpoint_that_opentelemetrys_variables_name(tiny_store: ModelStore) -> None:
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.05,))
        thread.start()
        try:
            environment = {
                "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
                "GRU_SERVE_MODEL": "tiny",
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_address[1]}",
                "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
                "OTEL_SERVICE_NAME": "theatre",
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            }
            with serving(SERVE, environment) as server:
                assert server.text()
                wait_until(lambda: "generation" in receiver.names())
                assert server.text(max_tokens=BODY["max_tokens"])
            # What was left is sent when the server ends.
            assert sorted(receiver.names()) == sorted(2 * ["POST /v1/completions", "text_completion tiny@1", *STAGES])
            (resource,) = {str(each.resource) for one in receiver.requests for each in one.resource_spans}
            assert "theatre" in resource
        finally:
            receiver.shutdown()
            thread.join()
