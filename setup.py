"""The part of the build that pyproject.toml can't express: the kernel, compiled where a C++17 compiler is."""

from glob import glob

from setuptools import Extension, setup

SOURCES = "service/engine/native/src"

setup(
    ext_modules=[
        Extension(
            "service.engine.native._kernel",
            sources=[f"{SOURCES}/kernel.cpp"],
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inc")),
            # -ffp-contract=off: fused multiply-adds would give other bits than other processors do. The other two
            # options change no result: nobody looks at errno or at floating-point exceptions.
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
            optional=True,  # without it the torch stepper serves
        )
    ]
)
