"""What the parts of the service have counted, as metrics: read when somebody asks."""

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
from service.web.admission import AdmissionLimit
from service.web.metrics import PREFIX


class CountedStore(Protocol):
    """What is read of a session store."""

    @property
    def num_expired(self) -> int: ...

    @property
    def num_evicted(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int: ...


class ServiceCollector(Collector):
    """Reads engines, models, sessions and admission. kernel: the variant that computes."""

    def __init__(self, models: LoadedModels, store: CountedStore, admission: AdmissionLimit, kernel: str) -> None:
        self._models, self._store, self._admission, self._kernel = models, store, admission, kernel

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape, on its thread."""
        yield InfoMetricFamily(f"{PREFIX}build", "What runs here.", {"version": __version__, "kernel": self._kernel})
        yield from self._engines(self._models.all())
        yield from self._served()
        yield _gauge("open_streams", "Streams that are being sent.", self._admission.num_streams)
        yield _gauge("sessions", "Sessions in this process.", len(self._store))
        yield _gauge("session_bytes", "About how much memory they take.", self._store.num_bytes)
        yield _counter("session_evictions", "Sessions pushed out by others.", self._store.num_evicted)
        yield _counter("session_expirations", "Sessions whose time was over.", self._store.num_expired)

    def _engines(self, models: list[LoadedModel]) -> Iterator[Metric]:
        """One series a loaded version."""

        def gauge(name: str, about: str, value: Callable[[LoadedModel], float]) -> Metric:
            family = GaugeMetricFamily(PREFIX + name, about, labels=["model_name"])
            for model in models:
                family.add_metric([model.version.ref], value(model))
            return family

        def counter(name: str, about: str, value: Callable[[LoadedModel], float]) -> Metric:
            family = CounterMetricFamily(PREFIX + name, about, labels=["model_name"])
            for model in models:
                family.add_metric([model.version.ref], value(model))
            return family

        def histogram(name: str, about: str, buckets: Callable[[LoadedModel], Buckets]) -> Metric:
            family = HistogramMetricFamily(PREFIX + name, about, labels=["model_name"])
            for model in models:
                add_buckets(family, [model.version.ref], buckets(model))
            return family

        yield gauge("num_requests_running", "Texts in the batch.", lambda model: model.engine.num_running)
        yield gauge(
            "num_requests_waiting", "Texts that wait for a place in it.",
            lambda model: max(0, model.engine.num_open - model.engine.num_running),
        )  # fmt: skip
        yield counter("prompt_tokens", "Characters read.", lambda model: model.engine.counters.num_read)
        yield counter("generation_tokens", "Characters generated.", lambda model: model.engine.counters.num_generated)
        yield counter(
            "prefix_cache_queries", "Characters of prompts looked up.", lambda model: model.prefixes.num_queried
        )
        yield counter("prefix_cache_hits", "Of them, those that were known.", lambda model: model.prefixes.num_hits)
        yield histogram("batch_size", "Texts in a tick.", lambda model: model.engine.counters.batch)
        yield histogram("tick_seconds", "Length of a tick.", lambda model: model.engine.counters.tick_s)
        ends = CounterMetricFamily(
            f"{PREFIX}request_success", "Continuations that are over, by why.", labels=["model_name", "finished_reason"]
        )
        about = InfoMetricFamily(f"{PREFIX}model", "Versions that are loaded.", labels=["model_name"])
        for model in models:
            for reason, count in model.engine.counters.ends.items():
                ends.add_metric([model.version.ref, reason or "abort"], count)
            about.add_metric([model.version.ref], {"digest": model.digest, "precision": model.precision})
        yield ends
        yield about

    def _served(self) -> Iterator[Metric]:
        served = self._models.resolver
        versions = GaugeMetricFamily(f"{PREFIX}served_version", "Version that a name means.", labels=["name"])
        failing = GaugeMetricFamily(
            f"{PREFIX}served_version_failing", "1: it should mean another, which can't be loaded.", labels=["name"]
        )
        for resolution in served.resolutions():
            versions.add_metric([resolution.name], int(resolution.model.rpartition("@")[2]))
            failing.add_metric([resolution.name], resolution.code is not None)
        yield versions
        yield failing
        reloads = CounterMetricFamily(f"{PREFIX}model_reloads", "Changes of version.", labels=["outcome"])
        reloads.add_metric(["switched"], served.num_switched)
        reloads.add_metric(["failed"], served.num_failed)
        yield reloads


def add_buckets(family: HistogramMetricFamily, labels: list[str], buckets: Buckets) -> None:
    """A histogram of plain numbers as one of Prometheus', whose buckets count what lies in those below too."""
    bounds = [*map(str, map(float, buckets.bounds)), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(list(buckets.counts)), strict=True)), buckets.total)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, about, value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, about, value)
