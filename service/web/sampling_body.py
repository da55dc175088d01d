"""Sampling settings of a request's body."""

from __future__ import annotations

from collections.abc import Callable

from service.engine.sampling import SamplingSettings
from service.errors import InvalidValue
from service.model.charset import Charset
from service.web.schemas import SamplingBody


def sampling_of(charset_of: Callable[[], Charset], body: SamplingBody) -> SamplingSettings:
    """The settings for a model of this charset, which is looked up if it is needed: biases name characters.

    Raises InvalidValue, UnknownCharacters.
    """
    try:
        charset = charset_of() if body.logit_bias else None
        biases = sorted((_one_id(charset, char), bias) for char, bias in body.logit_bias.items() if charset is not None)
    except InvalidValue as error:
        error.param = "logit_bias"
        raise
    return SamplingSettings(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((char, bias) for char, bias in biases if bias != 0),
    )


def stops_of(body: SamplingBody) -> tuple[str, ...]:
    """The stop strings."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _one_id(charset: Charset, char: str) -> int:
    ids = charset.encode(char)
    if len(ids) != 1:
        raise InvalidValue(f"logit_bias: {char!r} is not one character", param="logit_bias")
    return int(ids[0])
