"""The part of the build that pyproject.toml can't express: the kernel, compiled if there is a C++17 compiler, and the
shipped models.
"""

import os
import re
import shutil
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = "service/engine/native/src"
STANDARD = "-std=c++17"
# Beside the kernel's place: why there is no kernel. `service.engine.native.binding` reads it.
FAILURE = "not_compiled.txt"
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
    """Compiles the kernel if possible. Otherwise it stores the reason beside the kernel's place, and prints it.

    `pip install` shows what is printed with -v only, so that the server's log and `make setup` tell the stored reason.
    """

    failure = ""

    def run(self) -> None:
        """Compile the kernel, and leave either a kernel or the reason why there is none."""
        super().run()
        kernel = Path(self.get_ext_fullpath(self.extensions[0].name))
        stored = kernel.with_name(FAILURE)
        if not self.failure:
            stored.unlink(missing_ok=True)
            return
        kernel.unlink(missing_ok=True)  # one of an older source would serve under this version's name
        kernel.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(self.failure + "\n")
        sys.stderr.write(
            f"gru-serve: the kernel was not compiled: {self.failure}. Without it the server needs torch and is several "
            "times slower\n"
        )

    def build_extension(self, ext: Extension) -> None:
        """Compile an extension. Note why, if that fails."""
        try:
            super().build_extension(ext)
        except Exception as error:
            # Of a command, its first word.
            reason = re.sub(r"'\['([^']*)'.*\]'", r"'\1'", " ".join(str(error).split())).rstrip(".")[:300]
            self.failure = (
                f"this compiler can't compile it: {reason}; `python setup.py build_ext --inplace` in a checkout, or "
                "`pip install -v`, shows the compiler's messages"
                if self._compiles_anything()
                else "no C++17 compiler works (Debian: apt install g++; macOS: xcode-select --install): " + reason
            )
            raise

    def _compiles_anything(self) -> bool:
        """Whether the compiler works at all."""
        with suppress(Exception), TemporaryDirectory() as folder:
            source = Path(folder, "any.cpp")
            source.write_text("#include <optional>\nint any() { return std::optional<int>(1).value(); }\n")
            self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[STANDARD])
            return True
        return False


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
                STANDARD,
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
                "-Wno-unknown-warning-option",  # clang doesn't know the one above
                "-g0",
            ],
            extra_link_args=["-pthread"],
            optional=True,  # without the kernel the torch stepper serves
        )
    ],
)
