"""How the kernel is compiled: flags in the environment can't change what it computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from service.engine.native import native_stepper
from service.engine.native.binding import open_library
from service.engine.native.native_stepper import NativeStepper
from service.engine.native.self_check import EXPECTED, digest_of

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "service/engine/native/src"
COMPILER = shutil.which("c++")
INEXACT = [
    "-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-fassociative-math", "-freciprocal-math",
    "-ffinite-math-only", "-fno-signed-zeros", "-ffp-contract=fast", "-ffp-model=fast", "-mdaz-ftz", "/fp:fast",
]  # fmt: skip
VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")


@pytest.mark.parametrize("variable", VARIABLES)
def test_setup__removes_flags_that_change_results(variable: str, tmp_path: Path) -> None:
    """A compiler that notes its arguments and fails stands in for the real one. Other flags of the environment stay."""
    noted, compiler = tmp_path / "arguments", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {noted}; done\nexit 1\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CC": f"{compiler} -ffast-math", "CXX": f"{compiler} -Ofast"}
    environment |= {variable: " ".join(["-DKEPT", *INEXACT])}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    arguments = noted.read_text().split()
    assert not set(arguments) & set(INEXACT)
    if variable in ("CXXFLAGS", "CPPFLAGS"):  # the others are for C, and for linking, to which it doesn't come
        assert "-DKEPT" in arguments
    assert "-fno-fast-math" in arguments
    assert "-ffp-contract=off" in arguments
    for flag in INEXACT:
        assert flag in done.stderr


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must have a compiler")
def test_build__ci_has_a_compiler_for_these_tests() -> None:
    assert COMPILER is not None


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_self_check__finds_a_kernel_whose_sums_were_reordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a wrapper of the compiler had added the flag. Only the portable variant is compiled, which is faster."""
    source, compiled = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text((SOURCES / "kernel.cpp").read_text().replace("#if defined(__x86_64__)", "#if 0"))
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-ffast-math", "-fPIC", "-shared", "-pthread", "-w", f"-I{SOURCES}"]
    subprocess.run([*command, str(source), "-o", str(compiled)], check=True)
    inexact = open_library(str(compiled))
    assert sys.float_info.min / 2 > 0  # to load it has not made this thread take tiny numbers for 0
    monkeypatch.setattr(native_stepper, "load", lambda: inexact)
    assert digest_of(partial(NativeStepper, variant="portable")) != EXPECTED
