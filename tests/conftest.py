"""What every test gets: a leak check, and a small real model in a store."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from service.engine.kernels import Kernel
from service.engine.torch_stepper import TorchStepper
from service.model.artifact import write_artifact
from service.model.config import ModelConfig
from service.registry.loaded_models import EngineSettings, LoadedModel
from service.store.model_store import ModelStore
from service.training.network import initialise
from tests.parts import redis_process

TINY_CHARSET = "\n !'-,.:?ABCEFIJLMORTUabcdefghijklmnopqrstuvwxyz"


def tiny_config(**changes: object) -> ModelConfig:
    """Sizes that step in microseconds."""
    sizes: dict[str, object] = {"embedding_dim": 8, "num_units": 16, "num_layers": 1, "charset": TINY_CHARSET}
    return ModelConfig.model_validate(sizes | changes)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights as training begins with them."""
    from service.model.gru import GRUCharModel

    model = GRUCharModel(config)
    initialise(model, seed)
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def publish_tiny(
    store: ModelStore, name: str = "tiny", seed: int = 0, facts: dict[str, object] | None = None, **changes: object
) -> str:
    """Publish a small model with random weights; its full name."""
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed)
    facts = {"losses": {"validation_nats_per_char": 3.5}, "published_at": 1_700_000_000} | (facts or {})

    def write(directory: Path) -> None:
        write_artifact(directory, config, tensors, facts, {"README.md": b"# tiny\n"})

    return store.publish(name, write).ref


def engine_settings(**changes: object) -> EngineSettings:
    """Engines on the torch stepper."""
    return EngineSettings(**({"kernel": Kernel("torch", TorchStepper)} | changes))  # type: ignore[arg-type]


@contextmanager
def loaded_model(store: ModelStore, ref: str = "tiny", **changes: object) -> Iterator[LoadedModel]:
    """A model whose engine ends with the block."""
    model = LoadedModel(*store.load(ref), engine_settings(**changes))
    try:
        yield model
    finally:
        model.engine.close()


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store that holds `tiny@1`; not to be changed."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store)
    return store


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server for those who keep to a prefix of their own."""
    with redis_process(tmp_path_factory.mktemp("redis")) as process:
        yield process.url


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread or a file descriptor behind, or another number of torch threads."""
    threads, files, torch_threads = set(threading.enumerate()), _open_files(), torch.get_num_threads()
    yield
    torch.set_num_threads(torch_threads)
    deadline = time.monotonic() + 2
    while True:
        left_threads = [thread for thread in threading.enumerate() if thread not in threads]
        left_files = {fd: target for fd, target in _open_files().items() if files.get(fd) != target}
        if not left_threads and not left_files:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: threads {left_threads}, files {left_files}")
        gc.collect()
        time.sleep(0.01)


def _open_files() -> dict[str, str]:
    found = {}
    try:
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue  # the descriptor of the listing itself
    except FileNotFoundError:
        return {}  # not Linux
    # matplotlib keeps the fonts that it has used open.
    return {
        fd: target for fd, target in found.items() if not target.startswith("/proc/") and not target.endswith(".ttf")
    }
