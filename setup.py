"""The part of the build that pyproject.toml can't express: the kernel, compiled if there is a C++17 compiler."""

from glob import glob

from setuptools import Extension, setup

SOURCES = "service/engine/native/src"

setup(
    ext_modules=[
        Extension(
            "service.engine.native._kernel",
            sources=[f"{SOURCES}/kernel.cpp"],
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inc")),
            # -ffp-contract=off, because fused multiply-adds would give other results than processors without them.
            # -fno-math-errno and -fno-trapping-math change no result, because the kernel reads neither errno nor
            # floating-point exceptions.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
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
