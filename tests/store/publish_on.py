"""A process of test_file_systems: publish on each file system that file_system.c imitates; print what happened as JSON.

Arguments: the store's directory, the model's config as JSON, and the names of the file systems.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from service.errors import GruServeError
from service.model.artifact import write_artifact
from service.model.config import ModelConfig
from service.store.model_store import ModelStore


def main() -> None:
    """Publish, set an alias and delete, each on every file system."""
    root, config = Path(sys.argv[1]), ModelConfig.model_validate(json.loads(sys.argv[2]))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    print(json.dumps({fault: work(ModelStore(root / (fault or "local")), config, tensors) for fault in sys.argv[3:]}))


def work(store: ModelStore, config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Return what each call answered: the word ok, or the error's message."""
    os.environ["FAULT"] = store.root.name
    calls: dict[str, Callable[[], object]] = {
        "check": lambda: store.check_writable("m"),
        "publish": lambda: store.publish("m", lambda staging: write_artifact(staging, config, tensors, {}, {})),
        "again": lambda: store.publish("m", lambda staging: write_artifact(staging, config, tensors, {}, {})),
        "alias": lambda: store.set_alias("m", "a", 1),
        "verify": lambda: store.verify("m@a"),
        "delete": lambda: store.delete("m@2"),
    }
    answers = {}
    for name, call in calls.items():
        try:
            call()
            answers[name] = "ok"
        except (GruServeError, OSError) as error:
            answers[name] = f"{type(error).__name__}: {error}"
    os.environ["FAULT"] = ""
    answers["left"] = " ".join(sorted(path.name for path in (store.root / "m").glob("*")))
    return answers


main()
