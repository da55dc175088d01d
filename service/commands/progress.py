"""Progress on standard error: a bar on a terminal, and elsewhere, such as in a log file, a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from service.errors import plural

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_INTERVAL_S = 30.0


def say(line: str) -> None:
    """Print a line on standard error. A terminal that was closed, or a full disk, must not end hours of work."""
    with suppress(OSError, ValueError):
        click.echo(line, err=True)


def tell(line: str) -> None:
    """Print a line on standard output, or on standard error if that was closed or can't be written."""
    try:
        if sys.stdout is None:
            raise ValueError
        click.echo(line)
    except (OSError, ValueError):
        say(line)


class Progress:
    """The progress of one piece of work, as a context manager. `total` is None if it is not known."""

    def __init__(self, what: str, total: int | None, unit: str = "character", initial: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._initial = initial
        self._note = ""
        self._began = self._said = time.monotonic()
        self._bar = self._open_bar() if sys.stderr is not None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()

    def update(self, count: int) -> None:
        """Count what was done since the last call."""
        self._done += count
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.update(count)
        elif time.monotonic() - self._said >= LINE_INTERVAL_S:
            self._said = time.monotonic()
            say(self._line())

    def note(self, note: str) -> None:
        """Show this after the numbers from now on."""
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            say(line)
            return
        with suppress(OSError, ValueError):
            self._bar.write(line, file=sys.stderr)

    def _line(self) -> str:
        rate = (self._done - self._initial) / max(1e-9, self._said - self._began)
        parts = [plural(self._done, self._unit, ","), f"{rate:,.0f} a second"]
        if self._total:
            parts[0] = f"{self._done / self._total:.0%}, {self._done:,} of {plural(self._total, self._unit, ',')}"
            parts.append(f"{max(0, self._total - self._done) / max(1e-9, rate) / 60:,.1f} minutes left")
        return f"{self._what}: {', '.join(parts + [self._note] * bool(self._note))}"

    def _open_bar(self) -> tqdm[Any]:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # tqdm's monitor thread would outlive the bar
        unit = "B" if self._unit == "byte" else "char"
        # What matters is first, because a narrow terminal shows only the beginning.
        numbers = "| {remaining} left{postfix}, {rate_fmt}"
        return tqdm(
            desc=self._what, total=self._total, initial=self._initial, unit=unit, unit_scale=True, mininterval=0.5,
            leave=False, dynamic_ncols=True, bar_format="{l_bar}{bar}" + numbers if self._total else None,
        )  # fmt: skip
