"""Small models with random weights, in a store or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.engine.kernels import Kernel
from service.engine.torch_stepper import TorchStepper
from service.model.artifact import CHAT, write_artifact
from service.model.chat_template import PRESETS
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
    store: ModelStore,
    name: str = "tiny",
    seed: int = 0,
    facts: dict[str, object] | None = None,
    chat: str | None = None,
    **changes: object,
) -> str:
    """Publish a small model with random weights; return its reference, such as `tiny@1`.

    Args:
        store: Where it is published.
        name: The model's name.
        seed: Of its weights.
        facts: More facts about its training.
        chat: The preset of its chat template; None for no template.
        changes: Other values for fields of its config.
    """
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed)
    facts = {"losses": {"validation_nats_per_char": 3.5}, "published_at": 1_700_000_000} | (facts or {})
    files = {"README.md": b"# tiny\n"} | ({CHAT: PRESETS[chat].to_json().encode()} if chat else {})

    def write(directory: Path) -> None:
        write_artifact(directory, config, tensors, facts, files)

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


NAMES = "ABCEFIJ"  # the first letters of the texts of `publish_names`


def publish_names(store: ModelStore, name: str = "names") -> str:
    """Publish a model of lines such as `Anna`, as one that was trained on lines; return its reference.

    After the zero state it writes one of NAMES; then small letters, and after each of them perhaps a newline; after a
    newline, the next line.
    """
    charset = "\n" + NAMES + "anoé"
    begins = np.array([char in NAMES for char in charset])
    after_letter = np.where(begins, -30.0, 0.0)
    after_begin = np.where(begins | (np.arange(len(charset)) == 0), -30.0, 0.0)
    logits = np.stack([np.where(begins, 0.0, -30.0)] + [after_begin] * len(NAMES) + [after_letter] * 4)
    return publish_pairs(store, name, charset, logits)


def publish_pairs(store: ModelStore, name: str, charset: str, logits: NDArray[np.float64]) -> str:
    """Publish a model whose state only remembers the last character, so that its weights can be written down.

    Args:
        store: Where it is published.
        name: The model's name.
        charset: Its characters.
        logits: (V, V): of each character after each character. The zero state counts as the first one.
    """
    size = len(charset)
    config = tiny_config(charset=charset, embedding_dim=size, num_units=size)
    tensors = {key: np.zeros(shape, np.float32) for key, shape in config.tensor_shapes().items()}
    tensors["embedding.weight"] += np.eye(size, dtype=np.float32)
    tensors["gru.weight_ih_l0"][2 * size :] = 9 * np.eye(size)  # the candidate: 1 for the unit of the last character
    tensors["gru.bias_ih_l0"][size : 2 * size] = -30  # the update gate: nothing remains of the state before
    tensors["dense.bias"][:] = logits[0]
    tensors["dense.weight"][:] = (logits - logits[0]).T

    def write(directory: Path) -> None:
        facts: dict[str, object] = {"losses": {"validation_nats_per_char": 1.5}, "published_at": 1_700_000_000}
        write_artifact(directory, config, tensors, facts, {"README.md": f"# {name}\n".encode()})

    return store.publish(name, write).ref
