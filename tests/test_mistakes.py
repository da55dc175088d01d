"""Plausible mistakes on the command line and in requests: each answer says in one line what to do about it."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask.testing import FlaskClient

from service.__main__ import main
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok
from tests.harness.models import publish_tiny

STORE = "--model-store {folder}/store"
GENERATE = f"generate --prompt R --model tiny {STORE}"
ONE_OTHER = "it has: tiny. Choose --model tiny, or set GRU_SERVE_MODEL"

# words, exit code, what the last line of standard error contains; {folder} is the test's, {port} one in use
COMMANDS = [
    ("genrate", 2, "Did you mean 'generate'?"),
    ("generate ROMEO:", 2, "argument (ROMEO:). Example: gru-serve generate --prompt ROMEO: --max-tokens 200"),
    ("bench 64", 2, "argument (64). Example: gru-serve bench --rows 1,64"),
    ("serve 8080", 2, "argument (8080). Example: gru-serve serve --"),
    ("keys new alice bob", 2, "argument (bob). Example: gru-serve keys new alice"),
    (f"generate {STORE}", 2, "give the text to continue with --prompt or --prompt-file; --prompt '' begins"),
    (f"{GENERATE} --prompt-file -", 2, "give one text to continue, not two"),
    (f"generate --prompt-file {{folder}}/none {STORE}", 2, "'--prompt-file': '{folder}/none': No such file"),
    (f"generate --prompt-file {{folder}}/latin1 {STORE}", 2, "convert the file, for example with iconv"),
    (f"{GENERATE} --temprature 1", 2, "Did you mean '--temperature'?"),
    (f"{GENERATE} --temperature -1", 2, "'--temperature': -1.0 is not in the range 0<=x<=100"),
    (f"{GENERATE} -n -1", 2, "'-n': -1 is not in the range 1<=x<="),
    (f"{GENERATE} --max-tokens 99999999999999999999", 2, "'--max-tokens': 99999999999999999999 is not in the range"),
    (f"{GENERATE} --seed 99999999999999999999", 2, "'--seed': 99999999999999999999 is not in the range"),
    (f"{GENERATE} --unknown-chars skip", 2, "'skip' is not one of 'error', 'fold', 'drop'"),
    (f"{GENERATE} --stop \\d", 2, "is none of \\n, \\t, \\r, \\\\: write \\\\ for a backslash"),
    (f"{GENERATE} --stop →", 1, "'→' (U+2192) at 0; --unknown-chars drop leaves"),
    (f"generate --prompt →→ --model tiny {STORE}", 1, "'→' (U+2192) at 0 and 1; --unknown-chars drop leaves"),
    (f"generate --prompt R {STORE}", 1, ONE_OTHER),
    (f"bench {STORE}", 1, ONE_OTHER),
    (f"serve {STORE}", 1, ONE_OTHER),
    (f"generate --prompt R --model tiny@9 {STORE}", 1, "no version or alias '9'; its versions: 1"),
    (f"generate --prompt R --model a/b {STORE}", 1, "write name, name@version or name@alias"),
    ("generate --prompt R --model-store {folder}/none", 1, "give --model-store or set GRU_SERVE_MODEL_STORE"),
    ("serve --model-store {folder}/empty", 1, "Name another store with --model-store, or train a model"),
    (f"models show nope {STORE}", 1, "it has: tiny"),
    (f"models delete tiny {STORE}", 2, "by its number, such as tiny@1"),
    (f"models alias tiny@1 7 {STORE}", 1, "use letters, digits, . _ -; neither a number nor `latest`"),
    ("keys new a/b", 1, "a key's name has 1 to 64 letters, digits, dots, underscores or hyphens"),
    (f"eval tiny --corpus {{folder}}/none {STORE}", 1, "{folder}/none"),
    (f"eval tiny --corpus {{folder}}/latin1 --precision int2 {STORE}", 2, "'float32', 'int8', 'int4'"),
    (f"bench --rows a {STORE}", 2, "'--rows': 'a' is not a valid integer"),
    (f"serve --model tiny --port {{port}} {STORE}", 1, "choose another port with --port or GRU_SERVE_PORT"),
    ("serve --port 99999", 2, "GRU_SERVE_PORT=99999: must be less than or equal to 65535"),
    ("serve --session-store redis://x", 2, "set GRU_SERVE_SESSION_STORE instead"),
    ("serve --kernel gpu", 2, "'gpu' is not one of 'auto', 'native', 'torch'"),
    ("serve --rate-limit fast", 2, "GRU_SERVE_RATE_LIMIT=fast: a rate is a number and a time, such as 600/minute"),
    (f"serve --model tiny --api-keys-file {{folder}}/none {STORE}", 2, "check its name and permissions"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model store that has one model, `tiny`, an empty store, and a file that is not UTF-8."""
    folder = tmp_path_factory.mktemp("mistakes")
    publish_tiny(ModelStore(folder / "store"))
    (folder / "empty").mkdir()
    (folder / "latin1").write_bytes("é".encode("latin-1") * 50)
    return folder


@pytest.mark.parametrize(("words", "code", "advice"), COMMANDS)
def test_command__says_what_to_do_about_a_mistake(folder: Path, words: str, code: int, advice: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        given = [word.format(folder=folder, port=busy.getsockname()[1]) for word in words.split()]
        result = CliRunner().invoke(main, given)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert advice.format(folder=folder) in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        ("GRU_SERVE_PROT", "80", "is not a setting: did you mean GRU_SERVE_PORT?\n"),
        ("GRU_SERVE_PORT", "http", "GRU_SERVE_PORT=http: must be a valid integer\n"),
        ("GRU_SERVE_STALL_S", "1 s", "GRU_SERVE_STALL_S=1 s: must be a valid number\n"),
        ("GRU_SERVE_MAX_BATCH", "0", "GRU_SERVE_MAX_BATCH=0: must be greater than or equal to 1"),
    ],
)
def test_variable__that_is_wrong_is_named(variable: str, value: str, advice: str) -> None:
    result = CliRunner(env={variable: value}).invoke(main, ["serve"])
    assert (result.exit_code, advice in result.stderr) == (2, True), result.stderr


PROMPT: dict[str, Any] = {"prompt": "R"}
COMPLETIONS = "POST /v1/completions"

# route, body, status, code, what the message contains
REQUESTS: list[tuple[str, Any, int, str, str]] = [
    (COMPLETIONS, {}, 400, "missing_field", "prompt: this field is required"),
    (COMPLETIONS, PROMPT | {"model": "nope"}, 404, "model_not_found", "it has: tiny"),
    (COMPLETIONS, PROMPT | {"max_token": 5}, 400, "unknown_field", "did you mean max_tokens?"),
    (COMPLETIONS, PROMPT | {"max_tokens": -1}, 400, "out_of_range", "max_tokens: must be greater than or equal to 0"),
    (COMPLETIONS, PROMPT | {"max_tokens": 10**9}, 400, "out_of_range", "max_tokens: at most 500 characters a request"),
    (COMPLETIONS, PROMPT | {"max_tokens": "5"}, 400, "wrong_type", "max_tokens: must be a valid integer"),
    (COMPLETIONS, PROMPT | {"max_tokens": 0}, 400, "out_of_range", "it needs echo"),
    (COMPLETIONS, PROMPT | {"n": 500}, 400, "out_of_range", "n: must be less than or equal to 128"),
    (COMPLETIONS, PROMPT | {"top_p": -1}, 400, "out_of_range", "top_p: must be greater than or equal to 0"),
    (COMPLETIONS, PROMPT | {"stop": ["a"] * 5}, 400, "out_of_range", "stop: list must have at most 4 items, not 5"),
    (COMPLETIONS, PROMPT | {"stop": "É"}, 400, "unknown_characters", '"unknown_chars": "fold" replaces'),
    (COMPLETIONS, {"prompt": "É→"}, 400, "unknown_characters", '"unknown_chars": "fold_drop" replaces'),
    (COMPLETIONS, {"prompt": "→"}, 400, "unknown_characters", '"unknown_chars": "drop" leaves them out'),
    (COMPLETIONS, {"prompt": [1, 99]}, 400, "out_of_range", "prompt[1]"),
    (COMPLETIONS, {"prompt": "R" * 2000}, 400, "out_of_range", "prompt: at most 1000 characters, not 2000"),
    (
        COMPLETIONS,
        PROMPT | {"suffix": "x"},
        400,
        "unsupported_value",
        "the models continue a text, and can't take into account what",
    ),
    (
        COMPLETIONS,
        PROMPT | {"logit_bias": {"50256": 1}},
        400,
        "out_of_range",
        "no character has the id 50256: this model has the ids",
    ),
    (COMPLETIONS, b"{'prompt': 'R'}", 400, "invalid_json", "not JSON in UTF-8: Expecting property name enclosed in"),
    (
        COMPLETIONS,
        PROMPT | {"stop": "\ud800"},
        400,
        "out_of_range",
        "stop: has a half of a surrogate pair, such as \\ud800",
    ),
    (COMPLETIONS, PROMPT | {"user": "R\udfff"}, 400, "out_of_range", "user: has a half of a surrogate pair"),
    (COMPLETIONS, {"prompt": "R", "\ud800": 1}, 400, "out_of_range", "has a half of a surrogate pair"),
    (COMPLETIONS, b"", 400, "invalid_json", "the body is empty: send a JSON object"),
    (COMPLETIONS, b'["R"]', 400, "invalid_json", "the body has to be a JSON object"),
    (COMPLETIONS, '{"prompt": "é"}'.encode("latin-1"), 400, "invalid_json", "not UTF-8: byte 12 (0xe9) begins no"),
    (COMPLETIONS, '{"prompt": "R"}'.encode("utf-16"), 400, "invalid_json", "it is UTF-16 or UTF-32: send UTF-8"),
    (COMPLETIONS, '{"prompt": "R"}'.encode("utf-16-le"), 400, "invalid_json", "it is UTF-16 or UTF-32: send UTF-8"),
    (COMPLETIONS, '{"prompt": "R"}'.encode("utf-16-be"), 400, "invalid_json", "it is UTF-16 or UTF-32: send UTF-8"),
    (COMPLETIONS, '{"prompt": "R"}'.encode("utf-32"), 400, "invalid_json", "it is UTF-16 or UTF-32: send UTF-8"),
    (
        COMPLETIONS,
        gzip.compress(b'{"prompt": "R"}', mtime=0),
        400,
        "invalid_json",
        "it is compressed: send it uncompressed",
    ),
    (
        COMPLETIONS + "?stream=true",
        PROMPT,
        400,
        "unknown_field",
        "stream: this route has no query parameters: send the",
    ),
    ("GET /v1/models?model=tiny", None, 400, "unknown_field", "model: this route has no query parameters"),
    ("DELETE /v1/sessions/s?force=1", None, 400, "unknown_field", "force: this route has no query parameters"),
    (COMPLETIONS, b"x" * 70_000, 413, "body_too_large", "raise GRU_SERVE_MAX_BODY_BYTES"),
    (COMPLETIONS, None, 415, "unsupported_media_type", "the request has no body: send a JSON object, such as {}, with"),
    (
        COMPLETIONS,
        "prompt=R",
        415,
        "unsupported_media_type",
        "has to be JSON, sent with Content-Type: application/json",
    ),
    ("GET /v1/completions", None, 405, "method_not_allowed", "it has: OPTIONS, POST"),
    ("PATCH /v1/sessions/s/generate", None, 405, "method_not_allowed", "it has: GET, OPTIONS, POST"),
    ("POST /v1/completion", PROMPT, 404, "not_found", "did you mean /v1/completions?; GET /openapi.json lists all"),
    ("POST /v1/completions/", PROMPT, 404, "not_found", "write its path as /v1/completions"),
    ("POST /v1//completions", PROMPT, 404, "not_found", "write its path as /v1/completions"),
    ("GET /v1/sessions/s/", None, 404, "not_found", "write its path as /v1/sessions/s, without"),
    ("GET /v1/%73essions/s", None, 404, "not_found", "write its path as /v1/sessions/s, without"),
    ("GET /v1/sessions/s%2Ftext", None, 404, "not_found", "write its path as /v1/sessions/s/text, without"),
    ("GET /v1/sessions/a%2Fb", None, 404, "not_found", "did you mean /v1/sessions?; GET /openapi.json lists all"),
    ("GET /v1/models/nope", None, 404, "model_not_found", "it has: tiny"),
    ("GET /v1/sessions", None, 403, "listing_needs_keys", "let the operator set GRU_SERVE_API_KEYS"),
    ("GET /v1/sessions/none", None, 404, "session_not_found", "create it first"),
    ("PUT /v1/sessions/a b", {}, 400, "out_of_range", "must be 1 to 128 letters, digits and . _ ~ -"),
    ("PUT /v1/sessions/s", {"text": "other"}, 409, "session_exists", "choose another id, or delete it first"),
    ("POST /v1/sessions/s/feed", {"text": "R", "position": 9}, 409, "position_conflict", "send its end as position"),
    ("POST /v1/sessions/s/feed", {"prompt": "R"}, 400, "missing_field", "also have errors: prompt)"),
    ("POST /v1/sessions/s/generate", {"max_tokens": 0}, 400, "out_of_range", "1 to 500 characters a request"),
    ("GET /v1/sessions/s/generate", None, 409, "no_run", "start one"),
    ("GET /v1/sessions/s/text?from=x", None, 400, "out_of_range", "from: must be a number"),
    ("GET /v1/sessions/s/text?from=1e1", None, 400, "out_of_range", "from: must be a valid integer"),
    ("GET /v1/sessions/s/text?form=1", None, 400, "unknown_field", "did you mean from?"),
    ("POST /v1/inspect", {}, 400, "out_of_range", "give either a text or a session"),
]


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[FlaskClient]:
    """A client of an application with small limits, and with a session `s`."""
    limits: dict[str, Any] = {"max_tokens": 500, "max_prompt_chars": 1000, "max_body_bytes": 65_536}
    with client_of(Settings(model_store=folder / "store", model="tiny", **limits)) as client:
        ok(client.post("/v1/completions", json=PROMPT))  # starts the engine's thread
        ok(client.put("/v1/sessions/s", json={"text": "R"}), 201)
        yield client


@pytest.mark.parametrize(("route", "body", "status", "code", "advice"), REQUESTS)
def test_request__says_what_to_do_about_a_mistake(
    client: FlaskClient, route: str, body: Any, status: int, code: str, advice: str
) -> None:
    method, _, path = route.partition(" ")
    sent: dict[str, Any] = {"json": body} if isinstance(body, dict) else {}
    if isinstance(body, bytes):
        sent = {"data": body, "content_type": "application/json"}
    if isinstance(body, str):
        sent = {"data": body, "content_type": "application/x-www-form-urlencoded"}  # as curl -d sends it
    with client.open(path, method=method, **sent) as response:
        error = response.get_json()["error"]
        assert (response.status_code, error["code"]) == (status, code), error
    assert advice in error["message"]
    assert "unable to parse" not in error["message"]


def test_request__without_a_length_has_no_body_and_says_so(client: FlaskClient) -> None:
    """The bytes after the head are then the beginning of the next request."""
    with client.post("/v1/completions", content_type="application/json", headers={"Content-Length": ""}) as response:
        error = response.get_json()["error"]
    assert (error["code"], "Content-Length" in error["message"]) == ("invalid_json", True), error


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity"])
def test_request__that_is_compressed_is_refused_with_the_coding_that_is_accepted(
    client: FlaskClient, coding: str
) -> None:
    with client.post("/v1/completions", json=PROMPT, headers={"Content-Encoding": coding}) as response:
        assert (response.status_code, response.headers["Accept-Encoding"]) == (415, "identity")  # RFC 7694
        assert "send it uncompressed" in response.get_json()["error"]["message"]
    for same in ("identity", "Identity", ""):
        ok(client.post("/v1/completions", json=PROMPT, headers={"Content-Encoding": same}))


def test_query__of_openais_client_for_azure_is_accepted(client: FlaskClient) -> None:
    ok(client.post("/v1/completions?api-version=2026-01-01", json=PROMPT))
    assert client.post("/v1/completions?api-version=1&stream=true", json=PROMPT).status_code == 400


def test_stream__has_no_head_and_says_so(client: FlaskClient) -> None:
    path = "/v1/sessions/s/generate"
    assert client.head(path).status_code == 405
    for response in (client.options(path), client.head(path), client.put(path, json={})):
        assert set(response.headers["Allow"].split(", ")) == {"GET", "POST", "OPTIONS"}
    assert client.head("/v1/sessions/s").status_code == 200


def test_unknown_model__lists_the_default_first_and_says_how_many_more(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    for name in [f"a{index}" for index in range(9)] + ["usual"]:
        publish_tiny(store, name)
    listed = "it has: usual, a0, a1, a2, a3, a4, a5, a6 and 2 more"
    with client_of(Settings(model_store=tmp_path, model="usual")) as client:
        assert listed in client.get("/v1/models/nope").get_json()["error"]["message"]
    words = ["generate", "--prompt", "R", "--model", "nope", "--model-store", str(tmp_path)]
    result = CliRunner(env={"GRU_SERVE_MODEL": "usual@1"}).invoke(main, words)
    assert f"{listed}. Choose one with --model, or set GRU_SERVE_MODEL" in result.stderr


def test_websocket__is_refused_with_what_streams_here(client: FlaskClient) -> None:
    for path in ("/", "/v1/models"):
        with client.get(path, headers={"Connection": "Upgrade", "Upgrade": "websocket"}) as response:
            error = response.get_json()["error"]
        assert (response.status_code, error["code"]) == (400, "bad_request")
        assert 'no WebSockets: POST with "stream": true gets server-sent events' in error["message"]


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/docs"])
def test_file__is_sent_whole_whatever_range_is_requested(client: FlaskClient, path: str) -> None:
    with client.get(path) as response:
        whole, tag = response.data, response.headers["ETag"]
        assert "Accept-Ranges" not in response.headers
    for part in ("bytes=0-10", "bytes=99999999-", "lines=1-2"):
        with client.get(path, headers={"Range": part}) as response:
            assert (response.status_code, response.data) == (200, whole)
    with client.get(path, headers={"If-None-Match": tag}) as response:
        assert response.status_code == 304
