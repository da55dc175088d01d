"""The life of a run: stopping, resuming, beginning with a version, and publishing, through the command line."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from service.__main__ import main
from service.commands.progress import Progress
from service.model.artifact import write_artifact
from service.model.chat_template import PRESETS
from service.store.model_store import ModelStore
from service.training import devices
from service.training.checkpoint import lock_checkpoint, read_state
from service.training.trainer import Trainer

TEXT = "The fox said to the dog: I am the fox, and you are the dog.\n" * 20
SMALL = ["--embedding-dim", "8", "--num-units", "16", "--batch-size", "4", "--sequence-length", "16"]
SMALL += ["--threads", "1"]  # the threads of torch wait for each other by spinning, which is slow on a busy machine


class Place:
    """A corpus, a store and a checkpoint of one test."""

    def __init__(self, folder: Path) -> None:
        self.corpus, self.store, self.checkpoint = folder / "fox.txt", folder / "store", folder / "run.safetensors"
        self.corpus.write_text(TEXT)

    def words(self, *more: str, corpus: Path | None = None) -> list[str]:
        words = ["train", "--corpus", str(corpus or self.corpus), "--name", "fox", "--device", "cpu"]
        return [*words, "--model-store", str(self.store), "--checkpoint", str(self.checkpoint), *more]

    def train(self, *more: str, corpus: Path | None = None) -> Result:
        return CliRunner().invoke(main, self.words(*more, corpus=corpus))

    def facts(self, number: int) -> Any:
        return json.loads((self.store / "fox" / str(number) / "training.json").read_text())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def start(command: list[str], until: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process and wait until it has written some text to standard error."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert process.stderr
    written = ""
    while until not in written:
        char = process.stderr.read(1)
        assert char, f"the command ended: {written}"
        written += char
    return process


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    with process:
        return process.communicate(timeout=120)


def can_make_namespaces() -> bool:
    words = ["unshare", "--pid", "--fork", "--kill-child", "true"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_train__sigterm_publishes_the_best_and_exits_with_143(place: Place) -> None:
    """As process 1, as in a container, which gets no signal without a handler; else as any process."""
    words = [sys.executable, "-m", "service", *place.words(*SMALL, "--epochs", "2000")]
    if can_make_namespaces():
        process = start(["unshare", "--pid", "--fork", *words], "  best")
        target = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    else:
        process = start(words, "  best")
        target = process.pid
    os.kill(target, signal.SIGTERM)
    os.kill(target, signal.SIGTERM)  # as `timeout` does: the same request once more
    output, errors = finish(process)
    assert process.returncode == 143, errors
    assert "published fox@1" in output, errors
    assert "--resume continues from" in errors
    assert place.facts(1)["run"]["ended"] == "stopped by a signal"
    assert not list(place.checkpoint.parent.glob("*.lock")) + list(place.checkpoint.parent.glob("*.part"))


def test_train__a_signal_while_reading_changes_nothing(place: Place, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start([sys.executable, "-m", "service", *place.words(*SMALL, corpus=fifo)], "reading fifo")
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    assert process.returncode == 143
    assert errors.strip().endswith("nothing has changed")
    assert not place.checkpoint.exists()


def test_train__resume_of_a_finished_run_publishes_it_once(place: Place) -> None:
    assert place.train(*SMALL, "--epochs", "2").exit_code == 0
    published = read_state(place.checkpoint).published
    described = ModelStore(place.store).describe(ModelStore(place.store).resolve("fox"))
    assert published
    assert (published.ref, published.digest) == ("fox@1", described.digest)
    again = place.train("--resume")
    assert again.exit_code == 0, again.output
    assert "the run is finished and published as fox@1" in again.output
    assert len(ModelStore(place.store).versions("fox")) == 1
    shutil.rmtree(place.store)  # so it is published in no store any more
    assert "published fox@1" in place.train("--resume").output

    more = place.train("--resume", "--epochs", "4")
    assert more.exit_code == 0, more.output
    assert "published fox@2" in more.output
    run = place.facts(2)["run"]
    assert round(run["num_epochs"]) == 4
    assert run["changes"] == [{"step": run["num_updates"] // 2, "setting": "epochs", "value": 4}]
    assert "epochs became 4" in (place.store / "fox" / "2" / "README.md").read_text()


def test_train__a_full_disk_at_publishing_is_published_by_resume(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def write(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:  # after the rehearsal
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_artifact(*arguments)

    monkeypatch.setattr("service.training.publishing.write_artifact", write)
    failed = place.train(*SMALL, "--epochs", "1")
    assert failed.exit_code == 1
    assert "No space left on device. Its weights are in" in failed.stderr
    assert "--resume publishes them" in failed.stderr
    refused = place.train(*SMALL, "--epochs", "1")
    assert "holds a run that is not published" in refused.output
    assert "published fox@1" in place.train("--resume").output


@pytest.mark.parametrize("broken", ["space", "setting"])
def test_train__what_publishing_would_refuse_is_refused_before_the_first_update(
    place: Place, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "space":
        monkeypatch.setattr("service.training.publishing.write_artifact", full)
    else:
        monkeypatch.setenv("GRU_SERVE_KERNEL", "none")
    result = place.train(*SMALL, "--epochs", "1")
    assert result.exit_code != 0
    assert ("No space left" if broken == "space" else "GRU_SERVE_KERNEL") in result.output
    assert not place.checkpoint.exists()


def test_train__a_charset_with_folded_characters_is_published(place: Place) -> None:
    charset = "".join(sorted(set(TEXT) - set("Tf")))
    result = place.train(*SMALL, "--epochs", "1", "--charset", charset, "--unknown-chars", "drop")
    assert result.exit_code == 0, result.output
    assert "f" not in place.facts(1)["sample"]["prompt"]


def test_train__a_charset_of_thousands_of_characters_is_published(place: Place) -> None:
    charset = "".join(sorted(set(TEXT))) + "".join(chr(0x20000 + number) for number in range(40_000))
    result = place.train("--embedding-dim", "1", "--num-units", "1", *SMALL[4:], "--epochs", "1", "--charset", charset)
    assert result.exit_code == 0, result.output
    assert place.facts(1)["settings"]["charset"].endswith(f"({len(charset):,} characters)")


def test_train__two_runs_do_not_share_a_checkpoint(place: Place) -> None:
    with lock_checkpoint(place.checkpoint, "fox", pytest.fail):
        result = place.train(*SMALL)
    assert result.exit_code == 1
    assert f"is in use by process {os.getpid()} on" in result.stderr
    assert not place.store.exists()


def test_train__for_some_minutes_reads_what_the_machine_reads_in_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Trainer] = []

    def pace(trainer: Trainer) -> float:
        paces.append(trainer)
        return 50.0

    monkeypatch.setattr(Trainer, "pace", pace)
    result = place.train(*SMALL, "--minutes", "1")
    assert result.exit_code == 0, result.output
    facts = place.facts(1)
    limit = facts["settings"]["max_chars"]
    assert f"1 minute at 50 characters a second, and evaluations: --max-chars {limit}\n" in result.stderr
    assert 2000 <= limit <= 3000
    assert facts["run"]["num_updates"] == math.ceil(limit / (4 * 16))
    assert f"--max-chars {limit}" in facts["command"]
    finished = place.train("--resume")
    assert "--resume with more --max-chars continues it" in finished.output
    result = place.train("--resume", "--minutes", "1")
    assert result.exit_code == 0, result.output
    more = place.facts(2)["settings"]["max_chars"]
    assert facts["run"]["num_updates"] * 64 + 2000 <= more <= facts["run"]["num_updates"] * 64 + 3000
    assert len(paces) == 2
    refused = place.train(*SMALL, "--minutes", "1", "--max-chars", "5", "--overwrite")
    assert (refused.exit_code, "--minutes chooses --max-chars" in refused.output) == (2, True)


def test_train__begins_with_a_version(place: Place, tmp_path: Path) -> None:
    assert place.train(*SMALL, "--epochs", "3").exit_code == 0
    loss = min(point["validation_loss"] for point in place.facts(1)["curve"])
    other = ["--init-from", "fox@1", "--overwrite", "--batch-size", "4", "--sequence-length", "16", "--threads", "1"]
    again = place.train(*other, "--epochs", "1")
    assert again.exit_code == 0, again.output
    facts = place.facts(2)
    assert facts["curve"][0]["step"] == 0
    assert facts["curve"][0]["validation_loss"] == pytest.approx(loss, abs=1e-6)
    digest = ModelStore(place.store).describe(ModelStore(place.store).resolve("fox@1")).digest
    assert facts["initial"] == {"ref": "fox@1", "digest": digest}
    assert "--init-from fox@1" in facts["command"]
    assert f"began with the weights of `fox@1`, digest `{digest}`" in (place.store / "fox/2/README.md").read_text()

    new = tmp_path / "new.txt"
    new.write_text(TEXT.replace("fox", "f\u00f6x"))
    grown = place.train(*other, "--epochs", "1", corpus=new)
    assert grown.exit_code == 0, grown.output
    config = json.loads((place.store / "fox/3/config.json").read_text())
    assert config["charset"] == "".join(sorted(set(TEXT))) + "\u00f6"
    resumed = place.train("--resume", "--epochs", "2", corpus=new)
    assert resumed.exit_code == 0, resumed.output
    assert place.facts(4)["initial"] == {"ref": "fox@1", "digest": digest}
    refused = place.train(*other, "--num-units", "512")
    assert refused.exit_code == 2
    assert "--num-units 512 contradicts --init-from fox@1, which has 16" in refused.output


def test_train__publishes_a_chat_template_also_when_resumed_and_from_a_version_with_one(place: Place) -> None:
    template = place.corpus.with_name("mine.json")
    template.write_text('{"user": "{content}\\n", "assistant": "I am {content}\\n", "stop": ["\\n"]}')
    result = place.train(*SMALL, "--epochs", "1", "--chat", "play")
    assert result.exit_code == 2
    assert "the text has no 'R' (U+0052), which the template writes" in result.output
    result = place.train(*SMALL, "--epochs", "1", "--chat", str(template))
    assert result.exit_code == 0, result.output
    assert place.facts(1)["command"].endswith("--chat chat.json")
    result = place.train("--resume", "--epochs", "2")
    assert result.exit_code == 0, result.output
    place.checkpoint.unlink()
    result = place.train("--init-from", "fox@1", "--batch-size", "4", "--sequence-length", "16", "--epochs", "1")
    assert result.exit_code == 0, result.output
    store = ModelStore(place.store)
    chats = [store.describe(version).chat for version in store.versions("fox")]
    assert len(chats) == 3
    assert {chat and chat.assistant for chat in chats} == {"I am {content}\n"}
    result = place.train("--overwrite", "--init-from", "fox@1", "--epochs", "1", "--chat", "lines")
    assert result.exit_code == 0, result.output
    assert store.describe(store.resolve("fox")).chat == PRESETS["lines"]
    assert place.facts(4)["command"].endswith("--chat lines")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with"),
            "the GPU failed: CUDA error: uns",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out: lower --batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory ran out: lower --batch-size"),
    ],
)
def test_train__a_gpu_that_fails_loses_no_best_weights(
    place: Place, monkeypatch: pytest.MonkeyPatch, problem: Exception, said: str
) -> None:
    update = Trainer._update

    def fail(trainer: Trainer, window: Any) -> float:
        if trainer.state.step == fails_at:
            raise problem
        return update(trainer, window)

    monkeypatch.setattr(Trainer, "_update", fail)
    for fails_at in (5, 0):  # with and without an evaluation before
        result = place.train(*SMALL, "--epochs", "1", "--eval-interval", "3", "--overwrite")
        assert isinstance(result.exception, SystemExit), result.exception
        assert (result.exit_code, said in result.stderr) == (1, True), result.output
        assert ("published fox@1" in result.stdout) == (fails_at == 5)

    def begin(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(Trainer, "__init__", begin)
    result = place.train(*SMALL, "--overwrite")
    assert (result.exit_code, said in result.stderr) == (1, True), result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_train__says_that_there_is_no_gpu(place: Place) -> None:
    result = place.train(*SMALL, "--device", "cuda")
    assert result.exit_code == 1
    assert "or train with --device cpu" in result.stderr


def test_train__says_what_to_do_next_and_shows_samples(place: Place) -> None:
    result = place.train(*SMALL, "--epochs", "1")
    assert "1 thread, products in " in result.stderr
    assert "sample '" in result.stderr
    assert f"next: gru-serve generate --model fox --prompt '' --model-store {place.store}" in result.stderr


def test_train__lets_threads_spin_only_briefly_unless_the_user_chose() -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    program = "import os; from service.commands.options import limit_spinning; limit_spinning(); "
    program += f"print([os.environ.get(name) for name in {names}])"
    plain = {key: value for key, value in os.environ.items() if key not in names}
    for given, expected in (
        ({}, [None, "2000" if platform.machine() == "x86_64" else "50000", "1"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None, None]),
        ({"GOMP_SPINCOUNT": "9"}, [None, "9", None]),
    ):
        done = subprocess.run([sys.executable, "-c", program], env=plain | given, capture_output=True, text=True)
        assert done.stdout.strip() == str(expected), done.stderr


def test_train__stays_with_the_precision_that_was_faster_at_the_start(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "bfloat16_speedup", lambda: 0.6)
    result = place.train(*SMALL, "--epochs", "1")
    assert "products in float32 (bfloat16 is 0.6 times as fast here)\n" in result.stderr
    assert "--precision float32" in place.facts(1)["command"]
    assert "| precision | float32 |" in (place.store / "fox/1/README.md").read_text()
    monkeypatch.setattr(devices, "bfloat16_speedup", lambda: 2.0)
    for number, words in enumerate(([], ["--precision", "auto"]), start=2):
        result = place.train(*SMALL, *words, "--epochs", str(number), "--resume")
        assert "products in float32\n" in result.stderr
        assert place.facts(number)["settings"]["precision"] == "float32"
    result = place.train(*SMALL, "--epochs", "1", "--overwrite")
    assert "products in bfloat16 (bfloat16 is 2.0 times as fast here)\n" in result.stderr


def test_progress__on_a_terminal_shows_the_time_that_is_left_and_the_losses_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with open(master, "rb", buffering=0) as screen, open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        lines = []
        with Progress("training", 27_000_000) as progress:
            assert progress._bar is not None
            progress._bar.start_t -= 36_000  # it began ten hours ago
            progress._bar.n = 2_000_000
            progress.note("loss 1.523, validation 1.4321")
            for columns in (80, 50, 20):  # the window of the terminal becomes narrower
                termios.tcsetwinsize(terminal, (24, columns))
                progress._bar.refresh()
                shown = ""
                while "training:   7%" not in shown:
                    shown += screen.read(10_000).decode()
                lines.append(shown.rpartition("\r")[2].rstrip())
                assert len(lines[-1]) <= columns
        monkeypatch.undo()
    assert "| 125:00:00 left, loss 1.523, validation 1.4321, 55.6char/s" in lines[0]
    assert "125:00:00 left, loss 1.523" in lines[1]


def test_progress__in_a_log_file_is_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("service.commands.progress.time.monotonic", lambda: now[0])
    with Progress("training", 1000) as progress:
        for _ in range(70):
            now[0] += 1
            progress.note("loss 1.5")
            progress.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "training: 30%, 300 of 1,000 characters, 10 a second, 1.2 minutes left, loss 1.5",
        "training: 60%, 600 of 1,000 characters, 10 a second, 0.7 minutes left, loss 1.5",
    ]
