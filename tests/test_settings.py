"""Settings: read once, and a wrong one stops the start by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pydantic
import pytest

from service.errors import InvalidSettings
from service.settings import Settings, read_settings


def test_the_defaults() -> None:
    settings = read_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "shakespeare")
    assert settings.model_store == Path("model_store")
    assert settings.max_tokens == 8192


def test_variables_set_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PORT", "9000")
    monkeypatch.setenv("GRU_SERVE_MAX_TOKENS", "7")
    settings = read_settings(port=9001, host=None)
    assert (settings.port, settings.max_tokens, settings.host) == (9001, 7, "127.0.0.1")


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PORT", "")
    assert read_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "http"), ("PORT", "70000"), ("MAX_TOKENS", "0"), ("LOG_LEVEL", "x")]
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"GRU_SERVE_{name}", value)
    with pytest.raises(InvalidSettings, match=f"GRU_SERVE_{name}={value}"):
        read_settings()


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_MAX_TOKEN", "7")
    with pytest.raises(InvalidSettings, match=r"GRU_SERVE_MAX_TOKEN is not a setting.*GRU_SERVE_MAX_TOKENS"):
        read_settings()


def test_there_are_threads_for_all_texts_and_for_refusing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(max_batch=10, max_queue=20).num_http_threads == 46
    monkeypatch.setenv("GRU_SERVE_HTTP_THREADS", "45")
    with pytest.raises(InvalidSettings, match="http_threads has to be 46 at least"):
        read_settings(max_batch=10, max_queue=20)
    assert read_settings(max_batch=10, max_queue=19).num_http_threads == 45


def test_the_engine_has_a_core_and_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert read_settings().num_engine_threads == 3
    assert read_settings(engine_threads=2).num_engine_threads == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert read_settings().num_engine_threads == 1


def test_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_STATE_KEYS", "a long enough key, tooshort")
    with pytest.raises(InvalidSettings, match="GRU_SERVE_STATE_KEYS") as error:
        read_settings()
    assert "tooshort" not in str(error.value)
    monkeypatch.setenv("GRU_SERVE_STATE_KEYS", "a long enough key, another long key,")
    settings = read_settings()
    assert settings.state_key_list == ["a long enough key", "another long key"]
    assert "long" not in repr(settings)


def test_settings_are_frozen() -> None:
    with pytest.raises((pydantic.ValidationError, dataclasses.FrozenInstanceError)):
        Settings().port = 1  # type: ignore[misc]
