"""A process of test_model_store: for every line on standard input, fork a publisher and print its process id.

The publisher publishes versions until it is killed. Forking takes a millisecond, starting an interpreter half a second;
forking is safe here because this process has no threads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from service.model.artifact import write_artifact
from service.model.config import ModelConfig
from service.store.model_store import ModelStore


def main() -> None:
    """Command-line arguments: the store's directory, and the model's config as JSON."""
    root, config = Path(sys.argv[1]), ModelConfig.model_validate(json.loads(sys.argv[2]))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            while True:
                ModelStore(root).publish(
                    "m", lambda d: write_artifact(d, config, tensors, {}, {"README.md": b"x" * 9000})
                )
        print(child, flush=True)
        os.waitpid(child, 0)


main()
