"""The part of the build that pyproject.toml can't express: the kernel, compiled if there is a C++17 compiler."""

import os
import re
import sys
from glob import glob

from setuptools import Extension, setup

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


remove_inexact_flags()
setup(
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
    ]
)
