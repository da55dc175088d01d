"""The part of the build that pyproject.toml can't express: the kernel, compiled if there is a C++17 compiler, and the
shipped models.
"""

import os
import re
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = "service/engine/native/src"
ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "LDCXXSHARED", "CL", "_CL_")
# Flags that let a compiler change the results of floating-point operations. The kernel's results belong to the
# fingerprint, so these flags are taken out of the environment. A kernel that was compiled with them nevertheless is
# found out when it is loaded (service/engine/native/self_check.py).
INEXACT = re.compile(
    r"-Ofast|-ffast-math|-f(?:no-)?(?:unsafe-math-optimizations|associative-math|reciprocal-math|finite-math-only"
    r"|signed-zeros|approx-func)|-ffp-contract=\S+|-ffp-model=\S+|-fp-model[= ]\S+|-fexcess-precision=\S+"
    r"|-mrecip\S*|-mdaz-ftz|-fsingle-precision-constant|-mfpmath=\S+|[-/]fp:\S+"
)


def remove_inexact_flags() -> None:
    """Remove flags that change results from the variables that compilers are run with, and say so."""
    for name in ENVIRONMENT:
        words = os.environ.get(name, "").split()
        removed = [word for word in words if INEXACT.fullmatch(word)]
        if removed:
            os.environ[name] = " ".join(word for word in words if word not in removed)
            sys.stderr.write(f"{name}: the kernel is compiled without {' '.join(removed)}, which changes results\n")


class BuildWithModels(build_py):
    """Puts the newest version of each shipped model into a wheel, so that an installed server has a model to serve.

    A checkout (`pip install -e`) serves those of its `model_store`.
    """

    def run(self) -> None:
        """Copy the package, and then the models."""
        super().run()
        shipped = Path(self.build_lib, "service", "shipped_models")
        shutil.rmtree(shipped, ignore_errors=True)  # an older build may have left another version
        for model in (
            [] if self.editable_mode else sorted(path for path in Path("model_store").glob("*") if path.is_dir())
        ):
            newest = max((path for path in model.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
            shutil.copytree(newest, shipped / model.name / newest.name)


class BuildKernel(build_ext):
    """Says in one line that the kernel was not compiled. `pip install` shows it with -v only."""

    def run(self) -> None:
        """Compile the kernel if possible."""
        super().run()
        if not all(os.path.exists(self.get_ext_fullpath(extension.name)) for extension in self.extensions):
            sys.stderr.write(
                "gru-serve: the kernel was not compiled, because no C++17 compiler works (Debian: apt install g++; "
                "macOS: xcode-select --install). Without it the server needs torch and is several times slower\n"
            )


remove_inexact_flags()
setup(
    cmdclass={"build_ext": BuildKernel, "build_py": BuildWithModels},
    ext_modules=[
        Extension(
            "service.engine.native._kernel",
            sources=[f"{SOURCES}/kernel.cpp"],
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inc")),
            # -fno-fast-math, in case the flags of the Python that runs this include -ffast-math.
            # -ffp-contract=off, because fused multiply-adds would give other results than processors without them.
            # -fno-math-errno and -fno-trapping-math change no result, because the kernel reads neither errno nor
            # floating-point exceptions.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-fast-math",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-pthread",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                "-g0",
            ],
            extra_link_args=["-pthread"],
            optional=True,  # without the kernel the torch stepper serves
        )
    ],
)
