"""Results as a table, and as JSON; the machine that they were measured on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import BASELINE, Measured, best_baseline


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}


def table(measured: Sequence[Measured]) -> str:
    """A line a contestant. The ratio is to the baseline with as many rows, at its better number of threads."""
    lines = [f"{'what':<28}{'rows':>5}{'threads':>9}{'characters/s':>14}{'min..max':>20}   times {BASELINE}"]
    for one in measured:
        ratios = one.ratios(best_baseline(measured, one.rows))
        between = f"{min(one.rates):,.0f}..{max(one.rates):,.0f}"
        lines.append(f"{one.what:<28}{one.rows:>5}{one.threads:>9}{one.rate:>14,.0f}{between:>20}   {spread(ratios)}")
    return "\n".join(lines)


def rows_of_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The numbers of the table."""
    return [
        {"what": one.what, "rows": one.rows, "threads": one.threads, "chars_per_s": summary(one.rates)}
        | {"ratio": summary(one.ratios(best_baseline(measured, one.rows)))}
        for one in measured
    ]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(ratios: Sequence[float]) -> str:
    """The same for people."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
