"""The checkpoint of a training run: one safetensors file with the run's state as JSON metadata.

A checkpoint is replaced atomically. Unlike a pickle, a checkpoint that is read executes nothing. One process at a time
uses it, which a lock file beside it enforces.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from service.errors import InvalidCheckpoint
from service.model.chat_template import ChatTemplate
from service.store.staging import fsync, made_directories
from service.training.hyperparameters import Hyperparameters

MAX_POINTS = 1000  # of a loss curve, besides its first, last and best point
# A safetensors file begins with the length of its header, 8 bytes. The header begins with the metadata, here the run's
# state and the sum, in any order.
_BEGINNING = re.compile(rb'.{8}\{"__metadata__":\{("sha256":"[0-9a-f]{64}",)?"run":', re.DOTALL)
_BEGINNING_BYTES = 200  # more than it has
_MAX_CHANGES = 50  # changes of settings that are remembered
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}  # a file system without flock


class Evaluation(BaseModel):
    """One point of the loss curve. Losses are in nats a character."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int  # evaluations before it
    step: int  # updates done
    epoch: float  # epochs done
    learning_rate: float  # of the last update; 0 before the first
    training_loss: float | None  # with dropout, mean over the updates since the previous evaluation; None without any
    validation_loss: float  # of the averaged weights, without dropout


class VersionRecord(BaseModel):
    """A version in the model store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: str  # name@number
    digest: str  # see Artifact.digest


class PublishedRecord(VersionRecord):
    """A version that the run has become."""

    step: int  # updates of the weights that it has


class SettingsChange(BaseModel):
    """A setting that was changed when the run was resumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int  # updates done before
    setting: str
    value: int


class RunState(BaseModel):
    """Everything about a run that is not a tensor."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    settings: Hyperparameters
    charset: str
    corpus_name: str
    corpus_sha256: str
    device: str = "cpu"  # of the last updates
    initial: VersionRecord | None = None  # the version that the run began with; None for random weights
    chat: ChatTemplate | None = None  # of the version that the run will publish
    changes: list[SettingsChange] = []  # the last ones
    step: int = 0  # updates done
    seconds: float = 0.0  # time spent on updates and evaluations
    loss_sum: float = 0.0  # of the updates since the last evaluation
    loss_count: int = 0  # how many updates `loss_sum` covers
    num_evaluations: int = 0
    curve: list[Evaluation] = []  # evenly thinned to about `MAX_POINTS`; has the first, the last and the best point
    best: Evaluation | None = None  # the one with the lowest validation loss; None before the first evaluation
    since_best: int = 0  # evaluations since then that count for `patience`
    finished: bool = False
    published: PublishedRecord | None = None  # the newest version that the run has become

    @property
    def best_step(self) -> int | None:
        """The updates of the best weights so far; None before the first evaluation."""
        return self.best.step if self.best else None

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far; infinity before the first evaluation."""
        return self.best.validation_loss if self.best else float("inf")

    @property
    def is_published(self) -> bool:
        """Whether the best weights so far are those of a published version."""
        return self.published is not None and self.published.step == self.best_step

    def record(self, point: Evaluation) -> bool:
        """Add an evaluation. Return whether it is the best so far."""
        is_best = point.validation_loss < self.best_loss
        if is_best:
            self.best, self.since_best = point, 0
        else:
            self.since_best += 1
        self.num_evaluations += 1
        # Every 2^k-th evaluation stays. k depends only on their number, so a resumed run has the same curve.
        stride = 1
        while self.num_evaluations > stride * MAX_POINTS:
            stride *= 2
        self.curve = [p for p in self.curve if p.number % stride == 0 or p == self.best] + [point]
        return is_best

    def change(self, settings: Hyperparameters) -> None:
        """Continue with other settings, which differ in numbers only."""
        for name in Hyperparameters.model_fields:
            value = getattr(settings, name)
            if value != getattr(self.settings, name):
                self.changes.append(SettingsChange(step=self.step, setting=name, value=value))
        self.changes = self.changes[-_MAX_CHANGES:]
        self.settings = settings


def require_replaceable(path: Path) -> None:
    """Raise InvalidCheckpoint for a file that a new run must not replace, because it never was a checkpoint.

    A damaged or older checkpoint may be replaced, and an empty file.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # a pipe is not opened: that would wait
        head = _head(path) if is_file else b""
    except OSError as error:
        raise InvalidCheckpoint(f"can't read {path}: {_brief(error)}") from error
    if not is_file or (head and not _BEGINNING.match(head)):
        raise InvalidCheckpoint(
            f"{path} is not a checkpoint, so it is not replaced: name another file with --checkpoint"
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_BEGINNING_BYTES)


def save_checkpoint(path: Path, state: RunState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the checkpoint at `path`, atomically: after a crash the file is either the old one or the new one.

    Raises InvalidCheckpoint if it can't be written.
    """
    # A folder, because safetensors writes into a file with a random name, which a killed process leaves. The next write
    # removes the folder.
    folder = path.with_name(path.name + ".part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        temporary = folder / path.name
        run = state.model_dump_json()
        save_file(contiguous, temporary, metadata={"run": run, "sha256": _sum(run, contiguous)})
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't write the checkpoint {path}: {_brief(error)}") from error
    finally:
        with suppress(OSError):
            _remove(folder)


def _remove(path: Path) -> None:
    """Remove a folder with what it has, or a file; nothing if there is none. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_space(path: Path) -> None:
    """Raise InvalidCheckpoint if the disk has no space for a second copy of the checkpoint."""
    needed, free = path.stat().st_size, shutil.disk_usage(path.parent).free
    if free < needed:
        raise InvalidCheckpoint(
            f"{path.parent} has {free / 1e6:,.0f} MB free, and replacing the checkpoint takes {needed / 1e6:,.0f} MB: "
            "free space, or name another place with --checkpoint"
        )


def mark_published(path: Path, published: PublishedRecord) -> None:
    """Write into a checkpoint which version its run has become. Raises InvalidCheckpoint.

    The tensors stay as they are in the file: those in memory may belong to a run that has diverged since.
    """
    state = read_state(path)
    state.published = published
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            _check_sum(path, file.metadata(), tensors)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't read {path}: {_brief(error)}") from error
    save_checkpoint(path, state, tensors)


def read_state(path: Path) -> RunState:
    """Read the state of a run without its tensors.

    Raises InvalidCheckpoint if `path` holds no intact checkpoint, or one of another version of gru-serve.
    """
    try:
        with safe_open(path, framework="pt") as file:
            run = json.loads((file.metadata() or {})["run"])
        _check_format(path, run)
        return RunState.model_validate(run)
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"there is no checkpoint at {path}: leave --resume out to begin a run") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(
            f"{path} is damaged or not a checkpoint of this version ({_brief(error)}): name another file with "
            "--checkpoint, or begin anew with --overwrite"
        ) from error


def _check_format(path: Path, run: dict[str, Any]) -> None:
    """Raise InvalidCheckpoint for a checkpoint that another version of gru-serve wrote."""
    known, found = set(Hyperparameters.model_fields), set(run["settings"])
    if (written := run.get("format", 1)) == 2 and known == found:
        return
    differences = ", ".join(sorted(known ^ found)[:4])
    raise InvalidCheckpoint(
        f"{path} was written by another version of gru-serve (format {written}"
        f"{f'; its settings differ in {differences}' if differences else ''}), whose runs this version can't continue: "
        "resume it with that version, or begin anew with --overwrite"
    )


def read_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint.

    Raises InvalidCheckpoint if their names, shapes and dtypes are not those of `expected`, or the file is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                differences = sorted(names ^ set(expected))[:4]
                raise InvalidCheckpoint(
                    f"the tensors in {path} are not those of this run; they differ in {differences}"
                )
            for name, template in expected.items():
                if tuple(file.get_slice(name).get_shape()) != tuple(template.shape):
                    raise InvalidCheckpoint(f"{path}: the shape of tensor {name} is not {tuple(template.shape)}")
                tensors[name] = file.get_tensor(name)
                if tensors[name].dtype != template.dtype:
                    raise InvalidCheckpoint(f"{path}: the dtype of tensor {name} is not {template.dtype}")
            _check_sum(path, file.metadata(), tensors)
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"can't read {path}: {_brief(error)}") from error
    return tensors


@contextmanager
def lock_checkpoint(path: Path, name: str, warn: Callable[[str], object]) -> Iterator[None]:
    """Hold the checkpoint's lock during the block, for a run of the model `name`.

    The system releases the lock if the process dies. Calls `warn` with a sentence if the file system has no locks.

    Makes the checkpoint's folder, and removes it again if there is no checkpoint after the block. Raises
    InvalidCheckpoint if another process holds the lock, or if the folder can't be written.
    """
    lock = path.with_name(path.name + ".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(made_directories(path.parent))
            file = stack.enter_context(_lock(lock, warn))
            stack.callback(_remove_lock, lock)  # before the lock is released, so that a new run sees that it is stale
            file.truncate(0)
            # Without a buffer: closing the file would write it again, and fail again if the disk is full.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, which trains {name}".encode())
        except OSError as error:
            raise InvalidCheckpoint(f"can't write {lock}: {_brief(error)}") from error
        yield


def _remove_lock(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _lock(path: Path, warn: Callable[[str], object]) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # the previous run has just ended and removed this file
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read(300) or "another process"
            checkpoint = path.with_name(path.name.removesuffix(".lock"))
            raise InvalidCheckpoint(
                f"{checkpoint} is in use by {holder}: wait until it ends, or name another file with --checkpoint"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            warn(f"{path.parent} is on a file system without locks: make sure that no other run uses this checkpoint")
            return file


def _sum(run: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 sum of a run's state, as JSON, and of its tensors, in hexadecimal."""
    digest = hashlib.sha256(run.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().numpy().data)
    return digest.hexdigest()


def _check_sum(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise InvalidCheckpoint if the file was damaged. One of an earlier version of gru-serve has no sum."""
    if "sha256" in metadata and metadata["sha256"] != _sum(metadata["run"], tensors):
        raise InvalidCheckpoint(
            f"{path} is damaged (its SHA-256 sum is not that of its contents): name another file with --checkpoint, or "
            "begin anew with --overwrite"
        )


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
