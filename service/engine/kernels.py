"""Which implementation of the stepper computes: the kernel in C++ or torch. Both give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
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


def check_kernel(choice: KernelChoice) -> None:
    """Raises InvalidSettings if it isn't there. Imports nothing large."""
    is_native, is_torch = bool(variants()), find_spec("torch") is not None
    if choice == "native" and not is_native:
        raise InvalidSettings(
            "kernel=native, but it was not compiled when this package was installed: install it again where there is "
            "a C++17 compiler, or take kernel=auto",
            param="kernel",
        )
    if not is_torch and (choice == "torch" or not is_native):
        raise InvalidSettings(
            f"kernel={choice}, but torch is not installed"
            + ("" if is_native else ", and the native kernel was not compiled")
            + ": pip install 'gru-serve[torch]', or install it again where there is a C++17 compiler",
            param="kernel",
        )


def choose_kernel(choice: KernelChoice, num_threads: int) -> Kernel:
    """The kernel that computes with so many threads. auto: the native one if it is there. Raises InvalidSettings.

    torch is imported only where it computes: a server without it starts in half the time and memory.
    """
    check_kernel(choice)
    there = variants()
    if choice == "torch" or not there:
        import torch

        from service.engine.torch_stepper import TorchStepper

        torch.set_num_threads(num_threads)  # of the whole process
        return Kernel("torch", TorchStepper)
    from service.engine.native.native_stepper import NativeStepper

    return Kernel(there[0], lambda model: NativeStepper(model, num_threads))
