"""The device that trains: the CPU, or a GPU if torch has one."""

from __future__ import annotations

from typing import Literal

import torch

from service.errors import MissingLibrary

Device = Literal["auto", "cpu", "cuda"]
CPU = torch.device("cpu")


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
    return torch.device("cuda", torch.cuda.current_device())


def product_dtype(precision: str, device: torch.device = CPU) -> torch.dtype:
    """Return the dtype of large products. `auto` means bfloat16 if the device multiplies it directly."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
