"""The variant with tiles (AMX): its blocks of rows in plain C++ on any processor, its instructions in an emulator."""

from __future__ import annotations

import os
import re
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


@pytest.mark.skipif(not {"avx512_vnni", "gfni"} <= flags(), reason="the emulator needs a processor with AVX-512 VNNI")
def test_tiles__instructions_give_the_bits_of_the_portable_variant_in_an_emulator(tmp_path: Path) -> None:
    """The emulator decodes the instructions that the assembler made, so that it checks operands and configuration too.

    The library is compiled so that it does not ask for a processor and a system with tiles. Without the emulator it
    ends with an illegal instruction, or computes on the tiles of the processor if it has some.
    """
    text = (SOURCES / "kernel.cpp").read_text()
    asking = "bool has_amx_int8() {\n"
    assert asking in text
    source, library, emulator = (tmp_path / name for name in ("kernel.cpp", "kernel.so", "emulator.so"))
    source.write_text(text.replace(asking, asking + "    if (true) return has_avx512vnni();\n"))
    options = ["-O1", "-fPIC", "-shared", "-pthread", "-w"]
    exactly = ["-std=c++17", "-ffp-contract=off", f"-I{SOURCES}"]
    subprocess.run([program("c++"), *options, *exactly, str(source), "-o", str(library)], check=True)
    subprocess.run([program("cc"), *options, str(EMULATOR), "-o", str(emulator), "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.harness.tiles", str(library), TILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"LD_PRELOAD": str(emulator)})  # fmt: skip
    assert done.returncode == 0, done.stderr
