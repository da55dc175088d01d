"""Models, health, pages and the OpenAPI description; the headers of every answer; and errors inside the server."""

from __future__ import annotations

import json
import logging
import re
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import flask_openapi_swagger
import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from service import __version__
from service.api_keys import new_key
from service.engine.kernels import choose_kernel
from service.engine.torch_stepper import TorchStepper
from service.errors import ModelNotFound
from service.generation import completion
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from service.web.gate.error_responses import STATUS
from service.web.gate.route import route_of
from tests.harness.application import client_of, described
from tests.harness.models import TINY_CHARSET, publish_tiny, tiny_config

SWAGGER = Path(flask_openapi_swagger.__file__).parent / "templates" / "swagger"


def test_models__are_listed_in_openais_shape(client: FlaskClient) -> None:
    answer = client.get("/v1/models").get_json()
    assert answer["object"] == "list"
    limits = answer["limits"]
    assert sorted(limits) == ["max_prompt_chars", "max_tokens", "session_max_tokens"]
    assert 0 < limits["session_max_tokens"] <= limits["max_tokens"]
    name, model = answer["data"]
    assert (model["id"], model["object"], model["created"]) == ("tiny@1", "model", 1_700_000_000)
    assert name == model | {"id": "tiny"}
    assert model["meta"]["version"] == "tiny@1"
    assert model["meta"]["charset"] == TINY_CHARSET
    assert model["meta"]["num_units"] == 16
    assert model["meta"]["num_layers"] == 1
    assert model["meta"]["num_parameters"] == tiny_config().num_parameters
    assert model["meta"]["validation_loss"] == 3.5
    assert model["meta"]["aliases"] == ["latest"]
    assert re.fullmatch(r"[0-9a-f]{64}", model["meta"]["digest"])


def test_models__are_listed_under_every_name_that_a_request_can_give(tmp_path: Path) -> None:
    """Clients look for the name that they were told, and some wait for it for ever."""
    store = ModelStore(tmp_path)
    for name in ("tiny", "other"):
        for seed in (0, 1):
            publish_tiny(store, name, seed)
    store.set_alias("tiny", "stable", 1)
    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:
        listed = {entry["id"]: entry for entry in client.get("/v1/models").get_json()["data"]}
        assert {ref: entry["meta"]["version"] for ref, entry in listed.items()} == {
            "tiny": "tiny@2", "tiny@1": "tiny@1", "tiny@2": "tiny@2", "tiny@stable": "tiny@1",
            "other": "other@2", "other@1": "other@1", "other@2": "other@2",
        }  # fmt: skip
        for ref, entry in listed.items():
            assert client.get(f"/v1/models/{ref}").get_json() == entry
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "model": ref}).get_json()
            assert answer["model"] == entry["meta"]["version"]
        # The name of a model in use stands for the version that this server uses, until it looks for new ones.
        publish_tiny(store, "tiny", 2)
        newer = {entry["id"]: entry["meta"]["version"] for entry in client.get("/v1/models").get_json()["data"]}
        assert (newer["tiny"], newer["tiny@3"]) == ("tiny@2", "tiny@3")


@pytest.mark.parametrize("ref", ["tiny", "tiny@1", "tiny@latest"])
def test_model__is_found_under_each_of_its_names(client: FlaskClient, ref: str) -> None:
    answer = client.get(f"/v1/models/{ref}").get_json()
    assert (answer["id"], answer["meta"]["version"]) == (ref, "tiny@1")


def test_unknown_model__is_not_found(client: FlaskClient) -> None:
    response = client.get("/v1/models/nope")
    assert response.status_code == 404
    assert response.get_json()["error"]["code"] == "model_not_found"


def test_health__answers_ok_and_the_kernel(client: FlaskClient) -> None:
    assert client.get("/healthz").get_json() == client.get("/health").get_json() == {"status": "ok"}
    assert client.get("/version").get_json() == {"version": __version__}
    assert client.get("/readyz").get_json() == {"status": "ready", "kernel": choose_kernel("auto", 1).name}


def test_unknown_route_or_method__gets_an_error_in_the_common_shape(client: FlaskClient) -> None:
    missing, wrong = client.get("/nope"), client.get("/v1/completions")
    assert (missing.status_code, missing.get_json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.get_json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["Allow"]


def test_openapi__covers_every_route_and_the_limits_of_fields(client: FlaskClient) -> None:
    description = described(client)
    assert description["openapi"] == "3.1.1"
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert description["security"] == [{"key": []}, {}]  # a key, or nothing on a server without keys
    session = "/v1/sessions/{id}"
    sessions = {
        "/v1/sessions",
        session,
        *(f"{session}/{name}" for name in ("text", "feed", "generate", "rewind", "fork", "state", "score", "suggest")),
    }
    others = {"/v1/completions", "/v1/inspect", "/v1/models", "/v1/models/{id}", "/healthz", "/readyz", "/admin/reload"}
    others |= {"/v1/chat/completions", "/v1/embeddings", "/v1/score"}
    others |= {"/health", "/version", "/tokenize", "/detokenize", "/tokenizer_info"}
    others |= {f"/v1/models/{{id}}/tokenizer{end}.json" for end in ("", "_config")}
    assert set(description["paths"]) == sessions | others
    body = description["components"]["schemas"]["CompletionBody"]
    assert body["required"] == ["prompt"]
    assert body["properties"]["top_p"]["maximum"] == 1
    assert body["properties"]["max_tokens"]["maximum"] == 500  # as this server is configured
    assert body["properties"]["prompt"]["oneOf"][0]["maxLength"] == 1000


def test_openapi__says_which_fields_may_be_null(client: FlaskClient) -> None:
    """`null` means the default, which clients send for a field that they don't set."""
    schemas = described(client)["components"]["schemas"]
    for name, schema in schemas.items():
        if name.endswith(("Body", "Options")):
            for field, property_ in schema.get("properties", {}).items():
                is_nullable = re.search(r'"null"|"enum": \[[^]]*null', json.dumps(property_)) is not None
                assert is_nullable == (field not in schema.get("required", ())) or property_.keys() <= {
                    "description", "default", "title", "enum",
                }, (name, field)  # fmt: skip


def test_openapi__enumerates_strings_only(client: FlaskClient) -> None:
    """A generator leaves out a body with another enumeration, and the route that takes it."""
    schemas = described(client)["components"]["schemas"]
    written = json.dumps(schemas)
    for values in map(json.loads, re.findall(r'"enum": (\[(?:[^][]|\[[^]]*\])*\])', written)):
        assert all(isinstance(value, str) for value in values), values
    assert schemas["ChatBody"]["properties"]["modalities"]["anyOf"] == [
        {"type": "array", "items": {"const": "text"}, "minItems": 1, "maxItems": 1},
        {"type": "null"},
    ]
    assert schemas["Message"]["properties"]["tool_calls"]["anyOf"] == [
        {"type": "array", "items": {}, "minItems": 0, "maxItems": 0},
        {"type": "null"},
    ]


def test_openapi__says_what_every_route_answers(client: FlaskClient) -> None:
    """Also what no schema says: errors that are found before the view, keys, and streams."""
    description = described(client)
    assert description["servers"] == [{"url": "./"}]
    always = {"400", "403", "405", "408", "414", "429", "431", "500", "503"}
    num_described = 0
    for rule in client.application.url_map.iter_rules():
        route = route_of(client.application.view_functions[rule.endpoint])
        assert route is not None
        if route.summary is None:
            continue
        path = re.sub(r"<(\w+)>", r"{\1}", route.path)
        operation = description["paths"][path][route.method.lower()]
        answers = set(operation["responses"])
        assert always <= answers, path
        assert ("401" in answers) == (not route.open) == ("security" not in operation), path
        assert {"413", "415"} & answers == ({"413", "415"} if route.takes_body else set()), path
        assert ("404" in answers) >= ("<id>" in route.path), path
        assert ("504" in answers) == route.path.startswith("/v1/sessions"), path
        content = operation["responses"].get("200", {}).get("content", {})
        assert ("text/event-stream" in content) == route.streams, path
        if route.streams:  # some tools take the schema for that of the whole text, some for that of each event
            assert list(content["text/event-stream"]["schema"]) == ["description"], path
        num_described += 1
        for status in answers - {"200", "201", "204"}:
            assert operation["responses"][status] == {"$ref": f"#/components/responses/Error{status}"}
    assert num_described == sum(len(path) for path in description["paths"].values())
    errors = description["components"]["responses"]
    for status, error in errors.items():
        assert error["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
        assert ("Retry-After" in error["headers"]) == (status in ("Error409", "Error429", "Error503"))
    resume = description["paths"]["/v1/sessions/{id}/generate"]["get"]
    assert "Last-Event-ID" in [parameter["name"] for parameter in resume["parameters"] if parameter["in"] == "header"]
    assert "<br/>" not in json.dumps(description)


def test_docs_page__loads_nothing_from_another_host(client: FlaskClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) >= 4
    for source in sources:
        assert "//" not in source
        asset = client.get(f"/{source}")
        assert asset.status_code == 200
        asset.close()
    assert "<script>" not in page.text
    assert "'unsafe-inline'" not in page.headers["Content-Security-Policy"].split("style-src")[0]
    page.close()
    # Files outside the folder of Swagger UI. They exist, so only the check of the path refuses them.
    for path in ("../../__init__.py", "%2e%2e/%2e%2e/__init__.py", "js/../../../__init__.py"):
        assert (SWAGGER / unquote(path)).exists()
        assert client.get(f"/docs/{path}").status_code == 404


def test_playground__loads_nothing_from_another_host_and_nothing_inline(client: FlaskClient) -> None:
    with closing(client.get("/")) as page:
        policy = page.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert not re.search(r"<style|style=|\son[a-z]+=|<script>", page.text)
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    pending = [source for source in sources if source.startswith("page/")]
    loaded = set()
    while pending:
        source = pending.pop()
        if source in loaded:
            continue
        loaded.add(source)
        with closing(client.get(f"/{source}")) as part:
            assert part.status_code == 200
            assert part.headers["Content-Security-Policy"] == policy
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", part.text)
            pending += [f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', part.text)]
    folder = Path(__file__).parents[3] / "service" / "web" / "static" / "page"
    assert {path.name for path in folder.iterdir()} == {name.removeprefix("page/") for name in loaded} | {"page.html"}
    assert client.get("/page/../docs.html").status_code == 404
    assert client.get("/page/%2e%2e/docs.html").status_code == 404


def test_answer__has_a_request_id_and_security_headers(client: FlaskClient) -> None:
    for path in ("/healthz", "/nope"):
        response = client.get(path)
        assert re.fullmatch(r"[0-9a-f]{16}", response.headers["X-Request-Id"])
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    for forged in ("a b", "x" * 65, "é"):
        assert client.get("/healthz", headers={"X-Request-Id": forged}).headers["X-Request-Id"] != forged


def test_log__has_one_line_per_request_and_no_text_of_the_user(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        client.post("/v1/completions", json={"prompt": "Secret love", "max_tokens": 1, "user": "Juliet"})
    lines = [str(record.msg) for record in caplog.records if record.name == "service.web.gate.guard"]
    assert len(lines) == 1
    assert "/v1/completions" in lines[0]
    assert "request_id" in lines[0]
    everything = " ".join(str(record.msg) + str(record.args) for record in caplog.records)
    assert "Secret" not in everything
    assert "Juliet" not in everything


def test_unexpected_exception__is_logged_and_not_shown_to_the_client(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(completion.Completion, "wholes", lambda *_: 1 / 0)
    client.application.config["PROPAGATE_EXCEPTIONS"] = False
    with caplog.at_level(logging.ERROR):
        response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert response.get_json()["error"]["type"] == "server_error"
    assert "division" not in response.text
    assert "Traceback" not in response.text
    assert "unforeseen error" in caplog.text


def test_full_server__answers_429_with_retry_after(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.engine.engine import Engine
    from service.errors import Overloaded

    def refuse(*_: object) -> None:
        raise Overloaded("busy")

    monkeypatch.setattr(Engine, "submit", refuse)
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "1"
    assert response.get_json()["error"]["type"] == "rate_limit_error"


def test_damaged_version__is_unavailable_without_revealing_its_path(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "other")
    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:
        (tmp_path / "other" / "1" / "model.safetensors").write_bytes(b"")
        response = client.post("/v1/completions", json={"prompt": "a", "model": "other"})
        assert response.status_code == 503
        assert response.get_json()["error"]["code"] == "invalid_artifact"
        assert str(tmp_path) not in response.text
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        (tmp_path / "other" / "1" / "training.json").write_bytes(b"")
        assert [model["id"] for model in client.get("/v1/models").get_json()["data"]] == ["tiny", "tiny@1"]


def test_readiness__fails_while_the_default_model_can_not_be_used(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "other")
    with client_of(Settings(model_store=tmp_path, model="tiny", max_models=1)) as client:
        store.delete("tiny@1")
        assert client.get("/readyz").status_code == 200  # the model is in memory
        assert client.post("/v1/completions", json={"prompt": "a", "model": "other"}).status_code == 200
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.get_json()["error"]["code"] == "not_ready"
        assert response.headers["Retry-After"]
        assert client.get("/healthz").status_code == 200


def test_model_store__with_unusable_entries_still_serves_the_others(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "other")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other" / "store.json").write_text("{")
    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:
        assert [model["id"] for model in client.get("/v1/models").get_json()["data"]] == ["tiny", "tiny@1"]
        assert client.post("/v1/completions", json={"prompt": "a", "model": "loop"}).status_code == 503
        assert client.get("/v1/models/other").status_code == 503
        assert str(tmp_path) not in client.get("/v1/models/other").text


def test_models__tell_the_log_once_what_is_not_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every open page lists the models four times a minute."""
    store = ModelStore(tmp_path)
    for name in ("tiny", "other"):
        publish_tiny(store, name)
    (tmp_path / "broken").symlink_to("nowhere")
    described = tmp_path / "other" / "1" / "training.json"
    data = described.read_bytes()
    with client_of(Settings(model_store=tmp_path, model="tiny")) as client:

        def told() -> list[str]:
            capfd.readouterr()
            assert client.get("/v1/models").status_code == 200
            lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
            return [line["model"] for line in lines if line["event"] == "model not listed"]

        assert told() == ["broken"]
        described.write_bytes(b"")
        assert told() == ["other@1"]
        assert told() == []
        described.write_bytes(data)
        assert told() == []
        described.write_bytes(b"")
        assert told() == ["other@1"]


def test_new_version__is_served_after_a_reload(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    key, entry = new_key("operator")
    with client_of(Settings(model_store=tmp_path, model="tiny", api_keys=SecretStr(entry)), key) as client:
        body = {"prompt": "a", "model": "tiny", "seed": 1}
        assert client.post("/v1/completions", json=body).get_json()["model"] == "tiny@1"
        publish_tiny(store, seed=1)
        assert client.post("/v1/completions", json=body).get_json()["model"] == "tiny@1"
        assert client.post("/admin/reload", json={}).get_json()["data"] == [
            {"name": "tiny", "model": "tiny@2", "failed": None, "code": None}
        ]
        assert client.post("/v1/completions", json=body).get_json()["model"] == "tiny@2"


def test_create_app__without_its_model_fails(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model 'tiny'"):
        create_app(Settings(model_store=tmp_path, model="tiny"))


def test_error_codes__that_can_reach_the_web_have_a_status() -> None:
    from service import errors

    elsewhere = {
        "address_unusable",
        "invalid_corpus",
        "invalid_checkpoint",
        "training_diverged",
        "training_failed",
        "invalid_settings",
        "invalid_charset",
    }
    elsewhere |= {"missing_library", "invalid_model_file", "unsupported_model"}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GruServeError)
    ]
    assert {kind.code for kind in kinds} - set(STATUS) == elsewhere


def test_failed_engine__fails_requests_and_readiness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    monkeypatch.setattr(TorchStepper, "advance", lambda *_: 1 / 0)
    with client_of(Settings(model_store=tmp_path, model="tiny", kernel="torch")) as client:
        assert client.get("/readyz").status_code == 200
        for _ in range(2):
            response = client.post("/v1/completions", json={"prompt": "a"})
            assert response.status_code == 503
            assert response.get_json()["error"]["code"] == "engine_failed"
            assert response.headers["Retry-After"]
        assert "ZeroDivisionError" in capsys.readouterr().err
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
