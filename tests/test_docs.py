"""The documentation shows what exists, each thing once, and its examples print what they show."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import json
import re
import textwrap
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from pydantic import SecretStr

from service.__main__ import main
from service.errors import GruServeError
from service.settings import Settings
from service.web.api.chat.schemas import ChatFields, Message
from service.web.api.known_fields import ClientFields, mark_of
from service.web.app import create_app
from tests.harness.server import SERVE, Server, serving

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, API, SETTINGS = ROOT / "README.md", DOCS / "api.md", DOCS / "settings.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
# Routes that serve files or text instead of JSON, so /openapi.json does not list them.
UNLISTED_ROUTES = ["GET /", "GET /docs", "GET /metrics", "GET /openapi.json"]

Operation = dict[str, Any]


def relative(path: Path) -> str:
    """A file's path from the root of the repository."""
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(SERVE, {"GRU_SERVE_CHAT_TEMPLATE": "play"}) as server:
        yield server


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    """The description of the API, as a server with default settings answers it."""
    app = create_app(Settings(log_level="error", model_store=ROOT / "model_store"))
    description = json.loads(app.test_client().get("/openapi.json").text)
    assert isinstance(description, dict)
    return description


# Examples


@pytest.mark.parametrize(
    ("name", "least"),
    [("sessions.md", 26), ("inspect.md", 20), ("clients.md", 15), ("candidates.md", 10), ("forms.md", 17)],
)
def test_examples__print_what_they_show(
    server: Server, name: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text().replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert len(examples.examples) >= least
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=report.append, clear_globs=False)
    client = examples.globs["client"]
    client.close()
    assert result.failed == 0, "".join(report)
    if name == "inspect.md":
        assert (tmp_path / "unit.png").stat().st_size > 10_000


def test_readme__session_example_runs(server: Server) -> None:
    block = re.search(r"^    from service\.client .*?(?=\n\n\S)", README.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    code = textwrap.dedent(block[0]).replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    names["client"].close()
    assert len(printed.getvalue()) == 200
    assert (names["session"].position, names["other"].position, len(names["likely"])) == (6, 40, 3)
    assert names["state"]


def test_api__example_shows_the_servers_answer(server: Server) -> None:
    text = API.read_text()
    request = re.search(r"curl -s localhost:8000/v1/completions .*\n +-d '(.*)'\n\nreturns", text)
    answer = re.search(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert request is not None
    assert answer is not None
    call = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions", request[1].encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=30) as response:
        found = json.load(response)
    shown = json.loads(answer[1])
    found["usage"]["prompt_tokens_details"]["cached_tokens"] = 0  # another page's example may have sent this prompt
    assert found | {"id": "", "created": 0} == shown | {"id": "", "created": 0}
    assert f"```\nROMEO:{shown['choices'][0]['text']}\n```" in text


@pytest.mark.parametrize(("document", "least"), [(README, 3), (DOCS / "forms.md", 1)], ids=["README", "forms"])
def test_curl__examples_are_answered(server: Server, document: Path, least: int) -> None:
    calls = re.findall(
        r"^ {4}curl -s\w* localhost:8000(/\S+) [^']*'[^']+'[^']*-d '([^']*)'$", document.read_text(), re.M
    )
    assert len(calls) >= least
    for path, body in calls:
        call = urllib.request.Request(
            f"http://127.0.0.1:{server.port}{path}", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=30) as response:
            assert response.status == 200
            assert response.read()


# The README and the index


def test_readme__has_at_most_180_lines() -> None:
    assert len(README.read_text().splitlines()) <= 180


def test_readme__tree_shows_every_room() -> None:
    tree = README.read_text().split("```\nservice/\n")[1].split("```")[0]
    shown = [
        name for line in re.findall(r"^[├└]── ([^\s,]+(?:, [^\s,]+)*)", tree, re.MULTILINE) for name in line.split(", ")
    ]
    rooms = [path.name + ("/" if path.is_dir() else "") for path in (ROOT / "service").iterdir()]
    assert sorted(shown) == sorted(name for name in rooms if name not in ("__init__.py", "__pycache__/"))


def test_readme__links_to_the_index_and_the_glossary() -> None:
    targets = {target for target, _ in links(README)}
    assert {DOCS / "README.md", DOCS / "glossary.md"} <= targets


def test_index__lists_every_document_once() -> None:
    listed = re.findall(r"^\d+\. \[([\w.-]+)\]\(\1\): ", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_glossary__has_each_word_once_in_alphabetical_order() -> None:
    words = [cells[0] for cells in rows(DOCS / "glossary.md")]
    assert words == sorted(set(words))
    assert len(words) >= 25


# Links, commands, paths


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links__resolve(document: Path) -> None:
    for target, anchor in links(document):
        assert target.exists(), f"{document.name} links to {target}, which does not exist"
        assert target.is_relative_to(ROOT), f"{document.name} links to {target}, outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{document.name} links to #{anchor}: {target.name} has no such heading"


def test_anchors__follow_githubs_rule(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b, c\n## `POST /v1/x`, [y](z.md) - it_s\n## A b, c\n```\n# not this\n```\n")
    assert anchors(page) == {"a-b-c", "post-v1x-y---it_s", "a-b-c-1"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands__named_in_code_exist(document: Path) -> None:
    code = "\n".join(code_of(document))
    makefile = (ROOT / "Makefile").read_text()
    for command in set(re.findall(r"\bgru-serve ([a-z]+)", code)):
        assert command in main.commands, f"{document.name}: gru-serve {command}"
    for target in set(re.findall(r"\bmake (?:[A-Z_]+=\S+ )*([a-z][a-z-]*)", code)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"
    for module in set(re.findall(r"\bpython -m ((?:benchmarks|tests)\.[a-z_.]+)", code)):
        assert importlib.util.find_spec(module) is not None, f"{document.name}: python -m {module}"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "LOG.md"], ids=relative)
def test_paths__named_in_code_exist(document: Path) -> None:
    for path in set(re.findall(r"\b(?:service|tests|benchmarks|deploy)/[\w./-]*\w", "\n".join(code_of(document)))):
        assert (ROOT / path).exists(), f"{document.name}: {path}"


# Settings


def test_settings__each_is_documented_once_with_its_default() -> None:
    documented = [(cells[0].strip("`"), cells[1]) for cells in rows(SETTINGS)]
    defaults = {f"GRU_SERVE_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    shown = {name: one.get_secret_value() if isinstance(one, SecretStr) else one for name, one in defaults.items()}
    assert sorted(documented) == sorted((name, str(default)) for name, default in shown.items())


def test_settings__are_tabled_in_settings_md_only() -> None:
    for document in DOCUMENTS:
        tabled = [cells[0] for cells in rows(document) if cells[0].startswith("`GRU_SERVE_")]
        assert document == SETTINGS or not tabled, f"{document.name} tables {tabled}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_settings__named_anywhere_exist(document: Path) -> None:
    known = {f"GRU_SERVE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"GRU_SERVE_[A-Z_]*[A-Z]", document.read_text())) <= known


# The API


def test_routes__each_is_documented_once(openapi: dict[str, Any]) -> None:
    listed = [cells[0].strip("`") for cells in rows(API) if re.match(r"`[A-Z]+ /", cells[0])]
    assert sorted(listed) == sorted([*operations(openapi), *UNLISTED_ROUTES])


def test_request_fields__each_is_documented_once_with_its_default(openapi: dict[str, Any]) -> None:
    documented = sections(API)
    headings = (
        "Sampling fields", "Form fields", "Messages", "Accepted fields", "Accepted fields of chats",
        "Accepted fields of messages",
    )  # fmt: skip
    shared = {heading: text for heading, text in documented if heading in headings}
    used = set(shared.values())
    for route, operation in operations(openapi).items():
        fields = inputs(openapi, operation)
        texts = [text for heading, text in documented if f"`{route}`" in heading]
        assert len(texts) == 1 or not (texts or fields), f"{route} needs one section"
        used.update(texts)
        own = [(cells[0].strip("`"), cells[1].strip("`")) for text in texts for cells in field_rows(text)]
        shown = list(own)
        for heading, text in shared.items():
            if any(f"(#{heading.lower().replace(' ', '-')})" in " ".join(one.split()) for one in texts):
                rows_of_others = [(cells[0].strip("`"), cells[1].strip("`")) for cells in field_rows(text)]
                # A route may say of a shared field what is different here.
                shown += [row for row in rows_of_others if row[0] not in dict(own)]
                assert not set(own) & set(rows_of_others), f"{route} repeats a shared field"
        assert sorted(shown) == sorted(fields.items()), f"the fields of {route}"
    assert not [heading for heading, text in documented if text not in used and list(field_rows(text))]


@pytest.mark.parametrize("heading", ["Accepted fields", "Accepted fields of chats", "Accepted fields of messages"])
def test_accepted_fields__are_documented_with_their_values_and_reasons(heading: str) -> None:
    (text,) = [text for found, text in sections(API) if found == heading]
    if heading == "Accepted fields":
        fields = dict(ClientFields.model_fields)
    elif heading == "Accepted fields of chats":
        fields = {
            name: field for name, field in ChatFields.model_fields.items() if name not in ClientFields.model_fields
        }
    else:
        fields = {f"messages.{name}": field for name, field in Message.model_fields.items() if mark_of(field)}
    marks = {name: mark_of(field) for name, field in fields.items()}
    known = [(f"`{name}`", mark.accepted, mark.why) for name, mark in marks.items() if mark is not None]
    assert len(known) == len(fields)
    assert [(name, accepted, why) for name, _, accepted, why in field_rows(text)] == known


def test_request_fields__are_tabled_in_api_md_only() -> None:
    for document in DOCUMENTS:
        assert document == API or not list(field_rows(document.read_text())), document.name


def test_error_codes__each_is_documented_once() -> None:
    (text,) = [text for heading, text in sections(API) if heading == "Errors"]
    command_line = re.findall(r"`(\w+)`", text.split("only on the command line:")[1])
    documented = [cells[1].strip("`") for cells in table_rows(text) if cells[0].isdecimal()] + command_line
    assert not [code for code, count in Counter(documented).items() if count > 1]
    leaves = [error for error in descendants(GruServeError) if not error.__subclasses__()]
    assert {error.code for error in leaves} <= set(documented)


# Reading Markdown


def prose_of(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_of(document: Path) -> list[str]:
    """The code of a document: fenced blocks, indented blocks, and spans between backticks."""
    text = document.read_text()
    fenced = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    prose = prose_of(document)
    return [*fenced, *re.findall(r"^ {4}.*$", prose, re.MULTILINE), *re.findall(r"`([^`]+)`", prose)]


def links(document: Path) -> list[tuple[Path, str]]:
    """The files and anchors that a document links to, or shows as images; without links to other hosts."""
    text = re.sub(r"`[^`\n]*`", "", prose_of(document))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    found = []
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found.append(((document.parent / path).resolve() if path else document, anchor))
    return found


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, by GitHub's rule."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(document), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def sections(document: Path) -> list[tuple[str, str]]:
    """Each heading, and what follows it up to the next one."""
    parts = re.split(r"^#+ (.+)$", prose_of(document), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of the text's tables, without headings."""
    for table in re.findall(r"^\|.*\n\|(?:-+\|)+\n((?:\|.*(?:\n|$))*)", text, re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in line.strip("|").split(" |")]


def rows(document: Path) -> list[list[str]]:
    """The cells of every row of a document's tables, without headings."""
    return list(table_rows(prose_of(document)))


def field_rows(text: str) -> Iterator[list[str]]:
    """The rows of tables of request fields."""
    for table in re.split(r"^(?=\| field \|)", text, flags=re.MULTILINE)[1:]:
        yield from table_rows(table.split("\n\n")[0] + "\n")


# Reading /openapi.json


def operations(openapi: dict[str, Any]) -> dict[str, Operation]:
    """Route, such as `GET /v1/models` -> what is said about it."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }


def inputs(openapi: dict[str, Any], operation: Operation) -> dict[str, str]:
    """The fields of a route's query and body -> their defaults as the tables show them."""
    query = [one for one in operation.get("parameters", []) if one["in"] == "query"]
    found = {one["name"]: default_of(one["schema"], is_required=one["required"]) for one in query}
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]["schema"]
        found |= fields_of(openapi, content["$ref"])
    return found


def fields_of(openapi: dict[str, Any], reference: str) -> dict[str, str]:
    """The fields of a schema, with those of nested schemas as `field.nested` -> their defaults."""
    schema = openapi["components"]["schemas"][reference.rpartition("/")[2]]
    found = {}
    for name, field in schema.get("properties", {}).items():
        found[name] = default_of(field, is_required=name in schema.get("required", []))
        for nested in re.findall(r'"\$ref": "([^"]+)"', json.dumps(field)):
            found |= {f"{name}.{inner}": default for inner, default in fields_of(openapi, nested).items()}
    return found


def default_of(schema: dict[str, Any], *, is_required: bool) -> str:
    """A field's default as the tables show it."""
    default = schema.get("default", schema.get("x-default"))
    return "required" if is_required else "" if default is None else json.dumps(default)


def descendants(kind: type[GruServeError]) -> set[type[GruServeError]]:
    """Every class below one."""
    return {below for child in kind.__subclasses__() for below in {child} | descendants(child)}
