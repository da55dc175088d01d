"""The gunicorn process around the application. Settings, logging and shutdown are this service's own."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import sys
from typing import Any

import structlog
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from service.errors import AddressUnusable
from service.settings import SPARE_THREADS, Settings
from service.web.gunicorn.poller import ConnectionLimits
from service.web.gunicorn.worker import WorkerLimits, worker_class
from service.web.telemetry.logs import configure_logs

log = structlog.get_logger(__name__)

_SHM = "/dev/shm"  # noqa: S108 - gunicorn makes a file there as in any temporary folder
_EXIT_S = 8  # time between the end of the drain and the kill, in which the process closes its parts and exits
_BACKLOG = 2048  # connections that the kernel accepts for the process meanwhile
_MAX_DESCRIPTORS = 65_536
_MAX_DESCRIPTORS_MACOS = 10_240  # OPEN_MAX: macOS refuses a higher soft limit, even where the hard one is infinite
_OTHER_DESCRIPTORS = 128  # for models, keys, logs and whatever else the process opens
_WAITING_CONNECTIONS = 4096  # which no thread is answering


class _Logs(Logger):
    """Sends gunicorn's own events to the service's log. The application logs requests, with their ids."""

    def setup(self, cfg: Any) -> None:  # noqa: ARG002 - gunicorn's signature
        """Leave handlers and levels to `configure_logs`."""
        self.error_log.propagate = True

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        """Do nothing: the application logs requests."""


class _Arbiter(Arbiter):
    """gunicorn's parent process, without the signals that start another worker.

    Sessions may be in the worker's memory. Another process on the same socket would answer 404 for them.
    """

    has_terminal = False

    def handle_ttin(self) -> None:
        """SIGTTIN, with which gunicorn adds a worker."""
        self._ignore("SIGTTIN")

    def handle_ttou(self) -> None:
        """SIGTTOU, with which gunicorn removes a worker."""
        self._ignore("SIGTTOU")

    def handle_usr2(self) -> None:
        """SIGUSR2, with which gunicorn starts a second server on the same socket."""
        self._ignore("SIGUSR2")

    def handle_hup(self) -> None:
        """SIGHUP: the terminal of the server was closed, or gunicorn would replace the worker."""
        if self.has_terminal:
            self.handle_term()
        self._ignore("SIGHUP")

    def _ignore(self, name: str) -> None:
        log.warning(
            "signal ignored",
            signal=name,
            reason="a server has one worker, because another one would not find the sessions in its memory: "
            "start another replica instead",
        )


class Server(BaseApplication):
    """gunicorn with one worker; the application and its model are built in the worker, after the fork."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        super().__init__()

    def run(self) -> None:
        """Serve until a signal ends the process. Raises AddressUnusable."""
        resource.setrlimit(resource.RLIMIT_NOFILE, _descriptor_limits())
        self.cfg.set("bind", f"fd://{_listen(self.settings).detach()}")
        arbiter = _Arbiter(self)
        arbiter.has_terminal = sys.stderr.isatty()
        arbiter.run()

    def load_config(self) -> None:
        """Configure gunicorn. It reads no configuration file, environment variable or argument of its own."""
        configure_logs(self.settings.log_level, self.settings.log_format)
        for name, value in gunicorn_config(self.settings).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Build the WSGI application. gunicorn calls this in the worker."""
        from service.web.app import create_app

        app = create_app(self.settings)
        # What exists now stays. Python's collector would look at all of it each time that a request has made many
        # objects, such as the states of a form, and meanwhile no thread can run: some 60 ms.
        gc.collect()
        gc.freeze()
        return app


def gunicorn_config(settings: Settings) -> dict[str, Any]:
    """Return gunicorn's settings, under gunicorn's names."""
    num_threads = settings.num_http_threads
    is_shared = not settings.session_store.get_secret_value().startswith("memory:")
    num_reserved = _OTHER_DESCRIPTORS + num_threads * is_shared  # each thread may have a connection to Redis
    max_connections = min(num_threads + _WAITING_CONNECTIONS, _descriptor_limits()[0] - num_reserved)
    limits = WorkerLimits(
        ConnectionLimits(
            max_connections=max(max_connections, SPARE_THREADS),
            max_body_bytes=settings.max_body_bytes,
            request_timeout_s=settings.request_timeout_s,
            max_large_bytes=settings.large_bodies_bytes,
        ),
        min_threads=SPARE_THREADS,
        max_threads=num_threads,
        max_slow_readers=num_threads - SPARE_THREADS // 2,
        send_timeout_s=settings.send_timeout_s,
    )
    return {
        "workers": 1,  # batches and sessions live in one process; for more capacity, run more replicas
        "worker_class": worker_class(limits),
        "graceful_timeout": settings.drain_s + _EXIT_S,
        "timeout": 120,  # of the worker's main loop, not of a request; loading the model has to fit into it
        # Otherwise a proxy on this machine would pass on a client's headers that replace the scheme or the path.
        "forwarded_allow_ips": "",
        "control_socket_disable": True,  # it would be created in a home directory that may be read-only
        "worker_tmp_dir": _SHM if os.access(_SHM, os.W_OK) else None,  # in memory: it gets a heartbeat every second
        "logger_class": _Logs,
        "proc_name": "gru-serve",
    }


def _descriptor_limits() -> tuple[int, int]:
    """Return the soft and the hard limit of open files that the server runs with: it raises the soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_DESCRIPTORS_MACOS if sys.platform == "darwin" else _MAX_DESCRIPTORS
    highest = most if hard == resource.RLIM_INFINITY else min(hard, most)
    return (soft if soft != resource.RLIM_INFINITY and soft > highest else highest), hard


def _listen(settings: Settings) -> socket.socket:
    """Listen on the address of the settings. gunicorn itself would try five times, and not say what to change.

    A name is looked up, and its first IPv4 address is taken if it has one. `::` stands for all addresses, also of IPv4.
    """
    host, port = settings.host, settings.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = next((each for each in found if each[0] == socket.AF_INET), found[0])
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressUnusable(
                f"{address} is in use by another program: stop it, or choose another port with --port or GRU_SERVE_PORT"
            ) from error
        if error.errno == errno.EACCES:
            raise AddressUnusable(
                f"{address} needs privileges: choose a port above 1023 with --port or GRU_SERVE_PORT"
            ) from error
        raise AddressUnusable(
            f"can't listen on {address} ({error.strerror}): check --host or GRU_SERVE_HOST"
        ) from error
    return listener
