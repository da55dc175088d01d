"""The layout of the kernel's structures: Python takes it from the library, and refuses a library of another version."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.engine.native import binding, native_stepper
from service.engine.native.binding import FIELDS, LayoutMismatch, open_library, read_layout
from service.engine.native.native_stepper import NativeStepper, variants
from service.engine.torch_stepper import TorchStepper
from tests.harness.rows import DEEP, KINDS, outcome, quantized, with_checkpoints

SOURCES = Path(binding.__file__).parent / "src"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
OPTIONS = ["-std=c++17", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
DESCRIBE = """
#include "layout.h"
extern "C" const char* gru_describe_layout() {
    static const std::string description = gru::describe_layout();
    return description.c_str();
}
"""

needs_kernel = pytest.mark.skipif(not variants(), reason="the kernel was not compiled: no C++17 compiler")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must have a compiler")
def test_layout__ci_has_a_compiler_for_these_tests() -> None:
    assert COMPILER is not None


def library(folder: Path, abi: str, source: str | None = None) -> Path:
    """Compile the kernel, or another source, with this text of abi.h."""
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    (folder / "abi.h").write_text(abi)
    if source is not None:
        (folder / "kernel.cpp").write_text(source)
    compiled = folder / "kernel.so"
    assert COMPILER is not None
    command = [COMPILER, *OPTIONS, str(folder / "kernel.cpp"), "-o", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return compiled


def description(folder: Path, abi: str) -> str:
    """What a library with this text of abi.h reports."""
    reporting = ctypes.CDLL(str(library(folder, abi, DESCRIBE)))
    reporting.gru_describe_layout.restype = ctypes.c_char_p
    return reporting.gru_describe_layout().decode()  # type: ignore[no-any-return]


def moved(abi: str, first: str, second: str) -> str:
    """abi.h with the declarations of two fields exchanged."""
    lines = {name: re.search(rf"^GRU_FIELD\(.*\b{name}\).*$", abi, re.MULTILINE) for name in (first, second)}
    one, other = lines[first], lines[second]
    assert one is not None
    assert other is not None
    assert one.end() < other.start()
    return abi[: one.start()] + other[0] + abi[one.end() : other.start()] + one[0] + abi[other.end() :]


def renamed(abi: str, first: str, second: str) -> str:
    """abi.h with the names of two fields exchanged; their types stay where they are."""
    for name, new in ((first, "placeholder"), (second, first), ("placeholder", second)):
        abi, count = re.subn(rf"^(GRU_FIELD\(.*\b){name}\)", rf"\g<1>{new})", abi, flags=re.MULTILINE)
        assert count == 1
    return abi


# Of one type, and of different types; in structures of models and of rows.
MOVED = [("scale", "bias"), ("vocab", "units"), ("position", "num_prompt"), ("chosen", "top")]
MOVED += [("recurrent", "inputs"), ("bits", "table"), ("seed", "hidden"), ("temperature", "is_plain")]


@needs_compiler
def test_layout__fields_that_changed_places_are_written_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel with another order of fields than the installed one gives the same bits."""
    model = quantized(DEEP)
    abi = before = (SOURCES / "abi.h").read_text()
    for first, second in MOVED:
        abi = moved(abi, first, second)
    reordered = open_library(str(library(tmp_path / "reordered", abi)))
    original = read_layout(description(tmp_path / "original", before))
    places: dict[str, Callable[[str], int]] = {
        "GruModel": lambda name: offset(reordered.model, name),
        "GruRow": lambda name: getattr(reordered.make_row, name).offset,
    }
    for structure, place in places.items():
        for first, second in MOVED:
            if first in FIELDS[structure]:
                before_of = [offset(original[structure], name) for name in (second, first)]
                assert [place(first), place(second)] == before_of
    monkeypatch.setattr(native_stepper, "load", lambda: reordered)
    monkeypatch.setattr(native_stepper, "variants", lambda: ("portable",))
    stepper, reference = NativeStepper(model), TorchStepper(model)
    expected = outcome(reference, [with_checkpoints(reference, **kind) for kind in KINDS])
    assert outcome(stepper, [with_checkpoints(stepper, **kind) for kind in KINDS]) == expected


@needs_compiler
@pytest.mark.parametrize(
    ("first", "second", "reported"),
    [
        ("seed", "position", "GruRow.seed is i8"),
        ("hidden", "prompt", r"GruRow.hidden is \*i8"),
        ("top_k", "top_p", "GruRow.top_k is f8"),
        ("weight", "bias", r"GruLinear.weight is \*f4"),
        ("table", "dense", "GruModel.table is GruLinear"),
    ],
)
def test_layout__fields_of_different_types_that_changed_names_are_refused(
    tmp_path: Path, first: str, second: str, reported: str
) -> None:
    text = description(tmp_path, renamed((SOURCES / "abi.h").read_text(), first, second))
    with pytest.raises(LayoutMismatch, match=f"{reported}, while"):
        read_layout(text)


@needs_compiler
def test_layout__fields_that_only_one_side_has_are_refused(tmp_path: Path) -> None:
    abi = (SOURCES / "abi.h").read_text()
    lacking = re.sub(r"^GRU_FIELD\(double, min_p\).*\n", "", abi, flags=re.MULTILINE)
    with pytest.raises(LayoutMismatch, match=r"GruRow\.min_p is None, while .* expects f8"):
        read_layout(description(tmp_path / "lacking", lacking))
    additional = abi.replace("GRU_FIELD(double, min_p)", "GRU_FIELD(double, typical_p)\nGRU_FIELD(double, min_p)")
    with pytest.raises(LayoutMismatch, match=r"GruRow\.typical_p is f8, while .* expects None"):
        read_layout(description(tmp_path / "additional", additional))


@needs_compiler
def test_layout__offsets_are_those_of_the_compiler_where_fields_differ_in_size(tmp_path: Path) -> None:
    narrow = (SOURCES / "abi.h").read_text().replace("GRU_FIELD(int64_t, num_prompt)", "GRU_FIELD(int32_t, num_prompt)")
    text = description(tmp_path, narrow)
    assert "field num_prompt i4 48\nfield max_draws i8 56\n" in text  # padded to 8 bytes
    with pytest.raises(LayoutMismatch, match=r"GruRow\.num_prompt is i4"):
        read_layout(text)


@needs_kernel
@pytest.mark.parametrize("structure", ["GruRow", "GruModel", "GruLinear"])
def test_load__library_of_another_layout_is_refused_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, structure: str
) -> None:
    """Here the types that Python expects of two fields are exchanged."""
    name, other = next(pair for pair in zip(FIELDS[structure], reversed(FIELDS[structure]), strict=True)
                       if FIELDS[structure][pair[0]] != FIELDS[structure][pair[1]])  # fmt: skip
    swapped = {name: FIELDS[structure][other], other: FIELDS[structure][name]}
    monkeypatch.setitem(FIELDS, structure, FIELDS[structure] | swapped)
    binding.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert binding.load() is None
        assert binding.supported_variants() == []
        assert f"its field {structure}.{name} is" in caplog.text
        assert "install the package again" in caplog.text
    finally:
        binding.load.cache_clear()


@needs_compiler
def test_load__library_without_a_description_is_refused(tmp_path: Path) -> None:
    """Libraries from before `gru_describe_layout`."""
    compiled = library(tmp_path, "", 'extern "C" long gru_layout() { return 304072; }')
    with pytest.raises(LayoutMismatch, match="gru_describe_layout"):
        open_library(str(compiled))


def offset(dtype: np.dtype[np.void], name: str) -> int:
    assert dtype.fields is not None
    return dtype.fields[name][1]
