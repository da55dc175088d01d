"""Settings: they are read once, and an unusable one stops the start with an error that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest

from service.errors import InvalidSettings
from service.settings import Settings, read_settings, shipped_models


def test_settings__have_defaults() -> None:
    settings = read_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "shakespeare")
    assert settings.model_store == Path("model_store")
    assert settings.max_tokens == 8192


def test_settings__options_take_precedence_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PORT", "9000")
    monkeypatch.setenv("GRU_SERVE_MAX_TOKENS", "7")
    settings = read_settings(port=9001, host=None)
    assert (settings.port, settings.max_tokens, settings.host) == (9001, 7, "127.0.0.1")


def test_settings__an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_PORT", "")
    assert read_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("MAX_TOKENS", "0"),
        ("LOG_LEVEL", "x"),
        ("PRECISION", "float32"),
        ("RATE_LIMIT", "often"),
        ("RATE_LIMIT", "0/minute"),
        ("ALLOWED_HOSTS", "http://example.org"),
        ("ALLOWED_HOSTS", "localhost,example.org:80"),
        ("ALLOWED_HOSTS", "a.*.org"),
        ("ALLOWED_HOSTS", "10.0.0.0/8"),
        ("ALLOWED_ORIGINS", "example.org"),
        ("ALLOWED_ORIGINS", "https://example.org/"),
        ("ALLOWED_ORIGINS", "null"),
        ("TRUSTED_PROXIES", "-1"),
        ("TRUSTED_PROXIES", "17"),
        ("TRUSTED_PROXIES", "balancer"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "1,10.0.0.0/8"),
    ],
)
def test_settings__an_error_names_the_variable_and_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"GRU_SERVE_{name}", value)
    with pytest.raises(InvalidSettings, match=re.escape(f"GRU_SERVE_{name}={value}: ")):
        read_settings()


def test_settings__an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_MAX_TOKEN", "7")
    with pytest.raises(InvalidSettings, match=r"GRU_SERVE_MAX_TOKEN is not a setting.*GRU_SERVE_MAX_TOKENS"):
        read_settings()


def test_settings__http_threads_suffice_for_all_texts_and_for_refusing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(max_batch=10, max_queue=20).num_http_threads == 30 + 8 + 16
    monkeypatch.setenv("GRU_SERVE_HTTP_THREADS", "45")
    with pytest.raises(InvalidSettings, match="GRU_SERVE_HTTP_THREADS=45: must be at least 46"):
        read_settings(max_batch=10, max_queue=20)
    assert read_settings(max_batch=10, max_queue=19).num_http_threads == 45


def test_settings__the_drain_notice_is_part_of_the_drain() -> None:
    assert read_settings(drain_s=3, drain_notice_s=3.0).drain_notice_s == 3
    with pytest.raises(InvalidSettings, match=r"GRU_SERVE_DRAIN_NOTICE_S=3\.1: .* at most GRU_SERVE_DRAIN_S=3"):
        read_settings(drain_s=3, drain_notice_s=3.1)


def test_settings__the_engine_leaves_one_core_for_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert read_settings().num_engine_threads == 3
    assert read_settings(engine_threads=2).num_engine_threads == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert read_settings().num_engine_threads == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("STATE_KEYS", "a long enough key, confidential"), ("SESSION_STORE", "http://:confidential@host")],
)
def test_settings__an_error_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"GRU_SERVE_{name}", value)
    with pytest.raises(InvalidSettings, match=f"GRU_SERVE_{name}=...: ") as error:
        read_settings()
    assert "confidential" not in str(error.value)


def test_settings__state_keys_are_split_and_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_SERVE_STATE_KEYS", "a long enough key, another long key,")
    settings = read_settings()
    assert settings.state_key_list == ["a long enough key", "another long key"]
    assert "long" not in repr(settings)


def test_settings__lists_of_hosts_origins_and_proxies_are_parsed() -> None:
    settings = read_settings(
        allowed_hosts="API.example.org, *.example.org,[FD00::1],10.0.0.7,my_app,",
        allowed_origins=" HTTPS://Example.org:8443 ,app://page,*",
        trusted_proxies="10.0.0.0/8, fd00::/8,192.168.1.7",
    )
    assert settings.allowed_host_list == ["api.example.org", "*.example.org", "fd00::1", "10.0.0.7", "my_app"]
    assert settings.allowed_origin_list == ["https://example.org:8443", "app://page", "*"]
    assert list(map(str, settings.parsed_proxies)) == ["10.0.0.0/8", "fd00::/8", "192.168.1.7/32"]  # type: ignore[arg-type]
    assert [read_settings(trusted_proxies=number).parsed_proxies for number in ("", "0", "2")] == [0, 0, 2]


def test_settings__can_not_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


# What Kubernetes sets in every pod of a namespace that has the services gru-serve and gru-serve-direct.
SERVICE_LINKS = {
    "GRU_SERVE_SERVICE_HOST": "10.0.0.1",
    "GRU_SERVE_SERVICE_PORT": "8000",
    "GRU_SERVE_SERVICE_PORT_HTTP": "8000",
    "GRU_SERVE_PORT": "tcp://10.0.0.1:8000",
    "GRU_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "GRU_SERVE_PORT_8000_TCP_PROTO": "tcp",
    "GRU_SERVE_PORT_8000_TCP_PORT": "8000",
    "GRU_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "GRU_SERVE_DIRECT_SERVICE_HOST": "fd00::7",
    "GRU_SERVE_DIRECT_SERVICE_PORT_HTTP_METRICS": "80",
    "GRU_SERVE_DIRECT_PORT": "udp://[fd00::7]:53",
    "GRU_SERVE_DIRECT_PORT_53_UDP_ADDR": "fd00::7",
}


def test_settings__ignore_what_kubernetes_sets_for_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert read_settings().port == 8000
    assert read_settings(port=9000).port == 9000
    monkeypatch.setenv("GRU_SERVE_PORT", "tcp:10.0.0.1")
    with pytest.raises(InvalidSettings, match="GRU_SERVE_PORT"):
        read_settings()


@pytest.mark.parametrize("name", ["SERVICE", "PORT_8000", "PORTS", "DIRECT_PORT", "SERVICE_HOSTS"])
def test_settings__refuse_what_only_resembles_kubernetes_variables(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"GRU_SERVE_{name}", "8000")
    with pytest.raises(InvalidSettings, match=f"GRU_SERVE_{name} is not a setting"):
        read_settings()


def test_settings__an_address_may_have_the_brackets_of_a_url() -> None:
    assert (read_settings(host="[::1]").host, read_settings(host="::").host) == ("::1", "::")


def test_settings__without_a_store_the_shipped_models_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_models()
    assert shipped is not None
    assert (shipped / "shakespeare").is_dir()
    settings = read_settings()
    assert settings.uses_shipped_models
    assert settings.store_root == shipped
    for named in (read_settings(model_store=Path("elsewhere")), read_settings(model_store=Path("model_store"))):
        assert not named.uses_shipped_models
        assert named.store_root == named.model_store
    monkeypatch.setenv("GRU_SERVE_MODEL_STORE", "model_store")
    assert not read_settings().uses_shipped_models
    monkeypatch.delenv("GRU_SERVE_MODEL_STORE")
    (tmp_path / "model_store").mkdir()
    assert not settings.uses_shipped_models
    assert settings.store_root == Path("model_store")
