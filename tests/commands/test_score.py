"""`gru-serve score`: the numbers of the API, from arguments, a file or standard input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok


def run(*words: str, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(main, list(words), input=stdin)


@pytest.fixture
def command(tiny_store: ModelStore) -> list[str]:
    return ["score", "--model", "tiny", "--model-store", str(tiny_store.root)]


@pytest.mark.parametrize("normalize", ["none", "length", "candidates"])
def test_score__prints_the_numbers_of_the_api(command: list[str], tiny_store: ModelStore, normalize: str) -> None:
    words = ["what", "a", "where", "what"]
    body = {"prompt": "ROMEO: ", "candidates": words, "normalize": normalize}
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        expected = ok(client.post("/v1/score", json=body))["data"]
    options = [*command, "--prompt", "ROMEO: ", "--normalize", normalize]
    found = json.loads(run(*options, *words, "--json").stdout)
    assert found["model"] == "tiny@1"
    assert found["data"] == [{name: one[name] for name in ("text", "logprob", "score")} for one in expected]
    lines = [line.split() for line in run(*options, *words).stdout.splitlines()]
    ranked = sorted(expected, key=lambda one: -one["score"])
    assert lines == [[f"{one['score']:.4f}", one["text"]] for one in ranked]


def test_score__reads_candidates_and_prompt_from_files(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("ROMEO: ")
    (tmp_path / "words").write_bytes(b"\xef\xbb\xbfwhat\r\n\r\na b\r\n")
    direct = run(*command, "--prompt", "ROMEO: ", "what", "a b", "--json").stdout
    files = ["--prompt-file", str(tmp_path / "prompt"), "--candidates-file"]
    assert run(*command, *files, str(tmp_path / "words"), "--json").stdout == direct
    assert run(*command, *files, "-", "what", "--json", stdin="a b\n").stdout == direct


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "give candidates as arguments"),
        (["a", ""], "must not be empty"),
        (["a"] * 10_001, "at most 10,000 candidates"),
        (["a" * 100_001], "GRU_SERVE_MAX_PROMPT_CHARS"),
        (["--candidates-file", "-"], "not UTF-8 at byte 1"),
        (["--prompt", "a", "--prompt-file", "-", "a"], "not two"),
        (["--prompt-file", "-", "--candidates-file", "-"], "--prompt-file and --candidates-file"),
    ],
)
def test_score__explains_a_wrong_call(command: list[str], words: list[str], fault: str) -> None:
    result = run(*command, *words, stdin=b"a\xffb\n")
    assert result.exit_code == 2
    assert fault in result.stderr


def test_score__prints_one_line_for_each_candidate(command: list[str]) -> None:
    lines = run(*command, "a\nb", "a b").stdout.splitlines()
    assert sorted(line[14:] for line in lines) == ["a b", "a\\nb"]


def test_score__names_unknown_characters(command: list[str]) -> None:
    result = run(*command, "caf\u00e9")
    assert result.exit_code == 1
    assert "--unknown-chars fold" in result.stderr
    assert (
        json.loads(run(*command, "caf\u00e9", "--unknown-chars", "fold", "--json").stdout)["data"][0]["text"] == "cafe"
    )
    result = run(*command, "--candidates-file", "-", stdin="a\nnai\u00efve\nb\n")
    assert "'nai\u00efve': the model doesn't know" in result.stderr
    result = run(*command, "\u6f22", "--unknown-chars", "drop")
    assert result.exit_code == 1
    assert "knows none of its characters" in result.stderr
