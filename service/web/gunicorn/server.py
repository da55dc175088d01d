"""The gunicorn process around the application. Settings, logging and shutdown are this service's own."""

from __future__ import annotations

import os
from typing import Any

import structlog
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from service.settings import SPARE_THREADS, Settings
from service.web.gunicorn.worker import worker_with_deadlines
from service.web.telemetry.logs import configure_logs

log = structlog.get_logger(__name__)

_SHM = "/dev/shm"  # noqa: S108
_EXIT_S = 8  # time between the end of the drain and the kill, in which the process closes its parts and exits
_KEEPALIVE_S = 75  # longer than balancers keep idle connections, so that they and not this server close them


class _Logs(Logger):
    """Sends gunicorn's own events to the service's log. The application logs requests, with their ids."""

    def setup(self, cfg: Any) -> None:  # noqa: ARG002
        """Leave handlers and levels to `configure_logs`."""
        self.error_log.propagate = True

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        """Do nothing: the application logs requests."""


class _Arbiter(Arbiter):
    """gunicorn's parent process, without the signals that change the number of workers or start a second server.

    Sessions may be in the worker's memory. Another process on the same socket would answer 404 for them.
    """

    def handle_ttin(self) -> None:
        """SIGTTIN, with which gunicorn adds a worker."""
        self._ignore("SIGTTIN")

    def handle_ttou(self) -> None:
        """SIGTTOU, with which gunicorn removes a worker."""
        self._ignore("SIGTTOU")

    def handle_usr2(self) -> None:
        """SIGUSR2, with which gunicorn starts a second server on the same socket."""
        self._ignore("SIGUSR2")

    def _ignore(self, name: str) -> None:
        log.warning(
            "signal ignored",
            signal=name,
            reason="a server has one worker, because another one would not find the sessions in its memory: "
            "start another replica instead",
        )


class Server(BaseApplication):
    """gunicorn with one gthread worker; the application and its model are built in the worker, after the fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        super().__init__()

    def run(self) -> None:
        """Serve until a signal ends the process."""
        _Arbiter(self).run()

    def load_config(self) -> None:
        """Configure gunicorn. It reads no configuration file, environment variable or argument of its own."""
        configure_logs(self.settings.log_level, self.settings.log_format)
        for name, value in gunicorn_config(self.settings).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Build the WSGI application. gunicorn calls this in the worker."""
        from service.web.app import create_app

        return create_app(self.settings)


def gunicorn_config(settings: Settings) -> dict[str, Any]:
    """Return gunicorn's settings, under gunicorn's names."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {
        "bind": f"{host}:{settings.port}",
        "workers": 1,  # batches and sessions live in one process; for more capacity, run more replicas
        "worker_class": worker_with_deadlines(
            settings.request_timeout_s, settings.send_timeout_s, settings.num_http_threads - SPARE_THREADS // 2
        ),
        "threads": settings.num_http_threads,
        "worker_connections": settings.num_http_threads + 1000,
        "keepalive": _KEEPALIVE_S,
        "graceful_timeout": settings.drain_s + _EXIT_S,
        "timeout": 120,  # of the worker's main loop, not of a request; loading the model has to fit into it
        # Otherwise a proxy on this machine would pass on a client's headers that replace the scheme or the path.
        "forwarded_allow_ips": "",
        "control_socket_disable": True,  # it would be created in a home directory that may be read-only
        "worker_tmp_dir": _SHM if os.access(_SHM, os.W_OK) else None,  # in memory: it gets a heartbeat every second
        "logger_class": _Logs,
        "proc_name": "gru-serve",
    }
