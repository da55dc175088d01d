"""Other libraries as contestants, with one process for each number of threads, idle but for their turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contestants import Contestant, Shipped
from benchmarks.peers.environment import environment
from benchmarks.peers.peer import Peer
from service.model.gru import GRUCharModel

PEERS = ("tensorflow", "onnxruntime")
_CHECKED_CHARS = 20


def peer_contestants(
    stack: ExitStack, name: str, shipped: Shipped, rows: Sequence[int], threads: Sequence[int]
) -> list[Contestant]:
    """A library of PEERS, installed at the first call. Its processes end with the stack. Raises Skipped.

    It is skipped too if its logits after a text are not the model's.
    """
    return enter(stack, name, [str(environment(name)), "-m", f"benchmarks.peers.{name}_worker"], shipped, rows, threads)


def enter(
    stack: ExitStack, name: str, worker: Sequence[str], shipped: Shipped, rows: Sequence[int], threads: Sequence[int]
) -> list[Contestant]:
    """What a worker's command makes of the model. Raises Skipped."""
    text = "".join(shipped.artifact.config.charset[:_CHECKED_CHARS])
    expected = reference_logits(shipped, text)
    found = []
    for number in threads:
        peer = stack.enter_context(Peer(worker, shipped.directory, number))
        peer.check(text, expected, rows)
        found += [Contestant(name, num_rows, number, partial(peer.chars_per_s, num_rows)) for num_rows in rows]
    return found


def reference_logits(shipped: Shipped, text: str) -> NDArray[np.float32]:
    """(V,) logits after a text in float32."""
    artifact = shipped.artifact
    model = GRUCharModel.from_tensors(artifact.config, artifact.tensors)
    ids = torch.tensor([[artifact.config.charset.index(char) for char in text]])
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(ids, model.initial_hidden(1))[0][0, -1].numpy()
    return logits
