"""Settings: the only reader of the environment. Read once at start; a bad or unknown variable stops the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import InvalidSettings

PREFIX = "GRU_SERVE_"
_MIN_KEY_CHARS = 16
SPARE_THREADS = 16  # HTTP threads that completions never occupy: health checks and refusals stay prompt


class Settings(BaseSettings):
    """What the service can be told, as `GRU_SERVE_<NAME>` or `gru-serve serve --<name>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model_store: Path = Field(Path("model_store"), description="directory of the model store")
    model: str = Field("shakespeare", description="model that is loaded at start and used by requests that name none")
    max_models: int = Field(4, ge=1, le=1000, description="model versions kept loaded; the least recently used goes")
    precision: Literal["auto", "int8", "int4"] = Field(
        "auto", description="integers of the recurrent weights; auto: the fewest bits that cost the model nothing"
    )
    kernel: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="what computes: the kernel in C++, or torch, with the same results; auto: C++ if it is there",
    )
    engine_threads: int = Field(0, ge=0, le=256, description="cores that the engine computes with; 0: all but one")
    max_batch: int = Field(256, ge=1, le=65_536, description="texts that are stepped side by side")
    max_queue: int = Field(256, ge=0, le=65_536, description="texts that wait for a place; more are refused (429)")
    prefix_cache_bytes: int = Field(
        2**26, ge=0, le=2**40, description="memory for the states after prompts, of each model; 0: no cache"
    )
    stall_s: float = Field(30.0, gt=0, le=3600, description="seconds after which a step counts as stuck (not ready)")
    http_threads: int = Field(
        0, ge=0, le=131_072, description="requests answered side by side; 0: as many as fit batch and queue, and some"
    )
    max_tokens: int = Field(8192, ge=1, le=10_000_000, description="most characters a request may generate")
    max_prompt_chars: int = Field(100_000, ge=1, le=100_000_000, description="longest prompt, in characters")
    max_body_bytes: int = Field(1_048_576, ge=1024, le=1_000_000_000, description="largest request body")
    request_timeout_s: int = Field(30, ge=1, le=3600, description="seconds a client may take to send a request")
    send_timeout_s: int = Field(
        20, ge=1, le=3600, description="seconds after which a client that reads nothing is dropped"
    )
    drain_s: int = Field(30, ge=0, le=3600, description="seconds that running requests get to finish at shutdown")
    drain_notice_s: float = Field(
        0.0, ge=0, le=3600, description="of these, seconds that a balancer gets to notice, also when nothing is running"
    )
    session_store: SecretStr = Field(
        SecretStr("memory://"),
        description="where sessions are kept: memory://, or redis://[user:password@]host:port/db, which several "
        "replicas share and which outlives them",
    )
    session_ttl_s: float = Field(
        3600.0, ge=1, le=2_592_000, description="seconds a session lives after its last use, if it says nothing else"
    )
    max_sessions: int = Field(
        1_000_000,
        ge=1,
        le=100_000_000,
        description="sessions kept in memory; more push out the least recently used idle one",
    )
    max_session_bytes: int = Field(
        2**30,
        ge=2**24,
        le=2**44,
        description="memory for all sessions, or with Redis for those in use lately; more pushes out the least "
        "recently used",
    )
    session_text_chars: int = Field(
        65_536, ge=1024, le=10_000_000, description="characters of its text that a session retains, at least"
    )
    session_checkpoint_chars: int = Field(
        256, ge=16, le=65_536, description="characters between states kept on the way, for going back"
    )
    state_keys: SecretStr = Field(
        SecretStr(""),
        description="secrets that sign portable states, separated by commas: the first signs, all are accepted; "
        "none: a random one, and states end with the process",
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="who may ask: entries name:sha256-hex, separated by commas, as `gru-serve keys new` prints them; "
        "none here and no file: everybody",
    )
    api_keys_file: Path | None = Field(
        None, description="file with such entries, one a line; read again when it changes"
    )
    rate_limit: str = Field(
        "",
        description="how often one key, or without keys one address, may start something: 600/minute; empty: no limit",
    )
    max_streams: int = Field(
        0, ge=0, le=131_072, description="streams that one key, or without keys one address, may have open; 0: no limit"
    )
    model_poll_s: float = Field(
        30.0, ge=0, le=86_400, description="seconds between two looks for new model versions; 0: never"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON lines")

    @model_validator(mode="after")
    def _threads_fit(self) -> Self:
        least = self.max_batch + self.max_queue + SPARE_THREADS
        if 0 < self.http_threads < least:
            raise ValueError(f"http_threads has to be {least} at least, for max_batch, max_queue and what refuses more")
        return self

    @model_validator(mode="after")
    def _notice_fits(self) -> Self:
        if self.drain_notice_s > self.drain_s:
            raise ValueError(f"drain_notice_s is part of drain_s, which is {self.drain_s}, and can't be longer")
        return self

    @field_validator("session_store")
    @classmethod
    def _store_is_known(cls, store: SecretStr) -> SecretStr:
        if urlsplit(store.get_secret_value()).scheme not in ("memory", "redis", "rediss", "unix"):
            raise ValueError("has to begin with memory://, redis://, rediss:// or unix://")
        return store

    @field_validator("state_keys")
    @classmethod
    def _keys_are_long(cls, keys: SecretStr) -> SecretStr:
        if any(len(key) < _MIN_KEY_CHARS for key in _split(keys)):
            raise ValueError(f"each key has to have {_MIN_KEY_CHARS} characters at least")
        return keys

    @field_validator("rate_limit")
    @classmethod
    def _is_a_rate(cls, rate: str) -> str:
        if rate:
            from limits import parse_many  # a tenth of a second, for those who need it

            try:
                limits = parse_many(rate)
            except ValueError:
                raise ValueError("a rate is a number and a time, such as 600/minute or 10/second;600/minute") from None
            if any(limit.amount < 1 for limit in limits):
                raise ValueError("a rate of 0 would refuse everything")
        return rate

    @property
    def state_key_list(self) -> list[str]:
        """`state_keys`, one by one."""
        return _split(self.state_keys)

    @property
    def num_http_threads(self) -> int:
        """`http_threads`, worked out."""
        return self.http_threads or self.max_batch + self.max_queue + SPARE_THREADS

    @property
    def integer_precision(self) -> Literal["int8", "int4"] | None:
        """`precision`; None: the model's own."""
        return None if self.precision == "auto" else self.precision

    @property
    def num_engine_threads(self) -> int:
        """`engine_threads`, worked out: HTTP needs a core too."""
        return self.engine_threads or max(1, len(os.sched_getaffinity(0)) - 1)


def _split(keys: SecretStr) -> list[str]:
    return [key for part in keys.get_secret_value().split(",") if (key := part.strip())]


def read_settings(**overrides: Any) -> Settings:
    """The settings of the environment, with overrides from the command line. Raises InvalidSettings."""
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
        raise InvalidSettings(f"{PREFIX}{field.upper()}={value}: {first['msg']}", param=field) from error


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise InvalidSettings(f"{unknown[0]} is not a setting; there are: {', '.join(sorted(known))}")
