"""The command line: its output, its error messages and its exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service import __version__, installation
from service.__main__ import main
from service.engine.native.native_stepper import variants
from service.model import hugging_face
from service.model.charset import Charset
from service.store.model_store import ModelStore
from service.training.streams import Window
from service.training.trainer import Trainer
from tests.harness.models import TINY_CHARSET, publish_tiny

TEXT = "The fox said to the dog: I am the fox, and you are the dog.\n" * 80
needs_native = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")
SMALL = ["--embedding-dim", "8", "--num-units", "16", "--batch-size", "4", "--sequence-length", "16"]
SMALL += ["--threads", "1"]  # the threads of torch wait for each other by spinning, which is slow on a busy machine
SMALL += ["--eval-interval", "0"]  # an evaluation each epoch


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Options with which a training run writes only to the test's folder."""
    return ["--model-store", str(tmp_path / "store"), "--checkpoint", str(tmp_path / "run.safetensors")]


@pytest.mark.parametrize(
    "command",
     ["", "serve", "train", "eval", "generate", "bench", "import", "export", "keys", "keys new",
     "models", "models list", "models show", "models verify", "models tokenizer", "models alias", "models chat",
     "models delete"],
)  # fmt: skip
def test_help__of_every_command_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    if command not in ("", "keys", "models"):
        assert "Example: gru-serve" in result.output


def test_main__prints_its_version() -> None:
    assert run("--version").output == f"gru-serve, version {__version__}\n"


def test_train__publishes_a_version_whose_card_agrees_with_eval(corpus: Path, place: list[str], tmp_path: Path) -> None:
    result = run("train", "--corpus", str(corpus), "--name", "fox", "--epochs", "2", *SMALL, *place)
    assert result.exit_code == 0, result.output
    assert "published fox@1" in result.output
    version = tmp_path / "store" / "fox" / "1"
    assert {path.name for path in version.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "README.md", "loss.png", "manifest.json",
    }  # fmt: skip
    training = json.loads((version / "training.json").read_text())
    card = (version / "README.md").read_text()
    assert training["corpus"]["sha256"] in card
    assert training["command"] in card
    assert f"{training['losses']['validation_nats_per_char']:.4f}" in card
    assert training["command"].startswith("gru-serve train --corpus fox.txt --name fox --embedding-dim 8")
    assert (version / "loss.png").read_bytes().startswith(b"\x89PNG")
    store = ["--model-store", str(tmp_path / "store")]
    measured = json.loads(run("eval", "fox", "--corpus", str(corpus), "--last", "0.1", "--json", *store).stdout)
    assert measured["nats_per_char"] == pytest.approx(training["losses"]["validation_nats_per_char"], abs=1e-6)
    assert measured["bits_per_char"] == pytest.approx(measured["nats_per_char"] * 1.442695, abs=1e-5)
    assert measured["num_chars"] == len(TEXT) // 10
    text = run("eval", "fox", "--corpus", str(corpus), *store).stdout
    assert re.search(r"fox@1 on fox.txt in float32: \d\.\d{4} nats/char, \d\.\d{4} bits/char, 4,800 characters", text)


def test_train__chooses_what_is_not_given_and_the_card_repeats_it(
    corpus: Path, place: list[str], tmp_path: Path
) -> None:
    small = ["--embedding-dim", "8", "--num-units", "16", "--threads", "1", "--epochs", "4"]
    result = run("train", "--corpus", str(corpus), "--name", "fox", *small, *place)
    assert result.exit_code == 0, result.output
    assert "chosen for 4,320 characters to train on, 36 updates: --batch-size 8 --sequence-length 64" in result.output
    assert "warning: 4,320 characters to train on are too few" in result.output
    assert "warning: 36 updates are few" in result.output
    first = json.loads((tmp_path / "store" / "fox" / "1" / "training.json").read_text())
    assert first["settings"]["warmup_steps"] == 3
    assert len(first["curve"]) == 4  # after every tenth update, and the last
    words = [str(corpus) if word == "fox.txt" else word for word in shlex.split(first["command"])[1:]]
    repeated = run(*words, *place)
    assert repeated.exit_code == 0, repeated.output
    assert "chosen for" not in repeated.output
    second = json.loads((tmp_path / "store" / "fox" / "2" / "training.json").read_text())
    assert second["settings"] == first["settings"]
    assert second["curve"] == first["curve"]


def test_train__ctrl_c_publishes_the_best_and_resume_gives_the_same_result(
    corpus: Path, place: list[str], tmp_path: Path
) -> None:
    options = ["--corpus", str(corpus), "--name", "fox", "--epochs", "8", *SMALL]
    whole = tmp_path / "whole"
    assert run("train", *options, "--model-store", str(whole), "--checkpoint", str(whole / "run")).exit_code == 0

    command = [sys.executable, "-m", "service", "train", *options, *place]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr
        progress = ""
        while "validation" not in progress or "best" not in progress:
            char = process.stderr.read(1)
            assert char, f"the run ended before its first evaluation: {progress}"
            progress += char
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, progress + errors
    assert "published fox@1" in output
    assert "--resume" in errors
    stopped = json.loads((tmp_path / "store" / "fox" / "1" / "training.json").read_text())
    assert stopped["run"]["ended"] == "stopped by hand"

    assert run("train", *options, *place).exit_code == 2  # an unfinished run is not overwritten by mistake
    resumed = run("train", "--corpus", str(corpus), "--name", "fox", "--resume", *place)
    assert resumed.exit_code == 0, resumed.output
    assert "published fox@2" in resumed.output
    curves = [
        json.loads((path / "training.json").read_text())["curve"]
        for path in (whole / "fox" / "1", tmp_path / "store" / "fox" / "2")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 8
    weights = [path.read_bytes() for path in sorted(tmp_path.glob("*/fox/[12]/model.safetensors"))]
    assert weights[1] == weights[2], "the resumed run has other weights than the uninterrupted one"


def test_train__publishes_the_best_before_it_diverged_and_fails(
    corpus: Path, place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, losses = Trainer._update, []

    def diverging(self: Trainer, window: Window) -> float:
        losses.append(update(self, window))
        return losses[-1] if len(losses) < 30 else math.nan

    monkeypatch.setattr(Trainer, "_update", diverging)
    options = ["--corpus", str(corpus), "--name", "fox", *SMALL, "--eval-interval", "20", *place]
    result = run("train", *options)
    assert result.exit_code == 1
    assert "the loss is nan in update 30: lower the learning rate" in result.stderr
    facts = json.loads((tmp_path / "store" / "fox" / "1" / "training.json").read_text())["run"]
    assert facts["best_update"] == 20
    assert facts["ended"].startswith("failed: the loss is nan")
    losses.clear()
    monkeypatch.setattr(Trainer, "_update", lambda *_: math.nan)
    assert run("train", *options, "--overwrite").exit_code == 1  # it diverges before any evaluation
    assert not (tmp_path / "store" / "fox" / "2").exists()


def test_train__resume_refuses_other_settings(corpus: Path, place: list[str]) -> None:
    options = ["--corpus", str(corpus), "--name", "fox", *SMALL, "--epochs", "2", *place]
    assert run("train", *options).exit_code == 0
    assert "--epochs can only be raised" in run("train", *options, "--resume", "--epochs", "1").output
    result = run("train", *options, "--resume", "--num-units", "9")
    assert result.exit_code == 2
    assert "--num-units 9 can't be changed: the run that is resumed has 16" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ab", "too short"),
        (b"ab\xff" * 99, "byte 0xff at offset 2"),
        (None, "No such file"),
    ],
)
def test_train__refuses_bad_corpora_in_one_line(
    tmp_path: Path, place: list[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    result = run("train", "--corpus", str(path), "--name", "bad", *place)
    assert result.exit_code == 1
    assert message in result.stderr
    assert [line for line in result.stderr.splitlines() if not line.startswith("reading")] == [
        result.stderr.splitlines()[-1]
    ]
    assert not (tmp_path / "store" / "bad").exists()


@pytest.mark.parametrize(
    "words",
    [["--num-units", "0"], ["--learning-rate", "nan"], ["--output-dropout", "1"], ["--epochs", "x"], ["--name", "a/b"]],
)
def test_train__refuses_bad_options(corpus: Path, place: list[str], words: list[str]) -> None:
    result = run("train", "--corpus", str(corpus), "--name", "fox", *place, *words)
    assert result.exit_code == (1 if "--name" in words else 2)
    assert "Traceback" not in result.output


def test_generate__prints_what_the_api_returns(tiny_store: ModelStore) -> None:
    from service.settings import Settings
    from tests.harness.application import client_of

    store = ["--model", "tiny", "--model-store", str(tiny_store.root)]
    printed = run("generate", "--prompt", "ROMEO:", "--max-tokens", "50", "--seed", "7", *store)
    assert printed.exit_code == 0
    body = {"prompt": "ROMEO:", "max_tokens": 50, "seed": 7}
    with client_of(Settings(model_store=tiny_store.root, model="tiny")) as client:
        response = client.post("/v1/completions", json=body).get_json()
    assert printed.stdout == response["choices"][0]["text"] + "\n"
    as_json = json.loads(
        run("generate", "--prompt", "ROMEO:", "--max-tokens", "50", "--seed", "7", "--json", *store).stdout
    )
    assert as_json == {
        "model": "tiny@1", "seed": 7, "text": response["choices"][0]["text"], "finish_reason": "length",
    }  # fmt: skip


def test_generate__needs_no_session_store(tiny_store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings may be those of a server whose Redis can't be reached from here."""
    monkeypatch.setenv("GRU_SERVE_SESSION_STORE", "redis://127.0.0.1:1/0")
    store = ["--model", "tiny", "--model-store", str(tiny_store.root)]
    printed = run("generate", "--prompt", "R", "--max-tokens", "5", "--seed", "7", *store)
    assert (printed.exit_code, len(printed.stdout)) == (0, 6), printed.stderr


def test_generate__refuses_bad_input(tiny_store: ModelStore) -> None:
    store = ["--model", "tiny", "--model-store", str(tiny_store.root)]
    assert "U+00E9" in run("generate", "--prompt", "é", *store).stderr
    assert run("generate", "--prompt", "é", *store).exit_code == 1
    assert run("generate", "--prompt", "é", "--unknown-chars", "fold", "--max-tokens", "1", *store).exit_code == 0
    assert run("generate", "--prompt", "a", "--stop", "", *store).exit_code == 2
    assert run("generate", "--prompt", "a", "--model", "nope").exit_code == 1


def test_options__refuse_nan_and_infinity(tiny_store: ModelStore, corpus: Path) -> None:
    store = ["--model-store", str(tiny_store.root)]
    for words in (["--temperature", "nan"], ["--top-p", "nan"], ["--temperature", "inf"]):
        assert run("generate", "--prompt", "a", "--model", "tiny", *words, *store).exit_code == 2
    assert run("eval", "tiny", "--corpus", str(corpus), "--last", "nan", *store).exit_code == 2


def test_train__ctrl_c_while_measuring_points_to_resume(
    corpus: Path, place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.commands import train
    from service.commands.eval import measure

    def interrupt(config: Any, tensors: Any, precision: str, text: Any, progress: Any) -> float:
        if len(text.ids) == 2:  # the rehearsal before the first update
            return measure(config, tensors, precision, text, progress)
        raise KeyboardInterrupt

    options = ["--corpus", str(corpus), "--name", "fox", "--epochs", "1", *SMALL, *place]
    with monkeypatch.context() as patch:
        patch.setattr(train, "measure", interrupt)
        result = run("train", *options)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert "published fox@1" in run("train", *options, "--resume").output


def test_models__list_show_verify_alias_delete(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store)
    where = ["--model-store", str(tmp_path)]
    rows: list[dict[str, Any]] = json.loads(run("models", "list", "--json", *where).stdout)
    assert [(row["model"], row["aliases"], row["damaged"]) for row in rows] == [
        ("tiny@1", [], False),
        ("tiny@2", ["latest"], False),
    ]
    assert "tiny@1 " in run("models", "list", *where).stdout
    assert run("models", "alias", "tiny@1", "stable", *where).stdout == "tiny@stable is tiny@1\n"
    shown = json.loads(run("models", "show", "tiny@stable", "--json", *where).stdout)
    assert (shown["model"], shown["aliases"], shown["config"]["num_units"]) == ("tiny@1", ["stable"], 16)
    assert "16 units" in run("models", "show", "tiny", *where).stdout
    assert run("models", "verify", *where).exit_code == 0
    (tmp_path / "tiny" / "2" / "model.safetensors").write_bytes(b"x")
    verified = run("models", "verify", "--json", *where)
    assert verified.exit_code == 1
    assert [bool(row["error"]) for row in json.loads(verified.stdout)] == [False, True]
    assert run("models", "delete", "tiny@1", "--yes", *where).exit_code == 1  # it has an alias
    assert run("models", "alias", "tiny", "stable", "--remove", *where).exit_code == 0
    assert run("models", "delete", "tiny@1", "--yes", *where).stdout == "tiny@1 is deleted\n"
    assert run("models", "delete", "tiny", *where).exit_code == 2  # the name without a version number
    assert [version.ref for version in store.versions("tiny")] == ["tiny@2"]
    assert run("models", "show", "tiny@1", *where).exit_code == 1


def test_models_chat__publishes_the_version_again_with_a_template(tmp_path: Path) -> None:
    store, where = ModelStore(tmp_path / "store"), ["--model-store", str(tmp_path / "store")]
    publish_tiny(store)
    (store.root / "tiny" / "1" / "README.md").write_text("# edited\n")
    before = {path.name: path.read_bytes() for path in (store.root / "tiny" / "1").iterdir()}
    result = run("models", "chat", "tiny", "play", *where)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "tiny@2 is tiny@1 with this chat template\n", "")
    assert {path.name: path.read_bytes() for path in (store.root / "tiny" / "1").iterdir()} == before
    plain, chatty = (store.describe(store.resolve(ref)) for ref in ("tiny@1", "tiny@2"))
    assert (plain.digest, plain.training, plain.chat) == (chatty.digest, chatty.training, None)
    assert run("models", "show", "tiny@1", *where).stdout.count("no template, see models chat") == 1
    assert json.loads(run("models", "show", "tiny", "--json", *where).stdout)["chat"]["stop"] == ["\n\n"]
    assert run("models", "verify", "tiny@2", *where).stdout.split() == ["tiny@2", "ok"]
    assert run("models", "chat", "tiny", "play", *where).stdout == "tiny@2 has this chat template already\n"
    path = tmp_path / "mine.json"
    path.write_text('{"user": "{content}\\n", "assistant": "{content}\\n", "stop": ["\\n"]}')
    result = run("models", "chat", "tiny@1", str(path), *where)
    assert result.stdout == "tiny@3 is tiny@1 with this chat template\n"
    assert result.stderr == "tiny@latest is tiny@3 now, and was tiny@2\n"


def test_models_chat__refuses_what_is_no_template_of_the_model(tmp_path: Path) -> None:
    where = ["--model-store", str(tmp_path / "store")]
    publish_tiny(ModelStore(tmp_path / "store"))
    path = tmp_path / "mine.json"
    path.write_text('{"user": "# {content}\\n", "assistant": "{content}\\n", "stop": ["\\n"]}')
    for template, reason in [
        (str(path), "tiny@1 doesn't know '#' (U+0023), which the template writes"),
        ("dialog", "there is no file 'dialog'; templates without a file: play, dialogue, lines"),
    ]:
        result = run("models", "chat", "tiny", template, *where)
        assert (result.exit_code, reason in result.stderr) == (2, True), result.output
    assert len(ModelStore(tmp_path / "store").versions("tiny")) == 1


def test_models_delete__asks_first(tmp_path: Path) -> None:
    publish_tiny(ModelStore(tmp_path))
    result = CliRunner().invoke(main, ["models", "delete", "tiny@1", "--model-store", str(tmp_path)], input="n\n")
    assert result.exit_code == 1
    assert ModelStore(tmp_path).resolve("tiny@1")


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("tiny@1", "move or remove that first"),
        ("tiny@9", "no version or alias '9'"),
        ("nope@1", "it has: tiny"),
        ("tiny@2", "check its permissions"),
    ],
)
def test_models_delete__refuses_before_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str, reason: str
) -> None:
    store = ModelStore(tmp_path)
    for _ in range(2):
        publish_tiny(store)
    store.set_alias("tiny", "stable", 1)
    if ref == "tiny@2":  # as if the store were mounted read-only
        monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    result = run("models", "delete", ref, "--model-store", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert reason in result.stderr
    assert len(store.versions("tiny")) == 2


def test_serve__reports_a_bad_start_in_one_line(
    tmp_path: Path, tiny_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = run("serve", "--model-store", str(tmp_path))
    assert missing.exit_code == 1
    assert "no model 'shakespeare'" in missing.stderr
    nowhere = run("serve", "--model-store", str(tmp_path / "nowhere"))
    assert nowhere.exit_code == 1
    assert "there is no model store at" in nowhere.stderr
    assert run("serve", "--port", "70000").exit_code == 2
    for name, value, reason in (
        ("CHAT_TEMPLATE", "/nowhere", "there is no file"),
        ("SESSION_STORE", "redis://:secret@host/0?nonsense=1", "must be redis://"),
        ("SESSION_STORE", "rediss://:secret@host/0?ssl_ca_certs=/nowhere", "ssl_ca_certs"),
    ):
        monkeypatch.setenv(f"GRU_SERVE_{name}", value)
        invalid = run("serve", "--model-store", str(tiny_store.root), "--model", "tiny")
        monkeypatch.delenv(f"GRU_SERVE_{name}")
        assert (invalid.exit_code, invalid.stdout) == (2, "")
        assert invalid.stderr.startswith(f"Error: GRU_SERVE_{name}")
        assert reason in invalid.stderr
        assert invalid.stderr.count("\n") == 1
        assert "secret" not in invalid.stderr
    assert run("serve", "--colour", "red").exit_code == 2


def run_in_new_process(program: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program with a command line's words in its sys.argv."""
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("words", [["models", "list"], ["models", "list", "--json"], ["generate", "--prompt", "R"]])
def test_output__to_a_full_disk_is_an_error_in_one_line(tiny_store: ModelStore, words: list[str]) -> None:
    command = [sys.executable, "-m", "service", *words, "--model-store", str(tiny_store.root)]
    with open("/dev/full", "w") as full:
        environment = os.environ | {"GRU_SERVE_MODEL": "tiny"}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: can't write the output: No space left on device"
    assert "Traceback" not in done.stderr


def test_models_tokenizer__writes_what_the_server_returns(tiny_store: ModelStore, tmp_path: Path) -> None:
    store, folder = ["--model-store", str(tiny_store.root)], tmp_path / "new" / "tokenizer"
    charset = Charset(TINY_CHARSET)
    printed = run("models", "tokenizer", "tiny", *store)
    assert json.loads(printed.stdout) == hugging_face.tokenizer(charset)
    for _ in range(2):  # an earlier one is replaced
        assert run("models", "tokenizer", "tiny@1", "--folder", str(folder), *store).exit_code == 0
    files = {path.name: json.loads(path.read_text("utf-8")) for path in folder.iterdir()}
    assert files == {
        "tokenizer.json": hugging_face.tokenizer(charset),
        "tokenizer_config.json": hugging_face.tokenizer_config(charset),
    }
    (tmp_path / "file").touch()
    failed = run("models", "tokenizer", "tiny", "--folder", str(tmp_path / "file"), *store)
    assert (failed.exit_code, failed.stderr) == (1, f"Error: can't write into {tmp_path / 'file'}: File exists\n")
    assert run("models", "tokenizer", "nope", *store).exit_code == 1


def test_models_list__does_not_import_torch(tiny_store: ModelStore, tmp_path: Path) -> None:
    program = "import sys; from service.__main__ import main\n"
    program += "try: main()\nfinally: print('torch' in sys.modules)"
    result = run_in_new_process(program, "models", "list", "--model-store", str(tiny_store.root), cwd=tmp_path)
    _, listed, imported_torch = result.stdout.splitlines()
    assert listed.startswith("tiny@1"), result
    assert imported_torch == "False"


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\nfrom service.__main__ import main; main()"


@needs_native
def test_eval__measures_integers_without_torch(tiny_store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ROMEO: " * 10)
    words = ["eval", "tiny", "--corpus", "text.txt", "--precision", "int8", "--model-store", str(tiny_store.root)]
    result = run_in_new_process(WITHOUT_TORCH, *words, cwd=tmp_path)
    assert result.returncode == 0, result
    assert "tiny@1 on text.txt in int8: " in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--corpus", "text.txt", "--name", "a"], 1, "run make setup in "),
        (["eval", "shakespeare", "--corpus", "text.txt"], 1, "run make setup in "),
        (["serve", "--kernel", "torch"], 2, "set kernel=auto or run make setup in "),
    ],
)
def test_commands__that_need_torch_say_so_if_it_is_missing(
    tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    (tmp_path / "text.txt").write_text("ROMEO: " * 1000)
    result = run_in_new_process(WITHOUT_TORCH, *words, cwd=tmp_path)
    assert result.returncode == code, result
    assert message in result.stderr
    assert "pip install" not in result.stderr  # the tests run in a checkout, where there is nothing of that name
    assert "Traceback" not in result.stderr


def test_commands__use_the_shipped_models_where_there_is_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = run("models", "list")
    assert listed.stdout.startswith("shakespeare@") or "shakespeare@" in listed.stdout
    assert "using the shipped models in" in listed.stderr
    assert "there is no ./model_store here" in listed.stderr
    for words in (
        ["alias", "shakespeare@1", "stable"],
        ["chat", "shakespeare@1", "play"],
        ["delete", "shakespeare@1", "--yes"],
    ):
        refused = run("models", *words)
        assert refused.exit_code == 1
        assert "can't be changed: name another store with --model-store" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_train__makes_a_store_where_there_is_none_and_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = run("train", "--corpus", str(corpus), "--name", "fox", "--epochs", "1", *SMALL)
    assert trained.exit_code == 0, trained.stderr
    assert f"{tmp_path / 'model_store'} will be the model store of this folder" in trained.stderr
    listed = run("models", "list")
    assert "fox@1" in listed.stdout
    assert "shakespeare" not in listed.stdout
    assert "shipped" not in listed.stderr


def test_torch__is_installed_as_the_package_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.how_to_get_torch() == f"run make setup in {Path(installation.__file__).parents[1]}"
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "site-packages" / "service")
    assert installation.how_to_get_torch() == "run pip install torch matplotlib"
    dockerfile = (Path(__file__).parents[2] / "Dockerfile").read_text()
    assert f"python -m venv --without-pip {installation._IMAGE_PREFIX}\n" in dockerfile
    assert "ARG WITH_TORCH=0" in dockerfile
    monkeypatch.setattr(sys, "prefix", installation._IMAGE_PREFIX)
    assert installation.how_to_get_torch() == "build the image with --build-arg WITH_TORCH=1"
