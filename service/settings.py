"""The settings of the service, and the only code that reads environment variables.

The settings are read once at startup. An unusable value or an unknown `GRU_SERVE_` variable stops the start with an
error, which names the variable and never shows the value of a secret.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.cores import available_cores
from service.errors import InvalidSettings
from service.model.quantize import IntegerPrecision

PREFIX = "GRU_SERVE_"
_MIN_KEY_CHARS = 16
_MAX_PROXIES = 16
_HOST = re.compile(r"(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9_.:\[\]-]{1,255}")
_METRICS_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}[:_]")
_MAX_PREFIXES = 4
_SESSION_STORES = (
    "memory", "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"
)  # fmt: skip
# Variables that Kubernetes sets in every pod for a service whose name begins with gru-serve. They are not settings.
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)",
    re.IGNORECASE,
)
_SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://\S+")
SPARE_THREADS = 16  # HTTP threads that never wait for an engine, so that health checks and refusals stay fast


def otlp_is_configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables say that traces are exported. Its libraries read the rest of them."""
    targets = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    has_exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
    return has_exporter and not is_disabled and any(environment.get(name) for name in targets)


class Settings(BaseSettings):
    """Every setting of the service: variable `GRU_SERVE_<NAME>`, option `gru-serve serve --<name>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    model_store: Path = Field(Path("model_store"), description="directory of the model store")
    model: str = Field("shakespeare", description="default model: loaded at startup, used by requests that name none")
    chat_template: str = Field(
        "", description="chat template of versions that have none: play, dialogue, lines, or a file; empty: none"
    )
    max_models: int = Field(
        4, ge=1, le=1000, description="model versions loaded at a time; one more evicts the least recently used"
    )
    precision: Literal["auto", IntegerPrecision] = Field(
        "auto", description="integer type of the recurrent weights; auto: the type that the model's training chose"
    )
    kernel: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="implementation of the network: native (C++) or torch, with identical results; "
        "auto: native if it was compiled",
    )
    engine_threads: int = Field(0, ge=0, le=256, description="CPU cores that an engine uses; 0: all but one")
    max_batch: int = Field(256, ge=1, le=65_536, description="texts that a model computes at the same time")
    max_queue: int = Field(
        256, ge=0, le=65_536, description="texts that may wait for a place in the batch; more are refused (429)"
    )
    max_text_bytes: int = Field(
        2**27,
        ge=2**20,
        le=2**44,
        description="memory of all texts that are computed or wait, of all models: prompts, states and checkpoints; "
        "one client may have half of it; more are refused (429)",
    )
    prefix_cache_bytes: int = Field(
        2**25, ge=0, le=2**40, description="bytes per model for caching the states after recent texts; 0: no cache"
    )
    stall_s: float = Field(
        30.0, gt=0, le=3600, description="seconds after which a step of the engine counts as stuck, and /readyz fails"
    )
    http_threads: int = Field(
        0,
        ge=0,
        le=131_072,
        description="requests handled at the same time; 0: max_batch + max_queue, a quarter more for other clients if "
        f"one has taken those, and {SPARE_THREADS}",
    )
    max_tokens: int = Field(8192, ge=1, le=10_000_000, description="most characters that one request may generate")
    max_prompt_chars: int = Field(
        100_000, ge=1, le=100_000_000, description="longest accepted prompt or fed text, in characters"
    )
    max_scores: int = Field(
        2 * 2_100_000,  # one client can score a prompt of 100,000 characters with all alternatives
        ge=1000,
        le=2**40,
        description="log-probabilities in memory, of all requests together; one client may have half of them; more are "
        "refused. A scored character has one, and each alternative to it another",
    )
    max_body_bytes: int = Field(1_048_576, ge=1024, le=1_000_000_000, description="largest accepted request body")
    max_large_bodies_bytes: int = Field(
        2**24,
        ge=2**20,
        le=2**40,
        description="bytes of request bodies above 64 KiB, from their first byte to the end of their request; at least "
        "four of the largest bodies; a client's requests in progress may have half of it; more are refused (429)",
    )
    request_timeout_s: int = Field(30, ge=1, le=3600, description="seconds a client may take to send a request")
    send_timeout_s: int = Field(
        20, ge=1, le=3600, description="seconds after which a client that reads nothing is disconnected"
    )
    drain_s: int = Field(30, ge=0, le=3600, description="seconds that running requests may take at shutdown")
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        le=3600,
        description="part of drain_s during which the process stays up even if idle, so that balancers notice",
    )
    session_store: SecretStr = Field(
        SecretStr("memory://"),
        description="where sessions are stored: memory://, or redis://[user:password@]host:port/db, which replicas "
        "share and which survives their restarts, or another URL that docs/redis.md lists",
    )
    session_ttl_s: float = Field(
        3600.0, ge=1, le=2_592_000, description="seconds after its last use until a session expires, by default"
    )
    max_sessions: int = Field(
        1_000_000,
        ge=1,
        le=100_000_000,
        description="sessions held in memory; one more evicts the least recently used idle session",
    )
    max_session_bytes: int = Field(
        3 * 2**28,
        ge=2**24,
        le=2**44,
        description="memory for sessions (with Redis: for cached ones); the least recently used are evicted above it",
    )
    session_text_chars: int = Field(
        65_536, ge=1024, le=10_000_000, description="most recent characters of its text that a session always retains"
    )
    session_checkpoint_chars: int = Field(
        256,
        ge=16,
        le=65_536,
        description="characters between the states that a session stores so that it can be rewound",
    )
    state_keys: SecretStr = Field(
        SecretStr(""),
        description="comma-separated secrets for signing portable states: the first signs, all are accepted; "
        "empty: a random secret, so states become invalid when the process ends",
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="accepted API keys: comma-separated name:sha256-hex entries, as `gru-serve keys new` prints them; "
        "empty and no file: everybody has access",
    )
    api_keys_file: Path | None = Field(
        None,
        description="file with API keys: name:sha256-hex entries as `gru-serve keys new` prints them, one per line; "
        "read again when it changes",
    )
    allowed_hosts: str = Field(
        "",
        description="names by which clients may call the server, comma-separated, such as "
        "api.example.org,*.example.org; *: any; empty: loopback names on a loopback address, any elsewhere",
    )
    allowed_origins: str = Field(
        "",
        description="origins whose web pages may call the server, comma-separated, such as https://example.org; "
        "*: all; empty: only its own page",
    )
    trusted_proxies: str = Field(
        "",
        description="number of proxies in front of the server, or their networks, comma-separated, such as 10.0.0.0/8: "
        "their X-Forwarded-For names the client; empty: no proxy is trusted",
    )
    rate_limit: str = Field(
        "",
        description="limit on POST and PUT requests for each API key (without keys: each address), such as 600/minute; "
        "empty: no limit",
    )
    max_streams: int = Field(
        0,
        ge=0,
        le=131_072,
        description="open streams for each API key (without keys: each address); 0: no limit",
    )
    model_poll_s: float = Field(
        30.0, ge=0, le=86_400, description="seconds between checks for new model versions; 0: never"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="format of the log; auto: text on a terminal, JSON lines otherwise"
    )

    metrics_prefixes: str = Field(
        "gru_serve:",
        description="prefixes of the names of metrics, comma-separated: each metric has one name with each of them",
    )

    @field_validator("host")
    @classmethod
    def _remove_brackets(cls, host: str) -> str:
        """[::1] is how URLs write the address ::1."""
        return host.removeprefix("[").removesuffix("]")

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_address(cls, port: object) -> object:
        """For a service named gru-serve, Kubernetes sets GRU_SERVE_PORT to its address: the default counts then."""
        is_address = isinstance(port, str) and _SERVICE_ADDRESS.fullmatch(port)
        return cls.model_fields["port"].default if is_address else port

    @model_validator(mode="after")
    def _check_threads(self) -> Self:
        min_threads = self.max_batch + self.max_queue + SPARE_THREADS
        if 0 < self.http_threads < min_threads:
            raise ValueError(
                f"{PREFIX}HTTP_THREADS={self.http_threads}: must be at least {min_threads}: "
                f"{PREFIX}MAX_BATCH + {PREFIX}MAX_QUEUE + {SPARE_THREADS}"
            )
        return self

    @model_validator(mode="after")
    def _check_drain_notice(self) -> Self:
        if self.drain_notice_s > self.drain_s:
            raise ValueError(
                f"{PREFIX}DRAIN_NOTICE_S={self.drain_notice_s:g}: the notice is a part of the drain, "
                f"so it must be at most {PREFIX}DRAIN_S={self.drain_s:g}"
            )
        return self

    @field_validator("metrics_prefixes")
    @classmethod
    def _check_metrics_prefixes(cls, prefixes: str) -> str:
        found = _split(prefixes)
        if not 0 < len(found) <= _MAX_PREFIXES or not all(map(_METRICS_PREFIX.fullmatch, found)):
            raise ValueError(
                f"1 to {_MAX_PREFIXES} prefixes, each of letters, digits and underscores, with `:` or `_` at its end, "
                "such as gru_serve:,vllm:"
            )
        return prefixes

    @field_validator("session_store")
    @classmethod
    def _check_session_store(cls, store: SecretStr) -> SecretStr:
        if store.get_secret_value().partition("://")[0] not in _SESSION_STORES:
            raise ValueError(f"must begin with {', '.join(f'{scheme}://' for scheme in _SESSION_STORES)}")
        return store

    @field_validator("state_keys")
    @classmethod
    def _check_state_keys(cls, keys: SecretStr) -> SecretStr:
        if any(len(key) < _MIN_KEY_CHARS for key in _split(keys.get_secret_value())):
            raise ValueError(f"each key must have at least {_MIN_KEY_CHARS} characters")
        return keys

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, hosts: str) -> str:
        for host in _split(hosts):
            if host != "*" and not _HOST.fullmatch(host) and not _is_address(host):
                raise ValueError("a host is a name such as api.example.org or *.example.org, without scheme and port")
        return hosts

    @field_validator("allowed_origins")
    @classmethod
    def _check_allowed_origins(cls, origins: str) -> str:
        for origin in _split(origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError("an origin is a scheme and a host, such as https://example.org, without a path")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _check_trusted_proxies(cls, proxies: str) -> str:
        try:
            _parse_proxies(proxies)
        except ValueError:
            raise ValueError(
                f"must be a number of proxies, 0 to {_MAX_PROXIES}, or networks such as 10.0.0.0/8,192.168.1.7"
            ) from None
        return proxies

    @field_validator("rate_limit")
    @classmethod
    def _check_rate_limit(cls, rate: str) -> str:
        if rate:
            from limits import parse_many  # takes 0.1 s to import, so only if a limit is set

            try:
                limits = parse_many(rate)
            except ValueError:
                raise ValueError("a rate is a number and a time, such as 600/minute or 10/second;600/minute") from None
            if any(limit.amount < 1 for limit in limits):
                raise ValueError("a rate of 0 would refuse everything")
        return rate

    @property
    def state_key_list(self) -> list[str]:
        """The keys in `state_keys`, as a list."""
        return _split(self.state_keys.get_secret_value())

    @property
    def allowed_host_list(self) -> list[str]:
        """The names in `allowed_hosts`, in lower case; IPv6 addresses without brackets."""
        return [host.lower().strip("[]") for host in _split(self.allowed_hosts)]

    @property
    def allowed_origin_list(self) -> list[str]:
        """The origins in `allowed_origins`, in lower case."""
        return [origin.lower() for origin in _split(self.allowed_origins)]

    @property
    def metrics_prefix_list(self) -> list[str]:
        """The prefixes in `metrics_prefixes`, each once."""
        return list(dict.fromkeys(_split(self.metrics_prefixes)))

    @property
    def parsed_proxies(self) -> int | list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """`trusted_proxies` as a number of proxies, or as networks."""
        return _parse_proxies(self.trusted_proxies)

    @property
    def num_http_threads(self) -> int:
        """`http_threads`, or what 0 stands for."""
        num_texts = self.max_batch + self.max_queue
        return self.http_threads or num_texts + math.ceil(num_texts / 4) + SPARE_THREADS

    @property
    def large_bodies_bytes(self) -> int:
        """`max_large_bodies_bytes`, or more if four of the largest bodies would not fit.

        One client may have half. Then half of the rest, which a second client may have, still holds a largest body.
        """
        return max(self.max_large_bodies_bytes, 4 * self.max_body_bytes)

    @property
    def integer_precision(self) -> IntegerPrecision | None:
        """`precision`, or None for the model's own."""
        return None if self.precision == "auto" else self.precision

    @property
    def uses_shipped_models(self) -> bool:
        """Whether no model store was named, and the current directory has nothing of its default name.

        A link to nothing of that name is an error and not the same as nothing.
        """
        return (
            "model_store" not in self.model_fields_set
            and not os.path.lexists(self.model_store)
            and shipped_models() is not None
        )

    @property
    def store_root(self) -> Path:
        """The directory that models are read from: `model_store`, or that of the shipped models."""
        shipped = shipped_models()
        return shipped if shipped is not None and self.uses_shipped_models else self.model_store

    @property
    def num_engine_threads(self) -> int:
        """`engine_threads`, or what 0 stands for: one core is left for HTTP."""
        return self.engine_threads or max(1, available_cores() - 1)


def shipped_models() -> Path | None:
    """Return the store of the models that this package was installed with; None if it has none."""
    package = Path(__file__).parent
    if (package / "shipped_models").is_dir():  # setup.py puts them into a wheel
        return package / "shipped_models"
    checkout = package.parent
    return (
        checkout / "model_store" if (checkout / "setup.py").is_file() and (checkout / "model_store").is_dir() else None
    )


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set a variable, for a service such as gru-serve or gru-serve-direct."""
    is_address = name.upper().endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value) is not None
    return is_address or _SERVICE_LINK.fullmatch(name) is not None


def _split(listed: str) -> list[str]:
    return [entry for part in listed.split(",") if (entry := part.strip())]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _parse_proxies(proxies: str) -> int | list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return a number of proxies, or networks. Raises ValueError if the text is neither."""
    if not re.fullmatch("[0-9]*", proxies):
        return [ipaddress.ip_network(network) for network in _split(proxies)]
    number = int(proxies or "0")
    if number > _MAX_PROXIES:
        raise ValueError(proxies)
    return number


def read_settings(**overrides: Any) -> Settings:
    """Return the settings of the environment.

    Args:
        overrides: values that take precedence over the environment, such as command-line options. None means not given.

    Raises:
        InvalidSettings: a value is unusable, or a `GRU_SERVE_` variable is not a setting.
    """
    _refuse_unknown(os.environ)
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise InvalidSettings(first["msg"].removeprefix("Value error, ")) from error
        field = str(first["loc"][0])
        is_secret = Settings.model_fields[field].annotation is SecretStr
        value = "..." if is_secret else str(first.get("input"))[:80]
        fault = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        fault = fault.partition(", unable to parse")[0]
        raise InvalidSettings(f"{PREFIX}{field.upper()}={value}: {fault}", param=field) from error


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    named = {name for name in environ if name.upper().startswith(PREFIX) and not _is_service_link(name, environ[name])}
    unknown = sorted(name for name in named if name.upper() not in known)
    if unknown:
        close = get_close_matches(unknown[0].upper(), known, 1)
        advice = f"did you mean {close[0]}?" if close else f"the settings are: {', '.join(sorted(known))}"
        raise InvalidSettings(f"{unknown[0]} is not a setting: {advice}")
