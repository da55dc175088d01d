"""Mistakes on the command line of `gru-serve train`: each is said with what to do, and nothing of the user is lost."""

from __future__ import annotations

import errno
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.errors import InvalidCheckpoint, InvalidCorpus
from service.training.checkpoint import RunState, save_checkpoint
from service.training.corpus import Corpus
from service.training.sources import find_sources
from tests.harness.effort import IS_THOROUGH

TEXT = "The fox said to the dog: I am the fox, and you are the dog. It was so.\n" * 20
SMALL = ["--embedding-dim", "8", "--num-units", "16", "--batch-size", "4", "--sequence-length", "16"]
SMALL += ["--threads", "1", "--device", "cpu", "--epochs", "1"]


class Folder:
    """A working folder with a corpus, in which commands run."""

    def __init__(self, path: Path) -> None:
        self.path, self.corpus = path, path / "fox.txt"
        self.corpus.write_text(TEXT)

    def train(self, *words: str) -> Result:
        store = [] if "--model-store" in words else ["--model-store", "store"]
        corpus = [] if "--corpus" in words else ["--corpus", "fox.txt"]
        return CliRunner().invoke(main, ["train", "--name", "fox", *corpus, *store, *SMALL, *words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


@pytest.mark.parametrize("option", ["--corpus", "--checkpoint", "--model-store"])
@pytest.mark.parametrize(("path", "problem"), [("", "is empty"), ("x" * 300, "File name too long")])
def test_train__a_path_that_cannot_exist_is_an_error(folder: Folder, option: str, path: str, problem: str) -> None:
    before = sorted(folder.path.iterdir())
    result = folder.train(option, path)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert problem in result.stderr
    assert sorted(folder.path.iterdir()) == before


def test_train__overwrite_replaces_nothing_but_a_checkpoint(folder: Folder) -> None:
    assert folder.train("--checkpoint", "run").exit_code == 0
    checkpoint, weights = folder.path / "run", folder.path / "store/fox/1/model.safetensors"
    (folder.path / "notes").write_text("my notes")
    for path in (folder.corpus, weights, folder.path / "notes", folder.path):
        before = path.read_bytes() if path.is_file() else b""
        result = folder.train("--checkpoint", str(path), "--overwrite")
        assert result.exit_code == 1
        assert (
            f"{path} is not a checkpoint, so it is not replaced: name another file with --checkpoint" in result.stderr
        )
        assert before == (path.read_bytes() if path.is_file() else b"")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])  # a damaged one
    refused = folder.train("--checkpoint", "run")
    assert refused.exit_code == 1
    assert "name another file with --checkpoint, or begin anew with --overwrite" in refused.stderr
    assert folder.train("--checkpoint", "run", "--overwrite").exit_code == 0
    checkpoint.write_bytes(b"")
    assert folder.train("--checkpoint", "run", "--overwrite").exit_code == 0


def test_train__a_damaged_checkpoint_is_not_continued(folder: Folder) -> None:
    assert folder.train("--checkpoint", "run").exit_code == 0
    checkpoint = folder.path / "run"
    intact = checkpoint.read_bytes()
    header = int.from_bytes(intact[:8], "little") + 8
    flipped = bytearray(intact)
    flipped[header + (len(intact) - header) // 3] ^= 0x40
    nested = b'{"__metadata__":{"run":"' + b"[" * 100_000 + b'"}}'
    for damaged in (
        bytes(flipped),
        intact.replace(rb"\"step\":", rb"\"step\":1", 1),  # its header has another length then
        intact.replace(rb"\"since_best\":0", rb"\"since_best\":7"),
        len(nested).to_bytes(8, "little") + nested,
        intact[:-1],
        intact[:100],
        b"",
    ):
        assert damaged != intact
        checkpoint.write_bytes(damaged)
        result = folder.train("--checkpoint", "run", "--resume", "--epochs", "2")
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert "run is damaged" in result.stderr
        assert "or begin anew with --overwrite" in result.stderr
        assert checkpoint.read_bytes() == damaged
    checkpoint.write_bytes(intact)
    assert folder.train("--checkpoint", "run", "--resume", "--epochs", "2").exit_code == 0


def test_train__proposes_a_prompt_that_the_model_knows(folder: Folder) -> None:
    assert "--prompt 'It was ' --model-store store" in folder.train().stderr
    folder.corpus.write_text(TEXT.lower())
    assert "--prompt '' --model-store store" in folder.train().stderr
    lines = ("--lines", "--checkpoint", "lines")
    command = r"--prompt '' --stop '\n' --model-store store"
    assert command in folder.train(*lines).stderr
    assert command in folder.train("--checkpoint", "lines", "--resume", "--epochs", "2").stderr


def test_train__a_restart_interval_of_one_is_refused(folder: Folder) -> None:
    result = folder.train("--restart-interval", "1")
    assert result.exit_code == 2
    assert "--restart-interval: 1: must be 0, or 2 or more, because nothing is predicted at a restart" in result.stderr


def test_train__warns_of_too_few_held_out_characters(folder: Folder) -> None:
    result = folder.train("--validation-chars", "2")
    assert result.exit_code == 0, result.output
    assert "warning: 2 held-out characters are too few to choose the best weights with" in result.stderr
    assert "raise --validation-fraction or --validation-chars" in result.stderr
    folder.corpus.write_text(TEXT * 4)
    assert "held-out characters are too few" not in folder.train("--checkpoint", "enough").stderr


def test_train__warns_of_a_model_that_learnt_no_order(folder: Folder) -> None:
    warning = "warning: the model predicts no better than the frequencies of the characters alone"
    result = folder.train("--learning-rate", "1e-30")
    assert result.exit_code == 0, result.output
    assert warning in result.stderr
    assert "raise --epochs" in result.stderr
    assert warning not in folder.train("--epochs", "3", "--learning-rate", "0.03").stderr


CLOSED = ["0<&- 1>&- 2>&-", "1>/dev/full"]


@pytest.mark.parametrize("closed", [*CLOSED, "1>&-", "2>&-", "1>/dev/full 2>/dev/full"] if IS_THOROUGH else CLOSED)
def test_train__publishes_once_without_an_output(folder: Folder, closed: str) -> None:
    words = ["-m", "service", "train", "--corpus", "fox.txt", "--name", "fox", "--model-store", "store", *SMALL]
    command = f"{shlex.join([sys.executable, *words])} {closed}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if "2>" not in closed:
        assert "published fox@1 at store/fox/1" in done.stderr
    again = folder.train("--resume")
    assert again.exit_code == 0, again.output
    assert "the run is finished and published as fox@1" in again.stdout


def test_eval__a_full_disk_is_said(folder: Folder) -> None:
    assert folder.train().exit_code == 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with open("/dev/full", "w") as full:
        for words in (["eval", "fox", "--corpus", "fox.txt"], ["generate", "--model", "fox", "--prompt", "I"]):
            command = [sys.executable, "-m", "service", *words, "--model-store", "store"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
            assert done.returncode == 1
            assert "Error: can't write the output: No space left on device" in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("interval", "text"), [("2", "ab" * 100), ("0", "ab" * 100), ("3", "a\nb\n" * 75)])
def test_train__in_windows_of_one_character(folder: Folder, interval: str, text: str) -> None:
    folder.corpus.write_text(text)
    smallest = ("--batch-size", "1", "--sequence-length", "1", "--restart-interval", interval)
    lines = ("--lines",) if "\n" in text else ()
    result = folder.train(*smallest, *lines, "--num-units", "4", "--eval-interval", "10000")
    assert result.exit_code == 0, result.output


def test_train__says_which_files_of_a_folder_it_left_out(folder: Folder) -> None:
    texts = folder.path / "texts"
    texts.mkdir()
    (texts / "a.bin").write_bytes(b"\0\1")
    assert "a.bin: nothing to read (binary, left out: a.bin)" in folder.train("--corpus", "texts").stderr
    (texts / "b.txt").touch()
    (texts / ".c").write_text("c")
    stderr = folder.train("--corpus", "texts").stderr
    assert "texts: 2 files: nothing to read (hidden, left out: .c; " in stderr
    assert "binary, left out: a.bin" in stderr
    assert "empty, left out: b.txt" in stderr


def test_train__proposes_a_conversion_that_runs(folder: Folder) -> None:
    (folder.path / "my text.txt").write_bytes("caf\u00e9".encode("latin-1"))
    stderr = folder.train("--corpus", "my text.txt").stderr
    assert "iconv -f WINDOWS-1252 -t UTF-8 'my text.txt' > new.txt" in stderr


def test_train__resume_without_a_checkpoint_says_what_to_do(folder: Folder) -> None:
    result = folder.train("--checkpoint", "none", "--resume")
    assert result.exit_code == 1
    assert "there is no checkpoint at none: leave --resume out to begin a run" in result.stderr


def test_train__resume_says_what_differs_and_what_to_do(folder: Folder) -> None:
    assert folder.train("--checkpoint", "run").exit_code == 0
    (folder.path / "other.txt").write_text(TEXT + "More.\n")
    result = folder.train("--checkpoint", "run", "--resume", "--corpus", "other.txt")
    assert result.exit_code == 1
    assert (
        "run belongs to another corpus, fox.txt: give that corpus, or name another file with --check" in result.stderr
    )
    result = folder.train("--checkpoint", "run", "--resume", "--lines")
    assert result.exit_code == 2
    assert "--lines can't be changed: the run that is resumed has no such option" in result.stderr
    result = folder.train("--checkpoint", "run", "--resume", "--seed", "9")
    assert "--seed 9 can't be changed: the run that is resumed has 1" in result.stderr


def test_train__resume_says_that_the_corpus_has_changed(folder: Folder) -> None:
    assert folder.train("--checkpoint", "run").exit_code == 0
    folder.corpus.write_text(TEXT + "Mor\u00e9.\n")
    result = folder.train("--checkpoint", "run", "--resume")
    assert result.exit_code == 1
    assert "the corpus, fox.txt, has changed since the run in run began" in result.stderr
    assert (
        "restore it, or begin anew on what it is now with --overwrite, from the published model with --init-from"
        in (result.stderr)
    )


def test_train__a_disk_that_becomes_full_loses_only_what_was_not_written_and_says_so(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[RunState] = []

    def save(path: Path, state: RunState, tensors: Any) -> None:
        if len(written) == 2:  # after the first evaluation
            raise InvalidCheckpoint(f"can't write the checkpoint {path}: No space left on device")
        save_checkpoint(path, state, tensors)
        written.append(state.model_copy())

    monkeypatch.setattr("service.training.trainer.save_checkpoint", save)
    monkeypatch.setattr("service.training.trainer._SAVE_SHARE", 0)
    many = ("--checkpoint", "run", "--epochs", "3", "--eval-interval", "20")
    result = folder.train(*many)
    assert result.exit_code == 1
    assert "published fox@1" in result.stdout
    end = "can't write the checkpoint run: No space left on device; --resume continues from run, as it was last written"
    assert end in result.stderr
    assert "Its weights are in" not in result.stderr

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written.clear()
    monkeypatch.setattr("service.training.publishing.Publication.rehearse", lambda _: None)
    monkeypatch.setattr("service.training.publishing.write_artifact", full)
    result = folder.train(*many, "--overwrite")
    assert result.exit_code == 1
    assert "the model could not be published: " in result.stderr
    assert end in result.stderr
    assert "Its weights are in" not in result.stderr  # the best ones are not
    monkeypatch.undo()
    monkeypatch.chdir(folder.path)
    resumed = folder.train("--checkpoint", "run", "--epochs", "3", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "published fox@2" in resumed.stdout


def test_find_sources__a_folder_that_can_be_listed_and_not_entered(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = folder.path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    stat = os.stat

    def refused(path: Any, *rest: Any, **options: Any) -> os.stat_result:  # as for a user who isn't root
        if str(path).endswith("a.txt"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refused)
    for words in (["texts"], ["texts/a.txt"]):
        with pytest.raises(InvalidCorpus, match=r"can't read texts/a\.txt: Permission denied"):
            find_sources(words)


def test_corpus__frequency_loss_is_the_entropy_of_equal_halves(tmp_path: Path) -> None:
    from service.training.corpus import read_corpus
    from service.training.hyperparameters import Hyperparameters

    path = tmp_path / "ab.txt"
    path.write_text("abcd" * 1000)
    corpus: Corpus = read_corpus(find_sources([path]), Hyperparameters(validation_fraction=0.5))
    assert corpus.frequency_loss() == pytest.approx(math.log(4), abs=1e-3)
