"""Metrics that the other parts of the service count themselves. They are read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from service import __version__
from service.engine.counters import Buckets
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.web.gate.admission import AdmissionLimit
from service.web.telemetry.metrics import PREFIX


class CountedStore(Protocol):
    """The figures of a session store that become metrics."""

    @property
    def num_expired(self) -> int: ...

    @property
    def num_evicted(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int: ...


class ServiceCollector(Collector):
    """Reads engines, models, sessions and admission at each scrape."""

    def __init__(self, models: LoadedModels, store: CountedStore, admission: AdmissionLimit, kernel: str) -> None:
        """`kernel` is the name of the variant that computes the steps, such as `avx512vnni` or `torch`."""
        self._models, self._store, self._admission, self._kernel = models, store, admission, kernel

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, on the thread of the scrape."""
        yield InfoMetricFamily(
            f"{PREFIX}build",
            "Version of the service, and the kernel that computes.",
            {"version": __version__, "kernel": self._kernel},
        )
        yield from self._engines(self._models.all())
        yield from self._served_versions()
        yield _gauge("open_streams", "Streams being sent.", self._admission.num_streams)
        yield _gauge("sessions", "Sessions in the memory of this process.", len(self._store))
        yield _gauge("session_bytes", "Approximate memory of these sessions, in bytes.", self._store.num_bytes)
        yield _counter("session_evictions", "Sessions evicted to make room for others.", self._store.num_evicted)
        yield _counter(
            "session_expirations", "Sessions removed because their time to live was over.", self._store.num_expired
        )

    def _engines(self, models: list[LoadedModel]) -> Iterator[Metric]:
        """Yield the metrics that have one series per loaded model version."""

        def gauge(name: str, help_text: str, value: Callable[[LoadedModel], float]) -> Metric:
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["model_name"])
            for model in models:
                family.add_metric([model.version.ref], value(model))
            return family

        def counter(name: str, help_text: str, value: Callable[[LoadedModel], float]) -> Metric:
            family = CounterMetricFamily(PREFIX + name, help_text, labels=["model_name"])
            for model in models:
                family.add_metric([model.version.ref], value(model))
            return family

        def histogram(name: str, help_text: str, buckets: Callable[[LoadedModel], Buckets]) -> Metric:
            family = HistogramMetricFamily(PREFIX + name, help_text, labels=["model_name"])
            for model in models:
                add_buckets(family, [model.version.ref], buckets(model))
            return family

        yield gauge(
            "num_requests_running", "Texts that the engine is advancing.", lambda model: model.engine.num_running
        )
        yield gauge(
            "num_requests_waiting", "Texts in the queue of the engine.",
            lambda model: max(0, model.engine.num_open - model.engine.num_running),
        )  # fmt: skip
        yield counter(
            "prompt_tokens",
            "Characters of prompts and fed texts that the network was stepped over.",
            lambda model: model.engine.counters.num_read,
        )
        yield counter("generation_tokens", "Characters generated.", lambda model: model.engine.counters.num_generated)
        yield counter(
            "prefix_cache_queries",
            "Characters of prompts that were looked up in the prefix cache.",
            lambda model: model.prefixes.num_queried,
        )
        yield counter(
            "prefix_cache_hits",
            "Characters of prompts that the prefix cache held, and that were not stepped again.",
            lambda model: model.prefixes.num_hits,
        )
        yield histogram(
            "batch_size", "Texts advanced in one tick of the engine.", lambda model: model.engine.counters.batch
        )
        yield histogram(
            "tick_seconds", "Duration of one tick of the engine.", lambda model: model.engine.counters.tick_s
        )
        ends = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Finished continuations, by finish reason.",
            labels=["model_name", "finished_reason"],
        )
        info = InfoMetricFamily(f"{PREFIX}model", "Loaded model versions.", labels=["model_name"])
        for model in models:
            for reason, count in model.engine.counters.ends.items():
                ends.add_metric([model.version.ref, reason or "abort"], count)
            info.add_metric([model.version.ref], {"digest": model.digest, "precision": model.precision})
        yield ends
        yield info

    def _served_versions(self) -> Iterator[Metric]:
        """Yield which version each model name refers to, and how often that changed."""
        resolver = self._models.resolver
        versions = GaugeMetricFamily(f"{PREFIX}served_version", "Version that a model name refers to.", labels=["name"])
        failing = GaugeMetricFamily(
            f"{PREFIX}served_version_failing",
            "1 if the version that the name should refer to can't be loaded, else 0.",
            labels=["name"],
        )
        for resolution in resolver.resolutions():
            versions.add_metric([resolution.name], int(resolution.model.rpartition("@")[2]))
            failing.add_metric([resolution.name], resolution.code is not None)
        yield versions
        yield failing
        reloads = CounterMetricFamily(
            f"{PREFIX}model_reloads", "Attempts to serve another version, by outcome.", labels=["outcome"]
        )
        reloads.add_metric(["switched"], resolver.num_switched)
        reloads.add_metric(["failed"], resolver.num_failed)
        yield reloads


def add_buckets(family: HistogramMetricFamily, labels: list[str], buckets: Buckets) -> None:
    """Add a histogram to a family in Prometheus' form, in which each bucket also counts the smaller values."""
    bounds = [*map(str, map(float, buckets.bounds)), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(list(buckets.counts)), strict=True)), buckets.total)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help_text, value)
