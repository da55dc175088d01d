"""`gru-serve generate`: several texts, prompts from files, stop strings with escapes; and JSON of every command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok
from tests.harness.models import NAMES, publish_names, publish_tiny


def run(*words: str, stdin: bytes | str | None = None, charset: str = "utf-8") -> Result:
    return CliRunner(charset=charset).invoke(main, list(words), input=stdin)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options with which a command finds a model of names and a tiny one."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_names(store)
    publish_tiny(store)
    return ["--model-store", str(store.root)]


@pytest.fixture(scope="module")
def names(store: list[str]) -> list[str]:
    """A command that generates one name."""
    return ["generate", "--prompt", "", "--stop", r"\n", "--model", "names", "--max-tokens", "200", *store]


def test_n__prints_a_line_for_each_text_and_seeds_beside_them(names: list[str]) -> None:
    many = run(*names, "-n", "70", "--seed", "7")
    assert many.exit_code == 0, many.output
    texts = many.stdout.splitlines()
    assert all(re.fullmatch(f"[{NAMES}][anoé]+", text) for text in texts)
    seeds = re.findall(r"^--- seed (-?\d+) ---$", many.stderr, re.MULTILINE)
    assert len(texts) == len(seeds) == len(set(seeds)) == 70
    assert seeds[0] == "7"
    for index in (0, 1, 69):  # each text again, from the seed that was told
        assert run(*names, "--seed", seeds[index]).stdout == texts[index] + "\n"


def test_n__gives_the_texts_of_the_api(store: list[str]) -> None:
    words = [
        "generate",
        "--prompt",
        "ROMEO:",
        "--max-tokens",
        "30",
        "--seed",
        "7",
        "-n",
        "3",
        "--model",
        "tiny",
        *store,
    ]
    listed = json.loads(run(*words, "--json").stdout)
    body = {"prompt": "ROMEO:", "max_tokens": 30, "seed": 7, "n": 3}
    with client_of(Settings(model_store=Path(store[1]), model="tiny")) as client:
        expected = [choice["text"] for choice in ok(client.post("/v1/completions", json=body))["choices"]]
    assert [entry["text"] for entry in listed] == expected
    assert [set(entry) for entry in listed] == [{"model", "seed", "text", "finish_reason"}] * 3
    assert listed[0]["seed"] == 7
    # Texts of several lines are separated where they are written.
    plain = run(*words)
    parts = "".join(f"--- seed {entry['seed']} ---\n{entry['text']}\n" for entry in listed)
    assert (plain.stdout, plain.exit_code) == (parts, 0)


def test_n_of_1__is_a_list_and_no_n_is_not(names: list[str]) -> None:
    one = json.loads(run(*names, "--seed", "7", "--json").stdout)
    assert json.loads(run(*names, "--seed", "7", "--json", "-n", "1").stdout) == [one]


def test_seed__is_told_if_it_was_random(names: list[str]) -> None:
    made = run(*names)
    found = re.fullmatch(r"--- seed (\d+) ---\n", made.stderr)
    assert found
    assert run(*names, "--seed", found[1]).stdout == made.stdout
    assert run(*names, "--seed", "7").stderr == ""


def test_stop__escapes_are_newline_tab_and_backslash(tmp_path: Path) -> None:
    """The model writes backslashes, the letter n and newlines."""
    publish_tiny(ModelStore(tmp_path), charset="\n\t\\n")
    words = ["generate", "--prompt", "n", "--seed", "1", "--model-store", str(tmp_path), "--model", "tiny", "--json"]
    whole = json.loads(run(*words).stdout)["text"]
    for escaped, stop in ((r"\n", "\n"), (r"\t", "\t"), (r"\\n", "\\n"), (r"\n\\", "\n\\"), ("\n", "\n")):
        assert stop in whole
        assert json.loads(run(*words, "--stop", escaped).stdout)["text"] == whole[: whole.index(stop)]
    for wrong in (r"\x", "a\\", r"\\\ "):
        refused = run(*words, "--stop", wrong)
        assert (refused.exit_code, r"write \\ for a backslash" in refused.stderr) == (2, True)


def test_stop__that_the_model_cannot_write_is_refused_folded_or_dropped(names: list[str]) -> None:
    refused = run(*names, "--stop", "e→")
    assert refused.exit_code == 1
    assert "'e' (U+0065) at 0, '→' (U+2192) at 1" in refused.stderr
    assert "--unknown-chars drop leaves them out" in refused.stderr
    expected = run(*names, "--seed", "7", "--stop", "n").stdout
    assert run(*names, "--seed", "7", "--stop", "ñ", "--unknown-chars", "fold").stdout == expected
    dropped = run(*names, "--seed", "7", "--stop", "→", "--unknown-chars", "drop")
    assert dropped.stdout == run(*names, "--seed", "7").stdout


def test_prompt_file__is_read_whole_from_a_file_or_standard_input(store: list[str], tmp_path: Path) -> None:
    path, words = tmp_path / "prompt.txt", ["--model", "tiny", "--seed", "7", "--max-tokens", "20", *store]
    expected = run("generate", "--prompt", "ROMEO:\n", *words).stdout
    for content in (b"ROMEO:\n", b"\xef\xbb\xbfROMEO:\n"):
        path.write_bytes(content)
        assert run("generate", "--prompt-file", str(path), *words).stdout == expected
        assert run("generate", "--prompt-file", "-", *words, stdin=content).stdout == expected
    empty = run("generate", "--prompt-file", "-", *words, stdin=b"")
    assert empty.stdout == run("generate", "--prompt", "", *words).stdout


def test_json__has_characters_and_not_their_escapes(names: list[str], store: list[str]) -> None:
    printed = run(*names, "--json", "-n", "20", "--seed", "7").stdout
    assert "é" in printed
    assert "\\u" not in printed
    shown = run("models", "show", "names", "--json", *store).stdout
    assert ("anoé" in shown, "\\u" in shown) == (True, False)
    ascii_only = run(*names, "--json", "-n", "20", "--seed", "7", charset="cp1251")
    assert ascii_only.exit_code == 0
    assert json.loads(ascii_only.stdout) == json.loads(printed)


def test_eval__prints_the_name_of_its_corpus_as_it_is(store: list[str], tmp_path: Path) -> None:
    path = tmp_path / "Gedichte für später.txt"
    path.write_text("Ana\n" * 20)
    printed = run("eval", "names", "--corpus", str(path), "--precision", "int8", "--json", *store)
    assert "für später" in printed.stdout, printed.output


def test_text__that_the_terminal_cannot_show_is_escaped(names: list[str]) -> None:
    made = run(*names, "-n", "20", "--seed", "7", charset="cp1251")
    assert made.exit_code == 0
    assert "\\xe9" in made.stdout


def test_models__are_a_table_with_headings(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_names(store, "a-model-with-quite-a-long-name-for-a-column")
    (tmp_path / "tiny" / "1" / "config.json").write_text("x")
    heading, *rows = run("models", "list", "--model-store", str(tmp_path)).stdout.splitlines()
    assert heading.split() == ["model", "parameters", "nats/char", "aliases"]
    assert [row.index("latest") for row in rows if "latest" in row] == [heading.index("aliases")]
    assert "damaged" in rows[1]
    (tmp_path / "empty").mkdir()
    empty = run("models", "list", "--model-store", str(tmp_path / "empty"))
    assert (empty.stdout, "no models in" in empty.stderr) == ("", True)


def test_models_show__is_text_for_people(store: list[str]) -> None:
    losses = {"validation_nats_per_char": 1.43283679, "validation_nats_per_char_by_precision": {"int4": 1.43522336}}
    corpus = {"name": "a.txt", "num_chars": 1115394}
    publish_tiny(ModelStore(Path(store[1])), "shown", facts={"losses": losses, "corpus": corpus})
    shown = run("models", "show", "shown", *store).stdout
    assert not re.search(r"[{}=]|num_|_per_", shown)
    for fact in ("1,115,394", "1.4328", "1.4352", "int4", "a.txt", "shown@1, latest"):
        assert fact in shown
    publish_tiny(ModelStore(Path(store[1])), "unmeasured", facts={"losses": {"validation_nats_per_char": None}})
    assert "None" not in run("models", "show", "unmeasured", *store).stdout


def test_form__is_that_of_every_text_and_the_texts_are_those_of_the_api(store: list[str], tmp_path: Path) -> None:
    words = ["generate", "--prompt", "ROMEO:", "--seed", "7", "-n", "5", "--model", "tiny", "--json", *store]
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"const": null}}')
    with client_of(Settings(model_store=Path(store[1]), model="tiny")) as client:
        for options, form in (
            (["--regex", "(?:ab|[c-e]{3})+", "--max-tokens", "12"], {"regex": "(?:ab|[c-e]{3})+"}),
            (["--choice", "what", "--choice", "where"], {"choice": ["what", "where"]}),
        ):
            texts = [entry["text"] for entry in json.loads(run(*words, *options).stdout)]
            size = 12 if "regex" in form else 500
            body = {"prompt": "ROMEO:", "max_tokens": size, "seed": 7, "n": 5, "structured_outputs": form}
            assert texts == [choice["text"] for choice in ok(client.post("/v1/completions", json=body))["choices"]]
            assert all(re.fullmatch("(?:ab|[c-e]{3})+|what|where", text) for text in texts)
    lacking = run(*words, "--json-schema", str(tmp_path / "schema.json"))  # the model has no brackets
    assert lacking.exit_code == 1
    assert "--json-schema: no text of this form can be written" in lacking.stderr


def test_json_schema__has_its_own_limit_and_its_own_source(store: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "--model", "tiny", *store, "--json-schema", "-"]
    for schema in ('"' + "a" * 70_000 + '"', "a" * 600_000):
        result = run(*words, "--prompt", "a", stdin=schema)
        assert "at most 65,536" in result.stderr
        assert "GRU_SERVE" not in result.stderr
    monkeypatch.setenv("GRU_SERVE_MAX_PROMPT_CHARS", "5")
    assert "no text of this form" in run(*words, "--prompt", "a", stdin='{"type": "array"}').stderr
    result = run(*words, "--prompt-file", "-", stdin="{}")
    assert (result.exit_code, "--prompt-file and --json-schema" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("options", "code", "fault"),
    [
        (["--regex", "("], 1, "--regex: "),
        (["--regex", "a{9}", "--max-tokens", "8"], 1, "at least 9 characters: raise --max-tokens"),
        (["--regex", "a", "--choice", "b"], 2, "two forms: give --regex or --choice"),
        (["--json-schema", "-"], 1, "--json-schema: "),
        (["--choice", "\u6f22"], 1, "--choice: "),
    ],
)
def test_form__that_is_wrong_is_refused_with_its_option(
    store: list[str], options: list[str], code: int, fault: str
) -> None:
    result = run("generate", "--prompt", "ROMEO:", "--model", "tiny", *store, *options, stdin="[")
    assert (result.exit_code, fault in result.stderr) == (code, True), result.stderr
