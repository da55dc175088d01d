"""What routes declare: each says what it is where it is defined, and nothing else in the service knows its path."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from werkzeug.routing import Rule

from service.web import gate, telemetry
from service.web.gate.route import Route, route_of


def declared(client: FlaskClient) -> list[tuple[Rule, Route]]:
    """The rules of the application with the declaration of each. Fails if one has none."""
    app = client.application
    routes = []
    for rule in app.url_map.iter_rules():
        route = route_of(app.view_functions[rule.endpoint])
        assert route is not None, f"{rule.rule} does not declare what it is"
        routes.append((rule, route))
    return routes


def constants(tree: ast.AST) -> list[str]:
    """The strings of a module, without its docstrings: those may show a path as an example."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values]


def test_routes__declare_themselves_with_their_path_and_method(client: FlaskClient) -> None:
    routes = declared(client)
    assert len(routes) > 20
    for rule, route in routes:
        assert route.path == rule.rule
        assert (rule.methods or set()) - {"HEAD", "OPTIONS"} == {route.method}


def test_routes__that_change_something_start_work(client: FlaskClient) -> None:
    """While the process drains, only reading is answered. A stream is work, whichever its method is."""
    for rule, route in declared(client):
        assert route.starts_work or (route.method == "GET" and not route.streams), rule.rule
        assert route.starts_work or not route.counts_as_start, rule.rule
        assert route.counts_as_start == (route.method in ("POST", "PUT")), rule.rule  # as docs/operations.md says


def test_routes__whose_views_stream_or_wait_for_an_engine_say_so(client: FlaskClient) -> None:
    sources = [
        (route, inspect.getsource(inspect.unwrap(client.application.view_functions[rule.endpoint])))
        for rule, route in declared(client)
    ]
    assert sum(route.streams for route, _ in sources) == 4
    for route, source in sources:
        assert ("EventStream(" in source) == route.streams, route.path
        assert route.starts_work or ".admit(" not in source, route.path


def test_gate_and_telemetry__mention_no_path(client: FlaskClient) -> None:
    words = {f"/{word}" for rule, _ in declared(client) for word in rule.rule.split("/") if word and "<" not in word}
    assert "/generate" in words
    found = []
    for room in (gate, telemetry):
        for path in sorted(Path(str(room.__file__)).parent.glob("*.py")):
            for text in constants(ast.parse(path.read_text())):
                found += [f"{path.name}: {word}" for word in words if word in text]
    assert not found


@pytest.mark.parametrize(
    "path",
    [
        "/%76%31/models",
        "/v1%2Fmodels",
        "/v1%2fmodels",
        "/%6detrics",
        "/v1/%6Dodels",
        "/v1/models%2ftiny",
        "/%2Fv1/models",
    ],
)
def test_path__has_one_spelling(client: FlaskClient, path: str) -> None:
    """A balancer that compares the path as it is written, and refuses `/metrics`, would let `/%6detrics` pass."""
    response = client.get(path)
    assert (response.status_code, response.get_json()["error"]["code"]) == (404, "not_found")


def test_path__may_escape_what_is_neither_letter_nor_digit(client: FlaskClient) -> None:
    assert client.get("/v1/models/tiny%401").get_json()["id"] == "tiny@1"
    assert client.put("/v1/sessions/a%7Eb", json={}).get_json()["id"] == "a~b"
    assert client.get("/v1/models/tiny@1?x=%61").status_code != 404


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_head__of_a_route_that_streams_is_refused(client: FlaskClient, method: str) -> None:
    """Flask would answer it as GET, which takes a run from the connection that streams it."""
    for rule, route in declared(client):
        if route.streams and route.method == method:
            answer = client.head(rule.rule.replace("<id>", "a"))
            assert answer.status_code == 405
            assert "POST" in answer.headers["Allow"]
