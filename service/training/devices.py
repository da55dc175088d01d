"""The device that trains: the CPU, or a GPU if torch has one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch

from service.errors import MissingLibrary, TrainingFailed

Device = Literal["auto", "cpu", "cuda"]
CPU = torch.device("cpu")

_ROWS, _UNITS = 64, 1024  # of the product that is measured: a step of the shipped model in training
_ROUNDS = 5
_HOPELESS = 4.0  # times as long as float32, after which one round is enough
_MIN_SPEEDUP = 1.2  # from which bfloat16 is worth its rounding


def find_device(name: Device) -> torch.device:
    """Return the device of this name; `auto` takes a GPU if there is one. Raises MissingLibrary if `cuda` has none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        reason = "is built without CUDA" if torch.version.cuda is None else "finds no GPU that it can use"
        raise MissingLibrary(
            f"--device cuda: torch {torch.__version__} {reason}. Install a torch with CUDA and a driver that fits it, "
            "or train with --device cpu"
        )
    # Products in bfloat16 sum in float32 then, as on the CPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def failures() -> Iterator[None]:
    """Raise TrainingFailed if memory runs out in the block, or a GPU fails."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or "memory" in what or "ALLOC_FAILED" in what:
            raise TrainingFailed("memory ran out: lower --batch-size, --sequence-length or --num-units") from error
        if isinstance(error, torch.AcceleratorError) or what.startswith("CUDA error"):
            raise TrainingFailed(f"the GPU failed: {what}; --device cpu trains without it") from error
        raise


def product_dtype(precision: str, device: torch.device = CPU) -> torch.dtype:
    """Return the dtype of large products. `auto` means bfloat16 if the device multiplies it clearly faster."""
    if precision == "auto":
        if device.type == "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_faster = bfloat16_speedup() >= _MIN_SPEEDUP
        return torch.bfloat16 if is_faster else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@cache
def bfloat16_speedup() -> float:
    """Return how many times as fast as in float32 this processor multiplies matrices in bfloat16.

    It is measured, because a processor with instructions for bfloat16 may still be slower with them: Intel's without
    AMX reach 0.7 times the speed of float32, AMD's twice. Processor time of a single thread hardly depends on other
    processes. Both formats take turns, and the shortest time of each counts. That takes about 0.1 s, once in a process.
    """
    operands = {
        dtype: (torch.ones(_ROWS, _UNITS, dtype=dtype), torch.ones(3 * _UNITS, _UNITS, dtype=dtype).t())
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(_ROUNDS + 1):
            for dtype, (left, right) in operands.items():
                began = time.thread_time()
                torch.mm(left, right)
                seconds = time.thread_time() - began
                if number > 0:  # the first round also pays for what is made once
                    best[dtype] = min(best[dtype], seconds)
            if number > 0 and best[torch.bfloat16] > _HOPELESS * best[torch.float32]:
                break
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)
