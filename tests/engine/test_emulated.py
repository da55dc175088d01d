"""The kernel on other processors, under an emulator: which variant each gets, its bits, and a whole request.

`TEST_EMULATED=aarch64` also runs `test_stepper.py` and `test_native.py` on it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.engine.kernels import choose_kernel
from service.engine.native import binding, native_stepper
from service.engine.native.native_stepper import NativeStepper, variants
from service.settings import read_settings
from service.web.app import create_app
from tests.harness.emulated_kernel import EMULATED, NATIVE, PROCESSORS, EmulatedKernel, build_kernel
from tests.harness.rows import quantized

ROOT = Path(__file__).parents[2]
AARCH64, S390X = PROCESSORS["aarch64"], PROCESSORS["s390x"]

pytestmark = pytest.mark.skipif(EMULATED != "aarch64", reason="`make kernel-arm` runs these")


@contextmanager
def loaded(load: Callable[[], Any]) -> Iterator[None]:
    """Use another kernel."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (binding, native_stepper):
            patch.setattr(module, "load", load)
        variants.cache_clear()
        yield
    variants.cache_clear()


@contextmanager
def emulated(kernel: EmulatedKernel) -> Iterator[None]:
    with kernel:
        library = kernel.library()
        with loaded(lambda: library):
            yield


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("cortex-a53", ("portable",)),
        ("cortex-a72", ("portable",)),
        ("cortex-a76", ("dotprod", "portable")),
        ("neoverse-n1", ("dotprod", "portable")),
        ("max", ("i8mm", "dotprod", "portable")),
    ],
)
def test_variants__are_those_whose_instructions_an_arm_processor_has(processor: str, expected: tuple[str, ...]) -> None:
    """All of them give the expected bits: otherwise `variants` leaves them out. The best is chosen."""
    with emulated(EmulatedKernel(AARCH64, processor)):
        assert variants() == tuple(binding.supported_variants()) == expected
        assert NativeStepper(quantized()).variant == choose_kernel("native", 1).name == expected[0]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [("neoverse-v1", ("i8mm", "dotprod", "portable")), ("cortex-a72+crypto", ("i8mm", "dotprod", "portable")),
     ("a64fx", ("portable",))],
)  # fmt: skip
def test_build__for_one_arm_processor_computes_the_same(
    processor: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    """As with `-mcpu=native` in a user's CXXFLAGS. GCC can't combine the variants with A64FX, which has SVE."""
    with emulated(EmulatedKernel(AARCH64, "max", build_kernel(AARCH64, tmp_path, f"-mcpu={processor}", "-O1"))):
        assert variants() == tuple(binding.supported_variants()) == expected


def test_self_check__a_big_endian_processor_gives_the_expected_bits(tmp_path: Path) -> None:
    with emulated(EmulatedKernel(S390X, None, build_kernel(S390X, tmp_path, "-O1"))):
        assert variants() == ("portable",)


def test_self_check__refuses_arm_kernels_with_fused_multiply_adds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GCC's default on Arm, which the build switches off. Then torch serves."""
    with emulated(EmulatedKernel(AARCH64, "max", build_kernel(AARCH64, tmp_path, "-ffp-contract=fast", "-O2"))):
        assert binding.supported_variants() == ["i8mm", "dotprod", "portable"]
        with caplog.at_level(logging.ERROR):
            assert variants() == ()
        for name in binding.supported_variants():
            assert f"the variant {name} of the native kernel is not used" in caplog.text
        assert choose_kernel("auto", 1).name == "torch"


def answers(streamed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Serve the shipped model. Return the kernel's name, and what a stream and a scored answer have."""
    settings = read_settings(model_store=str(ROOT / "model_store"), model="shakespeare", kernel="native")
    app = create_app(settings)
    try:
        client = app.test_client()
        ready = client.get("/readyz").get_json()
        stream = client.post("/v1/completions", json=streamed).text
        events = [json.loads(event) for event in re.findall("^data: ({.*})$", stream, re.M)]
        scored = client.post("/v1/completions", json=streamed | {"stream": False, "max_tokens": 100, "logprobs": 5})
        return ready["kernel"], {
            "text": "".join(event["choices"][0]["text"] for event in events),
            "fingerprints": {event["system_fingerprint"] for event in [*events, scored.get_json()]},
            "choices": scored.get_json()["choices"],
        }
    finally:
        app.extensions["gru_serve"].close()


def test_completions__request_of_the_readme_gets_the_same_answer_on_arm() -> None:
    """Text, log-probabilities and fingerprint: on this processor's kernel and on the best variant for Arm."""
    body = re.findall(r"/v1/completions .*\\\n +-d '({.*\"stream\":true})'", (ROOT / "README.md").read_text())[0]
    with loaded(NATIVE):
        native, expected = answers(json.loads(body))
        assert native == variants()[0]
    assert len(expected["text"]) == 2000
    assert expected["text"].startswith(expected["choices"][0]["text"])
    assert len(expected["fingerprints"]) == 1
    with emulated(EmulatedKernel(AARCH64, "max")):
        assert answers(json.loads(body)) == ("i8mm", expected)
