"""With TEST_EMULATED=aarch64, tests of the native stepper run on the kernel of that processor, under an emulator."""

from __future__ import annotations

import os
import shutil

import pytest

from service.engine.native import binding, native_stepper
from tests.harness.emulated_kernel import EMULATED, PROCESSORS, EmulatedKernel

KERNEL = pytest.StashKey[EmulatedKernel]()


def pytest_configure(config: pytest.Config) -> None:
    """Put the emulated kernel in the place of the compiled one, before a test module asks for variants."""
    if not EMULATED:
        return
    if EMULATED not in PROCESSORS:
        pytest.exit(f"TEST_EMULATED: one of {', '.join(PROCESSORS)}", 1)
    processor = PROCESSORS[EMULATED]
    if missing := [name for name in (processor.compiler, processor.emulator) if shutil.which(name) is None]:
        failed = os.environ.get("CI") is not None
        pytest.exit(f"{'failed' if failed else 'skipped'}: {', '.join(missing)} is not installed", int(failed))
    kernel = config.stash[KERNEL] = EmulatedKernel(processor, "max")
    library = kernel.library()
    for module in (binding, native_stepper):
        module.load = lambda: library  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the emulator."""
    if KERNEL in config.stash:
        config.stash[KERNEL].close()
