"""Small models with random weights, in a store or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from service.engine.kernels import Kernel
from service.engine.torch_stepper import TorchStepper
from service.model.artifact import write_artifact
from service.model.config import ModelConfig
from service.model.gru import GRUCharModel
from service.registry.loaded_models import EngineSettings, LoadedModel
from service.store.model_store import ModelStore
from service.training.network import initialise

TINY_CHARSET = "\n !'-,.:?ABCEFIJLMORTUabcdefghijklmnopqrstuvwxyz"


def tiny_config(**changes: object) -> ModelConfig:
    """Return sizes of a model that steps in microseconds, with some fields changed."""
    sizes: dict[str, object] = {"embedding_dim": 8, "num_units": 16, "num_layers": 1, "charset": TINY_CHARSET}
    return ModelConfig.model_validate(sizes | changes)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the weights with which training begins."""
    model = GRUCharModel(config)
    initialise(model, seed)
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def publish_tiny(
    store: ModelStore, name: str = "tiny", seed: int = 0, facts: dict[str, object] | None = None, **changes: object
) -> str:
    """Publish a small model with random weights; return its reference, such as `tiny@1`.

    Args:
        store: Where it is published.
        name: The model's name.
        seed: Of its weights.
        facts: More facts about its training.
        changes: Other values for fields of its config.
    """
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed)
    facts = {"losses": {"validation_nats_per_char": 3.5}, "published_at": 1_700_000_000} | (facts or {})

    def write(directory: Path) -> None:
        write_artifact(directory, config, tensors, facts, {"README.md": b"# tiny\n"})

    return store.publish(name, write).ref


def engine_settings(**changes: object) -> EngineSettings:
    """Return settings of engines that run on the torch stepper."""
    return EngineSettings(**({"kernel": Kernel("torch", TorchStepper)} | changes))  # type: ignore[arg-type]


@contextmanager
def loaded_model(store: ModelStore, ref: str = "tiny", **changes: object) -> Iterator[LoadedModel]:
    """Load a model; close its engine with the block."""
    model = LoadedModel(*store.load(ref), engine_settings(**changes))
    try:
        yield model
    finally:
        model.engine.close()
