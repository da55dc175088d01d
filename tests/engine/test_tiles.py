"""The variant with tiles (AMX): its blocks of rows in plain C++ on any processor, its instructions in an emulator."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.native import binding
from service.engine.native.binding import supported_variants
from service.engine.native.native_stepper import NativeStepper, variants
from tests.harness.programs import program
from tests.harness.rows import quantized
from tests.harness.tiles import REFERENCE, cases

ROOT = Path(__file__).parents[2]
SOURCES = Path(binding.__file__).parent / "src"
EMULATOR = Path(__file__).with_name("tile_emulator.c")
TILES = "amx_int8"

pytestmark = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")


def flags() -> set[str]:
    """What Linux says that the processor can do; empty elsewhere."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return set()
    return set(found[1].split()) if found else set()


@pytest.mark.parametrize("variant", [REFERENCE, TILES])
def test_tiles__any_number_of_rows_gets_the_bits_of_the_portable_variant(variant: str) -> None:
    if variant == TILES and TILES not in variants():
        pytest.skip("this processor has no AMX, or the system does not let this process use it")
    assert [what for what, is_equal in cases(variant) if not is_equal] == []


def test_tiles__are_offered_if_the_processor_has_them() -> None:
    assert (TILES in supported_variants()) == ({"amx_tile", "amx_int8", "avx512_vnni", "gfni"} <= flags())
    if TILES not in supported_variants():
        with pytest.raises(ValueError, match="refuses"):
            NativeStepper(quantized(), variant=TILES)


def test_tiles__reference_is_never_offered() -> None:
    assert REFERENCE not in supported_variants()
    assert NativeStepper(quantized(), variant=REFERENCE).variant == REFERENCE


needs_vectors = pytest.mark.skipif(
    not {"avx512_vnni", "gfni"} <= flags(), reason="tiles need a processor with AVX-512 VNNI beside them"
)
OPTIONS = ["-O1", "-fPIC", "-shared", "-pthread", "-w"]


@pytest.fixture(scope="module")
def claiming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that doesn't ask whether processor and system have tiles, but takes it for granted."""
    folder = tmp_path_factory.mktemp("claiming")
    text = (SOURCES / "kernel.cpp").read_text()
    asking = "bool claims_amx_int8() {\n"
    assert asking in text
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(text.replace(asking, asking + "    if (true) return has_avx512vnni();\n"))
    exactly = ["-std=c++17", "-ffp-contract=off", f"-I{SOURCES}"]
    subprocess.run([program("c++"), *OPTIONS, *exactly, str(source), "-o", str(library)], check=True)
    return library


@needs_vectors
def test_tiles__instructions_give_the_bits_of_the_portable_variant_in_an_emulator(
    claiming: Path, tmp_path: Path
) -> None:
    """The emulator decodes the instructions that the assembler made, so that it checks operands and configuration too.

    The trial of the tiles passes in it as well. Without the emulator it fails, and the variant is not found.
    """
    emulator = tmp_path / "emulator.so"
    subprocess.run([program("cc"), *OPTIONS, str(EMULATOR), "-o", str(emulator), "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.harness.tiles", str(claiming), TILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"LD_PRELOAD": str(emulator)})  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_vectors
def test_tiles__that_are_only_claimed_are_not_offered(claiming: Path) -> None:
    """A process without permission for tiles, which this one is, gets SIGILL for them on every processor."""
    script = """
import faulthandler, os, signal, sys
from service.engine.native.binding import open_library
faulthandler.enable()
variant = open_library(sys.argv[1]).functions.gru_variant
print([variant(index) for index in range(2)], flush=True)
os.kill(os.getpid(), signal.SIGILL)
"""
    command = [sys.executable, "-c", script, str(claiming)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("[b'avx512vnni', "), done.stderr
    assert done.returncode == -signal.SIGILL
    assert "Illegal instruction" in done.stderr  # the handler from before the trial


def test_trial__fails_where_the_attempt_would_end_the_process(tmp_path: Path) -> None:
    """A fault of another thread during a trial reaches the handler that was there before."""
    source, driver = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    subprocess.run([program("c++"), "-std=c++17", "-pthread", f"-I{SOURCES}", source, "-o", driver], check=True)
    done = subprocess.run([driver], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "passes 1, wrong 0, illegal 0, fault 0, passes 1, other thread handled 1\n"
    assert done.returncode == 0


DRIVER = """
#include <atomic>
#include <cstdio>
#include <thread>

#include "trial.h"

std::atomic<bool> handled{false};
void other_handler(int) { handled = true; }
bool waits_for_another_thread() {
    std::thread([] { raise(SIGSEGV), raise(SIGSEGV); }).join();
    return handled;
}

int main() {
    using gru::Trial;
    signal(SIGSEGV, other_handler);
    const auto right = [] { return true; };
    const bool passes = Trial::passes(right), wrong = Trial::passes([] { return false; });
    const bool illegal = Trial::passes([] { return raise(SIGILL) == 0; });
    const bool fault = Trial::passes([] { return raise(SIGSEGV) == 0; });
    const bool again = Trial::passes(right), other = Trial::passes(waits_for_another_thread);
    std::printf("passes %d, wrong %d, illegal %d, fault %d, passes %d, other thread handled %d\\n", passes, wrong,
                illegal, fault, again, other);
}
"""
