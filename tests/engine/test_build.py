"""How the kernel is compiled: by which compilers, with which flags, and what is told if that fails.

`TEST_COMPILERS="clang++-16 g++-11" pytest tests/engine/test_build.py` checks these compilers instead of clang++.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.engine.native import binding, native_stepper
from service.engine.native.binding import open_library, supported_variants
from service.engine.native.native_stepper import NativeStepper
from service.engine.native.self_check import EXPECTED, digest_of
from tests.harness.programs import program

pytestmark = pytest.mark.timeout(1200)  # some of these compile the kernel, which a busy machine delays

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "service/engine/native/src"
COMPILER = shutil.which("c++")
INEXACT = [
    "-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-fassociative-math", "-freciprocal-math",
    "-ffinite-math-only", "-fno-signed-zeros", "-ffp-contract=fast", "-ffp-model=fast", "-mdaz-ftz", "/fp:fast",
]  # fmt: skip
VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
COMPILERS = os.environ.get("TEST_COMPILERS", "clang++").split()
# As old as x86-64 is; then processors that each add what a variant needs.
PROCESSORS = {
    "qemu64": ["portable"],
    "core2duo": ["portable"],
    "Nehalem": ["sse4", "portable"],
    "Haswell": ["avx2", "sse4", "portable"],
}
LIST = """
import ctypes, sys
library, names = ctypes.CDLL(sys.argv[1]), []
library.gru_variant.restype = ctypes.c_char_p
while (name := library.gru_variant(len(names))) is not None:
    names.append(name.decode())
print(*names)
"""
CHECK = """
import sys
from functools import partial
from service.engine.native import binding, native_stepper
from service.engine.native.self_check import digest_of
loaded = binding.open_library(sys.argv[1])
native_stepper.load = lambda: loaded
print(*(digest_of(partial(native_stepper.NativeStepper, variant=name)) for name in sys.argv[2:]))
"""


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the build of an installation, with these variables in its environment. The kernel, if any, is in `folder`."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=["installed", *COMPILERS])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the installed kernel, and of one as an installation with another compiler has it."""
    if request.param == "installed":
        spec = find_spec("service.engine.native._kernel")
        if spec is None or spec.origin is None:
            pytest.skip("the kernel was not compiled: no C++17 compiler")
        return spec.origin
    compiler, folder = program(request.param), tmp_path_factory.mktemp("compiled")
    done = build(folder, CC=compiler, CXX=compiler)
    assert "ignored-attributes" not in done.stderr
    [kernel] = (folder / "service/engine/native").glob("_kernel*.so")
    return str(kernel)


def test_library__every_compiler_gives_the_same_variants_and_bits(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a variant's instructions, clang ignores the whole list if it does not know one word."""
    expected, loaded = supported_variants(), open_library(library)
    monkeypatch.setattr(binding, "load", lambda: loaded)
    monkeypatch.setattr(native_stepper, "load", lambda: loaded)
    assert supported_variants() == expected
    for variant in expected:
        assert digest_of(partial(NativeStepper, variant=variant)) == EXPECTED, variant


@pytest.mark.parametrize("processor", PROCESSORS)
def test_library__loads_on_old_processors(library: str, processor: str) -> None:
    """No variant may have an initialiser: it would run while the library is loaded, with the variant's instructions."""
    emulated = [program("qemu-x86_64"), "-cpu", processor, sys.executable, "-S", "-c", LIST, library]
    done = subprocess.run(emulated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == PROCESSORS[processor]


def test_self_check__holds_on_an_emulated_processor(library: str) -> None:
    variants = PROCESSORS["Haswell"]
    emulated = [program("qemu-x86_64"), "-cpu", "Haswell", sys.executable, "-c", CHECK, library, *variants]
    done = subprocess.run(emulated, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == [EXPECTED] * len(variants), done.stderr


def test_build__compiler_that_refuses_the_kernel_is_told_from_one_that_does_not_work(tmp_path: Path) -> None:
    """The reason is stored where the server reads it, and takes the place of an older kernel."""
    refusing = tmp_path / "compiler"
    refusing.write_text(f'#!/bin/sh\ncase "$*" in *kernel.cpp*) exit 1; esac\nexec {program("c++")} "$@"\n')
    refusing.chmod(0o755)
    reasons = {str(refusing): "this compiler can't compile it", "no-such-compiler": "no C++17 compiler works"}
    for number, (compiler, reason) in enumerate(reasons.items()):
        folder = tmp_path / str(number)
        native = folder / "service/engine/native"
        native.mkdir(parents=True)
        older = native / f"_kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
        older.write_bytes(b"of an older source")
        os.utime(older, (0, 0))
        done = build(folder, CC=compiler, CXX=compiler)
        assert not older.exists()
        told = (native / "not_compiled.txt").read_text()
        assert reason in told
        assert f"'{compiler}'" in told
        assert "kernel.cpp" not in told  # not the whole command
        assert f"the kernel was not compiled: {reason}" in done.stderr


def test_load__library_that_the_system_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the installation was copied to another system."""
    strange = tmp_path / "_kernel.so"
    strange.write_bytes(b"of another system")
    monkeypatch.setattr(binding, "find_spec", lambda _: SimpleNamespace(origin=str(strange)))
    binding.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert binding.load() is None
        assert "the native kernel is not used, because it can't be loaded" in caplog.text
    finally:
        binding.load.cache_clear()


@pytest.mark.parametrize("variable", VARIABLES)
def test_setup__removes_flags_that_change_results(variable: str, tmp_path: Path) -> None:
    """A compiler that notes its arguments and fails stands in for the real one. Other flags of the environment stay."""
    noted, compiler = tmp_path / "arguments", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {noted}; done\nexit 1\n')
    compiler.chmod(0o755)
    kept = " ".join(["-DKEPT", *INEXACT])
    done = build(tmp_path, **{"CC": f"{compiler} -ffast-math", "CXX": f"{compiler} -Ofast", variable: kept})
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
