"""Results as a table and as JSON, and a description of the machine."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import BASELINE, Measured, best_baseline
from service.cores import available_cores


def machine() -> dict[str, str | int]:
    """Describe the machine that the figures depend on."""
    return {"cpu": _cpu(), "cores": available_cores(), "torch": torch.__version__}


def table(measured: Sequence[Measured]) -> str:
    """Return a table with a line for each candidate.

    The ratio is to the baseline with the same number of rows and with its faster number of threads.
    """
    lines = [f"{'what':<28}{'rows':>5}{'threads':>9}{'characters/s':>14}{'min..max':>20}   times {BASELINE}"]
    for m in measured:
        ratios = m.ratios(best_baseline(measured, m.rows))
        span = f"{min(m.rates):,.0f}..{max(m.rates):,.0f}"
        lines.append(f"{m.what:<28}{m.rows:>5}{m.threads:>9}{m.rate:>14,.0f}{span:>20}   {spread(ratios)}")
    return "\n".join(lines)


def rows_of_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the numbers of the table for JSON."""
    return [
        {"what": m.what, "rows": m.rows, "threads": m.threads, "chars_per_s": summary(m.rates)}
        | {"ratio": summary(m.ratios(best_baseline(measured, m.rows)))}
        for m in measured
    ]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum for JSON."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(ratios: Sequence[float]) -> str:
    """Return median, minimum and maximum as text, such as `2.05 (1.87..2.31)`."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def _cpu() -> str:
    """Name the processor. Virtual machines hide its name, but not its family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    numbers = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")  # of x86, and of Arm
    return " ".join([name, *(f"{number} {facts[number]}" for number in numbers if number in facts)])
