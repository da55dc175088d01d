"""Access control: with API keys every route needs one by default, and sessions belong to the name of their key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest
from flask import Flask
from flask.testing import FlaskClient
from pydantic import SecretStr

from service.api_keys import new_key, read_keys
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from service.web.gate.access import client_key, register_access
from service.web.gate.drain import Drain
from service.web.gate.error_responses import register_error_handlers
from service.web.gate.guard import register_guard
from service.web.gate.route import Route, route_of
from tests.harness.application import client_of

(ALICE, ALICE_ENTRY), (ALICE_2, ALICE_2_ENTRY), (BOB, BOB_ENTRY) = new_key("alice"), new_key("alice"), new_key("bob")
ENTRIES = SecretStr(",".join([ALICE_ENTRY, ALICE_2_ENTRY, BOB_ENTRY]))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of an application with API keys. The client sends none by itself."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny", api_keys=ENTRIES)) as client:
        client.post("/v1/completions", json={"prompt": "z", "max_tokens": 1}, headers=bearer(ALICE))
        yield client


def test_routes__except_health_and_the_page_need_a_key(closed: FlaskClient) -> None:
    """Call every route with every method and no key, and see which ones answer."""
    answered = []
    for rule in closed.application.url_map.iter_rules():
        asset = "page.css" if rule.endpoint == "page.part" else "docs.js"
        path = rule.rule.replace("<id>", "a").replace("<path:asset>", asset)
        for method in sorted(rule.methods or ()):
            with closing(closed.open(path, method=method, json={})) as answer:
                status = answer.status_code
            assert status in (200, 401), (method, path)
            if status == 200:
                answered.append((method, path))
    paths = {path for _, path in answered}
    assert paths == {"/healthz", "/health", "/readyz", "/", "/page/page.css", "/docs", "/docs/docs.js"}


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/../x", "/healthz/", "/healthz?x=/v1"])
def test_unknown_path__without_a_key_is_not_revealed(closed: FlaskClient, path: str) -> None:
    assert closed.get(path).status_code == (200 if path.startswith("/healthz?") else 401)
    assert closed.get("/nope", headers=bearer(ALICE)).status_code == 404
    assert closed.delete("/healthz").status_code == 401
    assert closed.delete("/healthz", headers=bearer(ALICE)).status_code == 405


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer x", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", f"Bearer {ALICE_ENTRY}",
     f"Bearer {ALICE_ENTRY.partition(':')[2]}", "Bearer \xff\xfe", "Bearer " + "x" * 5000, f"Bearer {ALICE} {BOB}"],
    ids=count(),
)  # fmt: skip
def test_request__without_a_known_key_is_refused(closed: FlaskClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = closed.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.get_json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)
    assert "Bearer ..." in error["message"] or "not known" in error["message"]


@pytest.mark.parametrize("header", [f"bearer {ALICE}", f"BEARER {ALICE}", f"Bearer  {ALICE} ".rstrip()], ids=count())
def test_authorization__accepts_the_scheme_in_any_case(closed: FlaskClient, header: str) -> None:
    assert closed.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_request__without_a_key_is_refused_before_its_body_is_read(closed: FlaskClient) -> None:
    response = closed.post("/v1/completions", data=b"{", content_type="application/json")
    assert response.status_code == 401
    assert closed.post("/v1/completions", data=b"{", headers=bearer(ALICE)).status_code == 415


CALLS = [
    ("GET", "", None),
    ("GET", "/text", None),
    ("GET", "/state", None),
    ("GET", "/generate", None),
    ("POST", "/feed", {"text": "a"}),
    ("POST", "/generate", {"max_tokens": 1}),
    ("POST", "/rewind", {"position": 0}),
    ("POST", "/fork", {}),
    ("DELETE", "", None),
]


@pytest.mark.parametrize(("method", "what", "body"), CALLS)
def test_session__of_another_owner_is_not_found(
    closed: FlaskClient, method: str, what: str, body: dict[str, object] | None
) -> None:
    """For another owner, a session looks exactly like one that never existed."""
    created = closed.post("/v1/sessions", json={"text": "ROMEO:"}, headers=bearer(ALICE)).get_json()["id"]
    answers = [
        closed.open(f"/v1/sessions/{name}{what}", method=method, json=body, headers=bearer(BOB))
        for name in (created, "f" * 32)
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].get_json() == answers[1].get_json()
    assert answers[0].get_json()["error"]["code"] == "session_not_found"
    assert closed.get(f"/v1/sessions/{created}", headers=bearer(ALICE_2)).status_code == 200  # the same owner


def test_session__id_can_be_used_by_two_owners_who_see_only_their_own(closed: FlaskClient) -> None:
    for key, text in ((ALICE, "ROMEO:"), (BOB, "JULIET")):
        assert closed.put("/v1/sessions/mine", json={"text": text}, headers=bearer(key)).status_code == 201
    for key, text in ((ALICE_2, "ROMEO:"), (BOB, "JULIET")):
        assert closed.get("/v1/sessions/mine/text", headers=bearer(key)).get_json()["text"] == text
    bobs = closed.get("/v1/sessions", headers=bearer(BOB)).get_json()["data"]
    assert [session["id"] for session in bobs] == ["mine"]


def test_new_route__needs_a_key_unless_declared_open() -> None:
    app = Flask(__name__)
    register_guard(app, Drain(0, 0))
    register_access(app, read_keys(ALICE_ENTRY, None))
    register_error_handlers(app)

    @app.get("/open")
    @Route("GET", "/open", open=True)
    def open_view() -> str:
        return "open"

    @app.get("/new")
    @Route("GET", "/new")
    def new_view() -> str:
        return "new"

    @app.get("/undeclared")
    def undeclared_view() -> str:
        return "undeclared"

    client = app.test_client()
    assert client.get("/open").text == "open"
    assert client.get("/new").status_code == client.get("/undeclared").status_code == 401
    assert client.get("/new", headers=bearer(ALICE)).text == "new"


def test_open_routes__are_only_health_and_the_pages(closed: FlaskClient) -> None:
    declared = {name: route_of(view) for name, view in closed.application.view_functions.items()}
    open_endpoints = {name for name, route in declared.items() if route is not None and route.open}
    assert open_endpoints == {
        "health.healthz", "health.health", "health.readyz", "page.page", "page.part", "docs.page", "docs.assets",
    }  # fmt: skip


def test_server_without_keys__is_open_and_ignores_keys(client: FlaskClient) -> None:
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers=bearer("whatever")).status_code == 200


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "nonsense", True),
        ("10.0.0.1:4711", "10.0.0.1", True),
        ("[2001:db8::1]:443", "2001:db8::2", True),
        ("[::ffff:10.0.0.1]", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("10.0.0.1:x", "10.0.0.1", False),
    ],
)
def test_client_key__without_api_keys_is_the_address_or_ipv6_network(
    client: FlaskClient, first: str, second: str, is_same: bool
) -> None:
    keys = []
    for address in (first, second):
        with client.application.test_request_context(environ_base={"REMOTE_ADDR": address}):
            keys.append(client_key())
    assert (keys[0] == keys[1]) == is_same


@pytest.mark.parametrize(
    ("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False), ("::1", False)]
)
def test_server_without_keys__on_a_public_address_logs_a_warning(
    tiny_store: ModelStore, host: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for keys in (SecretStr(""), ENTRIES):
        settings = Settings(model_store=tiny_store.root, model="tiny", host=host, api_keys=keys)
        create_app(settings).extensions["gru_serve"].close()
        assert ("no API keys" in capsys.readouterr().err) == (warns and keys is not ENTRIES)
