"""Which implementation of the stepper computes: the kernel in C++ or torch. Both give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from service.engine.native.binding import variants
from service.engine.stepper import Stepper
from service.errors import InvalidSettings
from service.model.quantize import QuantizedGRU

KernelChoice = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class Kernel:
    """name: `torch`, or a variant of the native kernel. make_stepper: for a model."""

    name: str
    make_stepper: Callable[[QuantizedGRU], Stepper]


def choose_kernel(choice: KernelChoice, num_threads: int) -> Kernel:
    """The kernel that computes with so many threads. auto: the native one if it is there. Raises InvalidSettings.

    torch is imported only where it computes: a server without it starts in half the time and memory.
    """
    there = variants()
    if choice == "torch" or (choice == "auto" and not there):
        import torch

        from service.engine.torch_stepper import TorchStepper

        torch.set_num_threads(num_threads)  # of the whole process
        return Kernel("torch", TorchStepper)
    if not there:
        raise InvalidSettings(
            "kernel=native, but it was not compiled when this package was installed: install it again where there is "
            "a C++17 compiler, or take kernel=auto",
            param="kernel",
        )
    from service.engine.native.stepper import NativeStepper

    return Kernel(there[0], lambda model: NativeStepper(model, num_threads))
