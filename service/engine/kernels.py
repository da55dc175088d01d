"""Chooses the implementation of the stepper: the native kernel in C++, or torch. Both give the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from service.arrays import Float32
from service.engine.native.binding import why_not_compiled
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.stepper import Stepper
from service.errors import InvalidSettings
from service.installation import how_to_get_torch
from service.model.config import ModelConfig
from service.model.quantize import IntegerPrecision, QuantizedGRU, quantize

log = logging.getLogger(__name__)

KernelChoice = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class Kernel:
    """An implementation of the stepper. A process chooses one and makes the steppers of all its models with it."""

    name: str  # `torch`, or a variant of the native kernel
    make_stepper: Callable[[QuantizedGRU], Stepper]

    def load(
        self, config: ModelConfig, tensors: Mapping[str, Float32], precision: IntegerPrecision
    ) -> tuple[Stepper, QuantizedGRU]:
        """Quantise a model. Return a stepper for it, and the quantised weights that the stepper computes with."""
        quantized = quantize(config, tensors, precision)
        return self.make_stepper(quantized), quantized


def check_kernel(choice: KernelChoice) -> None:
    """Raise InvalidSettings if this installation doesn't have the kernel. Imports nothing large."""
    is_native, is_torch = bool(variants()), find_spec("torch") is not None
    if choice == "native" and not is_native:
        raise InvalidSettings(
            "kernel=native, but the native kernel was not compiled when this package was installed, or computes other "
            "numbers than it must, as the log says: install the package again on a machine with a C++17 compiler, or "
            "set kernel=auto" + _reason(),
            param="kernel",
        )
    if not is_torch and (choice == "torch" or not is_native):
        raise InvalidSettings(
            f"kernel={choice}, but torch is not installed"
            + (
                ": set kernel=auto"
                if is_native
                else ", and the native kernel was not compiled: install a C++17 compiler"
            )
            + (" or " if is_native else ", and the package again, or ")
            + how_to_get_torch()
            + ("" if is_native else _reason()),
            param="kernel",
        )


def _reason() -> str:
    """Return why the build failed, as an end of an error's message; empty if it did not fail."""
    reason = why_not_compiled()
    return f". The build failed because {reason}" if reason else ""


def choose_kernel(choice: KernelChoice, num_threads: int) -> Kernel:
    """Return the chosen kernel, with num_threads threads. `auto` chooses native if it was compiled, torch otherwise.

    torch is imported only if it computes. Without it a server starts in half the time, and with a third of the memory.

    Raises InvalidSettings if this installation doesn't have the kernel.
    """
    check_kernel(choice)
    available = variants()
    if choice == "torch" or not available:
        if choice == "auto":
            log.warning(
                "torch computes, several times slower than the native kernel: there is no kernel that works here%s",
                _reason(),
            )
        import torch

        from service.engine.torch_stepper import TorchStepper

        torch.set_num_threads(num_threads)  # of the whole process
        return Kernel("torch", TorchStepper)
    return Kernel(available[0], lambda model: NativeStepper(model, num_threads))
