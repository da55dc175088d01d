"""Ctrl-C and SIGTERM as a request to stop at a good place."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_S = 1.0  # Programs such as `timeout` and `make` deliver one signal twice.


class Stopped(click.ClickException):
    """A signal stopped the command. The message says what to do next."""

    def __init__(self, message: str, signals: StopSignals) -> None:
        super().__init__(message)
        self.exit_code = signals.exit_status  # type: ignore[misc]  # click reads it from the instance too

    def show(self, file: Any = None) -> None:  # noqa: ARG002 - click's signature
        click.echo(self.message, err=True)


class StopSignals:
    """Context in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, or inside `deferred` request a stop.

    Inside `deferred` the first signal is a request, and a later one raises KeyboardInterrupt. A signal that the process
    ignores, as under `nohup`, stays ignored. Process 1 of a container gets these signals too, because only those
    without a handler are withheld from it.
    """

    def __init__(self) -> None:
        self._number: int | None = None  # of the first signal
        self._received_at = 0.0
        self._defers = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def exit_status(self) -> int:
        """What shells report for a command that the signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._number or signal.SIGINT)

    def is_requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._number is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Make the first signal a request during the block."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    @contextmanager
    def says(self, message: str) -> Iterator[None]:
        """Raise Stopped with this message if a signal ends the block."""
        try:
            yield
        except KeyboardInterrupt:
            raise Stopped(message, self) from None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # Prints nothing, because the signal may have interrupted a print.
        now, is_first = time.monotonic(), self._number is None
        if is_first:
            self._number, self._received_at = number, now
            if self._defers:
                return
        elif now - self._received_at < _SAME_S:
            return
        raise KeyboardInterrupt
