"""Other libraries as candidates of a comparison, with a process for each number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.candidates import Candidate, Shipped
from benchmarks.peers.environment import environment
from benchmarks.peers.peer import Peer
from service.model.gru import GRUCharModel

PEERS = ("tensorflow", "onnxruntime")
_CHECKED_CHARS = 20


def peer_candidates(
    stack: ExitStack, name: str, shipped: Shipped, rows: Sequence[int], threads: Sequence[int]
) -> list[Candidate]:
    """Start a library of PEERS, which the first call installs, for each number of rows and of threads.

    Its processes end with the stack. Raises Skipped if it can't be installed or started, or computes something else.
    """
    worker = [str(environment(name)), "-m", f"benchmarks.peers.{name}_worker"]
    return start_workers(stack, name, worker, shipped, rows, threads)


def start_workers(
    stack: ExitStack, name: str, worker: Sequence[str], shipped: Shipped, rows: Sequence[int], threads: Sequence[int]
) -> list[Candidate]:
    """Start a worker's command for each number of threads, and check that it computes the model's logits.

    Raises Skipped if a worker can't be started or its logits after a text are not the model's.
    """
    text = "".join(shipped.artifact.config.charset[:_CHECKED_CHARS])
    expected = reference_logits(shipped, text)
    candidates = []
    for number in threads:
        peer = stack.enter_context(Peer(worker, shipped.directory, number))
        peer.check(text, expected, rows)
        candidates += [Candidate(name, num_rows, number, partial(peer.chars_per_s, num_rows)) for num_rows in rows]
    return candidates


def reference_logits(shipped: Shipped, text: str) -> NDArray[np.float32]:
    """Return the logits after a text, (V,) float32, computed with torch."""
    artifact = shipped.artifact
    model = GRUCharModel.from_tensors(artifact.config, artifact.tensors)
    ids = torch.tensor([[artifact.config.charset.index(char) for char in text]])
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(ids, model.initial_hidden(1))[0][0, -1].numpy()
    return logits
