"""Logging: one event per line on standard error, with gunicorn's events in the same format.

No line holds a user's text, a session's id or a key. Messages of exceptions and of gunicorn can quote what a client
sent, so the former are left out and the latter are shortened.
"""

from __future__ import annotations

import logging
import logging.config
import os
import select
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

import structlog

_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


_ROOM_S = 0.2  # a line waits for room in a pipe
_PIECE_BYTES = select.PIPE_BUF  # that much fits into a pipe which has room

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class PatientHandler(logging.StreamHandler[Any]):
    """Writes lines to a stream, and leaves out those for which nobody makes room in time.

    A program that has stopped reading the log would otherwise stop each thread that logs, at its next line. The first
    line without room waits for `_ROOM_S`; the following ones don't wait, until there is room again. Then a line says
    how many were left out.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._num_lost = 0  # since the last line that was written

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            descriptor = self.stream.fileno()
        except (AttributeError, OSError, ValueError):  # no file: it always has room
            super().emit(record)
            return
        try:
            if self._num_lost and _has_room(descriptor, 0):
                num_lost, self._num_lost = self._num_lost, 0
                self._write(descriptor, _lost(num_lost))
            self._write(descriptor, record)
        except Exception:  # noqa: BLE001 - as every handler of logging
            self.handleError(record)

    def _write(self, descriptor: int, record: logging.LogRecord) -> None:
        """Write a record, or count it as lost. It may be written in part."""
        rest = f"{self.format(record)}{self.terminator}".encode(errors="backslashreplace")
        while rest:
            if not _has_room(descriptor, 0 if self._num_lost else _ROOM_S):
                self._num_lost += 1
                return
            rest = rest[os.write(descriptor, rest[:_PIECE_BYTES]) :]


def _has_room(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(1000 * timeout_s))


def _lost(num_lines: int) -> logging.LogRecord:
    text = f"{num_lines} log lines were left out, because the program that reads the log had stopped reading"
    return logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text})


class Unquoted(logging.Filter):
    """Removes from gunicorn's log records what a client may have sent."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten the record where needed, and let it pass."""
        message = str(record.msg)
        if message.startswith("Invalid request from ip="):
            address, _, reason = message.partition(": ")
            record.msg, record.args = f"{address}: {reason.partition(':')[0].partition(chr(39))[0]}", ()
        elif record.args and (record.levelno <= logging.DEBUG or message.startswith("Error handling request")):
            record.msg, record.args = message.partition("%")[0].rstrip(), ()
        return True


def unquoted_traceback(exc_info: _ExcInfo) -> str:
    """Return the traceback of an exception and its causes, with their types but without their messages."""
    return "".join(_traceback_parts(exc_info[1]))


def _traceback_parts(error: BaseException) -> Iterator[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _traceback_parts(cause)
        yield "and then\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__}\n"


def _print_traceback(stream: TextIO, exc_info: _ExcInfo) -> None:
    stream.write(unquoted_traceback(exc_info))


def _log_config(level: str, log_format: str) -> dict[str, Any]:
    """A configuration for `logging.config.dictConfig`. Formats: auto, json, text."""
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    renderer: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_print_traceback)]
        if as_text
        else [structlog.processors.ExceptionRenderer(unquoted_traceback), structlog.processors.JSONRenderer()]
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
                "foreign_pre_chain": _SHARED,
            }
        },
        "handlers": {"stderr": {"()": PatientHandler, "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        "filters": {"unquoted": {"()": Unquoted}},
        "loggers": {
            "gunicorn.error": {"propagate": True, "handlers": [], "filters": ["unquoted"]},
            "flask-limiter": {"level": "WARNING"},  # the line of a refused request says so already
        },
    }


def configure_logs(level: str, log_format: str) -> None:
    """Configure logging for this process."""
    logging.config.dictConfig(_log_config(level, log_format))
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
