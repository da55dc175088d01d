"""What is logged, and what must never be logged."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key
from service.generation.completion import Completion
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.telemetry.logs import Unquoted
from tests.harness.application import client_of

KEY, ENTRY = new_key("alice")
AUTHORISED = {"Authorization": f"Bearer {KEY}"}
PROMPT, SESSION = "O Romeo, a secret", "f00d-and-nobody-knows-it"
SECRETS = (PROMPT, "Romeo", SESSION, KEY, KEY[4:], ENTRY.partition(":")[2])


@pytest.fixture
def logged() -> io.StringIO:
    """The text that the application logs."""
    return io.StringIO()


@pytest.fixture
def closed(tiny_store: ModelStore, logged: io.StringIO) -> Iterator[FlaskClient]:
    """A client of an application with API keys that logs at the level debug."""
    settings = Settings(
        model_store=tiny_store.root, model="tiny", api_keys=SecretStr(ENTRY), log_format="json", log_level="debug"
    )
    with client_of(settings) as client:
        client.application.config["PROPAGATE_EXCEPTIONS"] = False
        (handler,) = [handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler)]
        handler.setStream(logged)
        yield client
        logging.root.removeHandler(handler)


def test_log_line__has_the_name_of_the_key(closed: FlaskClient, logged: io.StringIO) -> None:
    stream = closed.post("/v1/completions", json={"prompt": "a", "stream": True}, headers=AUTHORISED)
    stream.get_data()
    stream.close()
    closed.get("/healthz")
    closed.get("/v1/models")
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    named = [(line["event"], line.get("path"), line.get("key_name")) for line in lines]
    assert named == [
        ("request", "/v1/completions", "alice"),
        ("stream ended", None, "alice"),
        ("request", "/healthz", None),
        ("request", "/v1/models", None),
    ]
    assert lines[0]["request_id"] == lines[1]["request_id"]


def test_log__never_has_a_prompt_a_key_or_the_id_of_a_session(
    closed: FlaskClient, logged: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call every route with every method: valid, invalid, on unknown paths, and with an unexpected exception."""
    secret = {"text": PROMPT, "prompt": PROMPT, "seed": 7, "max_tokens": 3, "position": 3, "id": f"{SESSION}2"}
    fields = {
        "/v1/completions": ("prompt", "max_tokens"), "/v1/sessions": ("text",), "/v1/sessions/<id>": ("text",),
        "/v1/sessions/<id>/feed": ("text",), "/v1/sessions/<id>/generate": ("max_tokens",),
        "/v1/sessions/<id>/rewind": ("position",), "/v1/sessions/<id>/fork": ("id",), "/admin/reload": (),
    }  # fmt: skip
    statuses: set[int] = set()

    def send(method: str, path: str, **how: object) -> None:
        response = closed.open(path, method=method, **how)  # type: ignore[arg-type]
        response.get_data()
        response.close()
        statuses.add(response.status_code)

    for rule in sorted(closed.application.url_map.iter_rules(), key=lambda rule: rule.rule):
        path = rule.rule.replace("<id>", SESSION).replace("<path:asset>", SESSION)
        valid = {name: secret[name] for name in fields.get(rule.rule, ())}
        # DELETE is last, because the other methods need the session.
        for method in sorted({*(rule.methods or ()), "PATCH", "PROPFIND"}, key=lambda name: (name == "DELETE", name)):
            send(method, path, json=valid)
            send(method, path, json=valid, headers=AUTHORISED)
            send(method, path, json=valid | {"stream": True}, headers=AUTHORISED)
            send(method, path, json=secret | {"unknown": PROMPT}, headers=AUTHORISED)
            send(method, path, data=f'{{"prompt": "{PROMPT}"', content_type="application/json", headers=AUTHORISED)
            send(method, f"{path}/{PROMPT}/{SESSION}", json=valid, headers=AUTHORISED)
            send(method, f"{path}?after={PROMPT}&to={SESSION}", json=valid, headers=AUTHORISED)
            send(method, path, json=valid, headers={"Authorization": f"Bearer {KEY}x", "X-Request-Id": PROMPT})
    send(SESSION.upper(), "/healthz", headers=AUTHORISED)
    send("PUT", f"/v1/sessions/{SESSION}", json={"text": PROMPT, "seed": 7}, headers=AUTHORISED)
    send("POST", f"/v1/sessions/{SESSION}/feed", json={"text": PROMPT + "§"}, headers=AUTHORISED)
    send("POST", f"/v1/sessions/{SESSION}/feed", json={"text": PROMPT, "position": 9}, headers=AUTHORISED)

    def fail(*_: object) -> None:
        try:
            raise KeyError(("alice", SESSION))
        except KeyError as error:
            raise ValueError(f"{PROMPT} {KEY}") from error

    monkeypatch.setattr(Completion, "wholes", fail)
    send("POST", "/v1/completions", json={"prompt": PROMPT}, headers=AUTHORISED)
    assert statuses >= {200, 201, 204, 400, 401, 404, 405, 409, 500}
    text = logged.getvalue()
    assert len(text.splitlines()) > 300
    for secret_text in SECRETS:
        assert secret_text.lower() not in text.lower()
    unforeseen = [line for line in map(json.loads, text.splitlines()) if line["event"] == "unforeseen error"]
    trace = unforeseen[-1]["exception"]
    assert trace.index("builtins.KeyError") < trace.index("and then") < trace.index("builtins.ValueError")
    assert 'in fail\n    raise KeyError(("alice", SESSION))' in trace  # the line of source code


@pytest.mark.parametrize(
    ("level", "message", "arguments", "expected"),
    [
        ("WARNING", "Invalid request from ip=1.2.3.4: Invalid HTTP header name: 'a secret'", (),
         "Invalid request from ip=1.2.3.4: Invalid HTTP header name"),
        ("WARNING", "Invalid request from ip=::1: Obsolete line folding is unacceptable: \"a secret\"", (),
         "Invalid request from ip=::1: Obsolete line folding is unacceptable"),
        ("ERROR", "Error handling request %s %s", ("GET", "/a secret"), "Error handling request"),
        ("DEBUG", "Ignored premature client disconnection. %s", ("a secret",),
         "Ignored premature client disconnection."),
        ("INFO", "Listening at: %s (%s)", ("http://127.0.0.1:1", 7), "Listening at: http://127.0.0.1:1 (7)"),
    ],
)  # fmt: skip
def test_gunicorn_log_line__loses_what_a_client_may_have_sent(
    level: str, message: str, arguments: tuple[object, ...], expected: str
) -> None:
    record = logging.LogRecord("gunicorn.error", getattr(logging, level), "", 0, message, arguments, None)
    assert Unquoted().filter(record)
    assert record.getMessage() == expected


def test_text_log__has_no_messages_of_exceptions(
    tiny_store: ModelStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError(PROMPT)

    monkeypatch.setattr(Completion, "wholes", fail)
    with client_of(Settings(model_store=tiny_store.root, model="tiny", log_format="text")) as client:
        client.application.config["PROPAGATE_EXCEPTIONS"] = False
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500
    logged = capsys.readouterr().err
    assert "builtins.ValueError" in logged
    assert PROMPT not in logged
