"""Who may ask: closed by default once there are keys, sessions belong to their key's name."""

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
from service.web.access import client_key, is_local, is_open, open_to_all, register_access
from service.web.app import create_app
from service.web.drain import Drain
from service.web.error_responses import register_error_handlers
from service.web.guard import register_guard
from tests.harness.application import client_of

(ALICE, ALICE_ENTRY), (ALICE_2, ALICE_2_ENTRY), (BOB, BOB_ENTRY) = new_key("alice"), new_key("alice"), new_key("bob")
ENTRIES = SecretStr(",".join([ALICE_ENTRY, ALICE_2_ENTRY, BOB_ENTRY]))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed(tiny_store: ModelStore) -> Iterator[FlaskClient]:
    """A client of an application that has keys; it sends none by itself."""
    with client_of(Settings(model_store=tiny_store.root, model="tiny", api_keys=ENTRIES)) as client:
        client.post("/v1/completions", json={"prompt": "z", "max_tokens": 1}, headers=bearer(ALICE))
        yield client


def test_every_route_but_health_and_the_page_needs_a_key(closed: FlaskClient) -> None:
    """Every rule of the application, with every method, by what it answers."""
    found = []
    for rule in closed.application.url_map.iter_rules():
        asset = "page.css" if rule.endpoint == "page.part" else "docs.js"
        path = rule.rule.replace("<id>", "a").replace("<path:asset>", asset)
        for method in sorted(rule.methods or ()):
            with closing(closed.open(path, method=method, json={})) as answer:
                status = answer.status_code
            assert status in (200, 401), (method, path)
            if status == 200:
                found.append((method, path))
    paths = {path for _, path in found}
    assert paths == {"/healthz", "/readyz", "/", "/page/page.css"}


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/docs/../x", "/healthz/", "/healthz?x=/v1"])
def test_what_is_not_there_is_not_told_either(closed: FlaskClient, path: str) -> None:
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
def test_without_a_known_key_nothing_is_done(closed: FlaskClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = closed.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.get_json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)
    assert "Bearer ..." in error["message"] or "not known" in error["message"]


@pytest.mark.parametrize("header", [f"bearer {ALICE}", f"BEARER {ALICE}", f"Bearer  {ALICE} ".rstrip()], ids=count())
def test_the_scheme_may_be_written_in_any_case(closed: FlaskClient, header: str) -> None:
    assert closed.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_a_body_is_not_read_of_who_may_not_ask(closed: FlaskClient) -> None:
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
def test_a_session_is_not_there_for_another_key(
    closed: FlaskClient, method: str, what: str, body: dict[str, object] | None
) -> None:
    """Anothers' session answers as one that was never there."""
    made = closed.post("/v1/sessions", json={"text": "ROMEO:"}, headers=bearer(ALICE)).get_json()["id"]
    answers = [
        closed.open(f"/v1/sessions/{name}{what}", method=method, json=body, headers=bearer(BOB))
        for name in (made, "f" * 32)
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].get_json() == answers[1].get_json()
    assert answers[0].get_json()["error"]["code"] == "session_not_found"
    assert closed.get(f"/v1/sessions/{made}", headers=bearer(ALICE_2)).status_code == 200  # the same owner


def test_two_owners_may_use_one_id_and_see_their_own_only(closed: FlaskClient) -> None:
    for key, text in ((ALICE, "ROMEO:"), (BOB, "JULIET")):
        assert closed.put("/v1/sessions/mine", json={"text": text}, headers=bearer(key)).status_code == 201
    for key, text in ((ALICE_2, "ROMEO:"), (BOB, "JULIET")):
        assert closed.get("/v1/sessions/mine/text", headers=bearer(key)).get_json()["text"] == text
    bobs = closed.get("/v1/sessions", headers=bearer(BOB)).get_json()["data"]
    assert [session["id"] for session in bobs] == ["mine"]


def test_a_new_route_is_closed_unless_it_says_otherwise() -> None:
    app = Flask(__name__)
    register_guard(app, Drain(0, 0))
    register_access(app, read_keys(ALICE_ENTRY, None))
    register_error_handlers(app)

    @app.get("/open")
    @open_to_all
    def open_view() -> str:
        return "open"

    @app.get("/new")
    def new_view() -> str:
        return "new"

    client = app.test_client()
    assert client.get("/open").text == "open"
    assert client.get("/new").status_code == 401
    assert client.get("/new", headers=bearer(ALICE)).text == "new"


def test_only_health_and_the_page_are_open(closed: FlaskClient) -> None:
    app = closed.application
    open_ones = {name for name in app.view_functions if is_open(app, name)}
    assert open_ones == {"health.healthz", "health.readyz", "page.page", "page.part"}


def test_without_keys_everything_is_open_and_a_key_is_no_harm(client: FlaskClient) -> None:
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers=bearer("whatever")).status_code == 200


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "nonsense", True),
    ],
)
def test_without_keys_an_address_is_a_party(client: FlaskClient, one: str, other: str, is_same: bool) -> None:
    parties = []
    for address in (one, other):
        with client.application.test_request_context(environ_base={"REMOTE_ADDR": address}):
            parties.append(client_key())
    assert (parties[0] == parties[1]) == is_same


@pytest.mark.parametrize(
    ("address", "headers", "expected"),
    [
        ("127.0.0.1", {}, True),
        ("127.8.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("10.0.0.1", {}, False),
        ("", {}, False),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, False),
        ("127.0.0.1", {"Forwarded": "for=10.0.0.1"}, False),
    ],
)
def test_what_comes_from_this_machine(
    client: FlaskClient, address: str, headers: dict[str, str], expected: bool
) -> None:
    with client.application.test_request_context(environ_base={"REMOTE_ADDR": address}, headers=headers):
        assert is_local() is expected


@pytest.mark.parametrize(
    ("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False), ("::1", False)]
)
def test_a_server_that_everybody_may_reach_and_use_says_so(
    tiny_store: ModelStore, host: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for keys in (SecretStr(""), ENTRIES):
        settings = Settings(model_store=tiny_store.root, model="tiny", host=host, api_keys=keys)
        create_app(settings).extensions["gru_serve"].close()
        assert ("no API keys" in capsys.readouterr().err) == (warns and keys is not ENTRIES)
