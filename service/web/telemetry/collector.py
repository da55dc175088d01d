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
from service.engine.counters import Buckets, Counters
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.web.gate.admission import AdmissionLimit
from service.web.telemetry.metrics import PREFIX

_OF_TEXTS: tuple[tuple[str, str, Callable[[Counters], Buckets]], ...] = (
    ("request_queue_time_seconds", "Time that a text waited for its first tick.", lambda of: of.queue_s),
    ("request_prefill_time_seconds", "Time from a text's first tick to its first character.", lambda of: of.prefill_s),
    ("request_decode_time_seconds", "Time from a text's first character to its end.", lambda of: of.decode_s),
    ("request_prompt_tokens", "Characters of a text's prompt that were read.", lambda of: of.prompt_chars),
    ("request_generation_tokens", "Characters generated of a text.", lambda of: of.generated_chars),
    (
        "request_max_num_generation_tokens",
        "Characters of the longest text of a request.",
        lambda of: of.longest_generated,
    ),
)


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
        models = self._models.all()
        yield from self._engines(models)
        yield from self._texts(models)
        yield from self._prefixes(models)
        yield from self._ends(models)
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
        yield _gauges(
            "num_requests_running", "Texts that the engine is advancing.", models, lambda one: one.engine.num_running
        )
        yield _gauges(
            "num_requests_waiting",
            "Texts in the queue of the engine.",
            models,
            lambda one: max(0, one.engine.num_open - one.engine.num_running),
        )
        yield _gauges(
            "kv_cache_usage_perc",
            "Share, 0 to 1, of the memory for texts that is taken; all models share it.",
            models,
            lambda one: one.engine.memory_usage,
        )
        yield _counters(
            "prompt_tokens",
            "Characters of prompts and fed texts that the network was stepped over.",
            models,
            lambda one: one.engine.counters.num_read,
        )
        yield _counters(
            "generation_tokens", "Characters generated.", models, lambda one: one.engine.counters.num_generated
        )
        yield _histograms(
            "batch_size", "Texts advanced in one tick of the engine.", models, lambda one: one.engine.counters.batch
        )
        yield _histograms(
            "tick_seconds", "Duration of one tick of the engine.", models, lambda one: one.engine.counters.tick_s
        )

    def _texts(self, models: list[LoadedModel]) -> Iterator[Metric]:
        """Yield the histograms that have a value for each text that has ended."""
        for name, help_text, buckets_of in _OF_TEXTS:
            family = HistogramMetricFamily(PREFIX + name, help_text, labels=["model_name"])
            for model in models:
                add_buckets(family, [model.version.ref], buckets_of(model.engine.counters))
            yield family

    def _prefixes(self, models: list[LoadedModel]) -> Iterator[Metric]:
        yield _counters(
            "prefix_cache_queries",
            "Characters of prompts that were looked up in the prefix cache.",
            models,
            lambda one: one.prefixes.num_queried,
        )
        yield _counters(
            "prefix_cache_hits",
            "Characters of prompts that the prefix cache held, and that were not stepped again.",
            models,
            lambda one: one.prefixes.num_hits,
        )

    def _ends(self, models: list[LoadedModel]) -> Iterator[Metric]:
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


def _gauges(name: str, help_text: str, models: list[LoadedModel], value: Callable[[LoadedModel], float]) -> Metric:
    """Return a gauge with a series for each model."""
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=["model_name"])
    for model in models:
        family.add_metric([model.version.ref], value(model))
    return family


def _counters(name: str, help_text: str, models: list[LoadedModel], value: Callable[[LoadedModel], float]) -> Metric:
    """Return a counter with a series for each model."""
    family = CounterMetricFamily(PREFIX + name, help_text, labels=["model_name"])
    for model in models:
        family.add_metric([model.version.ref], value(model))
    return family


def _histograms(
    name: str, help_text: str, models: list[LoadedModel], buckets: Callable[[LoadedModel], Buckets]
) -> Metric:
    """Return a histogram with a series for each model."""
    family = HistogramMetricFamily(PREFIX + name, help_text, labels=["model_name"])
    for model in models:
        add_buckets(family, [model.version.ref], buckets(model))
    return family


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help_text, value)
