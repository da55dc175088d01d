"""`gru-serve bench`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.commands.options import FiniteRange, echo_json, json_option, model_store_option, open_service
from service.cores import available_cores, second_cache_bytes
from service.errors import plural

if TYPE_CHECKING:
    from service.engine.stepper import Stepper
    from service.model.config import ModelConfig
    from service.model.quantize import IntegerPrecision

_ROUNDS = 10  # for each number of rows
_MAX_ROWS = 65_536


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    number = click.IntRange(1, _MAX_ROWS)
    return [number(part, param, ctx) for part in value.split(",")]


@click.command("bench")
@click.option("--model", default=None, help="Model as name, name@version or name@alias.  [the setting GRU_SERVE_MODEL]")
@click.option(
    "--rows",
    "numbers_of_rows",
    callback=_numbers,
    default="1,8,64,256",
    help="How many texts are generated side by side, one measurement for each number.  [1,8,64,256]",
)
@click.option(
    "--seconds", type=FiniteRange(0, 3600, min_open=True), default=2.0, help="Seconds for each number of rows.  [2]"
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=None,
    help="Engine threads.  [the setting GRU_SERVE_ENGINE_THREADS]",
)
@model_store_option
@json_option
def bench_command(
    model: str | None,
    numbers_of_rows: list[int],
    seconds: float,
    threads: int | None,
    model_store: Path | None,
    as_json: bool,
) -> None:
    """Measure how many characters a second this machine generates without HTTP, and the memory that a text takes.

    Example: gru-serve bench --rows 1,64 --seconds 1
    """
    from service.settings import read_settings

    threads = threads or read_settings().num_engine_threads
    began = time.perf_counter()
    with open_service(model_store, model, threads) as service:
        loaded = service.models.get(service.default_model)
        load_s = time.perf_counter() - began
        version, precision, stepper = loaded.version.ref, loaded.precision, loaded.stepper
        facts: dict[str, Any] = {"model": version, "precision": precision, "kernel": service.kernel.name}
        facts |= {"threads": threads, "cores": available_cores(), "load_s": load_s}
        facts |= {"state_bytes": stepper.initial_hidden().nbytes, "rates": []}
        facts["weight_bytes"] = weight_bytes(stepper.config, precision)
        facts["second_cache_bytes"] = second_cache_bytes()
        if not as_json:
            click.echo(f"{version} in {precision} on {service.kernel.name}, {threads} of {facts['cores']} cores")
            click.echo(f"loaded in {load_s:.2f} s; the state of a text takes {facts['state_bytes']:,} bytes")
            click.echo(weights_and_cache(precision, facts["weight_bytes"], facts["second_cache_bytes"]))
            click.echo(f"{'rows':>6}{'characters/s':>15}{'min..max':>22}{'for each text':>15}")
        for num_rows in numbers_of_rows:
            click.echo(f"measuring {plural(num_rows, 'row')} for {seconds:g} s", err=True)
            rates = measure(stepper, num_rows, seconds)
            rate, slowest, fastest = statistics.median(rates), min(rates), max(rates)
            facts["rates"].append({"rows": num_rows, "chars_per_s": rate, "min": slowest, "max": fastest})
            if not as_json:
                span = f"{slowest:,.0f}..{fastest:,.0f}"
                click.echo(f"{num_rows:>6}{rate:>15,.0f}{span:>22}{rate / num_rows:>15,.0f}")
    if as_json:
        echo_json(facts, indent=1)


def weight_bytes(config: ModelConfig, precision: IntegerPrecision) -> int:
    """Return the size of all weights that each step of a text reads, but for those of the output layer."""
    num_weights = (2 * config.num_layers - 1) * 3 * config.num_units**2
    return num_weights if precision == "int8" else num_weights // 2


def weights_and_cache(precision: IntegerPrecision, num_bytes: int, cache: int | None) -> str:
    """Return a line on what limits one text. Texts side by side share each read of the weights."""
    line = f"its recurrent weights take {num_bytes / 2**20:.1f} MiB"
    if cache is None:
        return line
    line += f", and a core's second cache has {cache / 2**20:.1f}"
    if precision == "int8" and num_bytes > cache >= num_bytes // 2:
        line += ": in int4 they would fit, and one text would be faster (GRU_SERVE_PRECISION; it changes the texts)"
    return line


def measure(stepper: Stepper, num_rows: int, seconds: float) -> list[float]:
    """Return the characters/s of all rows together for each of the rounds, which take `seconds` in total.

    A warm-up round before them is not counted.
    """
    texts = Texts(stepper, num_rows)
    return [texts.chars_per_s(seconds / _ROUNDS) for _ in range(_ROUNDS + 1)][1:]


class Texts:
    """Endless texts that a stepper generates side by side, with as many characters a call as the engine would take.

    fields: of all their requests.
    """

    def __init__(self, stepper: Stepper, num_rows: int, **fields: Any) -> None:
        import numpy as np

        from service.engine.pace import Pace
        from service.engine.request import Request
        from service.engine.stepper import Row

        self._stepper, self._pace = stepper, Pace()
        empty_prompt = np.empty(0, np.int64)
        requests = [Request(empty_prompt, 2**52, seed, **fields) for seed in range(num_rows)]
        self._rows = [Row(request, stepper.initial_hidden()) for request in requests]

    def chars_per_s(self, seconds: float) -> float:
        """Generate for `seconds`, in at least one call, and return the characters/s of all texts together."""
        began, total, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds:
            num_chars = self._pace.num_chars(len(self._rows))
            self._stepper.advance(self._rows, num_chars)
            total += num_chars * len(self._rows)
            before, elapsed = elapsed, time.perf_counter() - began
            self._pace.measured(len(self._rows), num_chars, elapsed - before)
        return total / elapsed
