"""SamplingSettings: the one declaration that the API's schema and the command line follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import annotated_types
import click
import pytest

from service.commands.generate import generate_command
from service.engine.native.binding import load
from service.engine.native.native_stepper import NativeStepper
from service.engine.native.rows import PackedRow
from service.engine.sampling_settings import NUMBERS, PLAIN, SamplingSettings
from service.web.api.schemas import SamplingBody
from tests.harness.rows import quantized, row

DECLARED = {
    name: hint
    for name, hint in get_type_hints(SamplingSettings, include_extras=True).items()
    if not name.startswith("__")
}

NEUTRAL = {"top_k": -1, "top_p": 0}  # the lowest values in the API, which the engine doesn't know


def limits(name: str) -> tuple[float | None, float | None, bool]:
    """Declared lower and upper limit of a setting, and whether the lower one is excluded."""
    found = {type(limit): limit for limit in get_args(DECLARED[name])[1].metadata}
    above = found.get(annotated_types.Gt)
    least, most = found.get(annotated_types.Ge), found.get(annotated_types.Le)
    return (above.gt if above else least.ge if least else None, most.le if most else None, above is not None)


@pytest.mark.parametrize("name", NUMBERS)
def test_sampling_settings__are_what_the_api_declares(name: str) -> None:
    shown = SamplingBody.model_json_schema()["properties"][name]
    low, high, is_open = limits(name)
    low, is_open = (NEUTRAL[name], False) if name in NEUTRAL else (low, is_open)
    assert shown.get("exclusiveMinimum" if is_open else "minimum") == low
    assert shown.get("maximum") == high
    description = get_args(DECLARED[name])[1].description
    assert shown["description"].startswith(description.partition(";")[0] if name in NEUTRAL else description)
    assert shown["default"] == getattr(PLAIN, name)


@pytest.mark.parametrize("name", NUMBERS)
def test_sampling_settings__are_what_the_command_line_declares(name: str) -> None:
    option = next(param for param in generate_command.params if param.name == name)
    assert isinstance(option, click.Option)
    assert isinstance(option.type, click.IntRange | click.FloatRange)
    assert (option.type.min, option.type.max, option.type.min_open) == limits(name)
    assert (option.help or "").lower().startswith(get_args(DECLARED[name])[1].description.lower())
    assert option.default == getattr(PLAIN, name)


@pytest.mark.parametrize("name", NUMBERS)
def test_sampling_settings__reach_the_engine_from_a_body(name: str) -> None:
    low, high, is_open = limits(name)
    value = type(getattr(PLAIN, name))(high if high != getattr(PLAIN, name) else (low or 0) + 0.5 * is_open)
    assert value != getattr(PLAIN, name)
    settings = SamplingBody.model_validate({name: value}).sampling_settings
    assert settings == SamplingSettings(**{name: value})


@pytest.mark.skipif(load() is None, reason="the kernel was not compiled: no C++17 compiler")
@pytest.mark.parametrize("name", NUMBERS)
def test_sampling_settings__reach_the_kernel(name: str) -> None:
    """The kernel's row has a field of this name, and it gets the value of the setting."""
    library = load()
    assert library is not None
    value: Any = 0.5 if name.endswith("_p") else getattr(PLAIN, name) + 2
    settings = replace(SamplingSettings(top_k=1), **{name: value})
    stepper = NativeStepper(quantized())
    record = library.make_row()
    PackedRow(row(stepper, sampling=settings), stepper.config, record)
    assert getattr(record, name) == value


def test_sampling_settings__have_no_field_that_the_api_lacks() -> None:
    assert set(DECLARED) == {*NUMBERS, "logit_bias", "allowed"}
    assert {*NUMBERS, "logit_bias", "allowed_token_ids"} <= set(SamplingBody.model_fields)
