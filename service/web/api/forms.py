"""The form that a generated text must have: the fields of vLLM and of OpenAI that say so, and what they mean.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from service.engine.automaton.form import Form
from service.errors import InvalidValue
from service.web.api.known_fields import NO_GRAMMAR, NO_TAGS, NO_WHITESPACE, Anyway, Name, Only
from service.web.api.schemas import Body, SamplingBody
from service.web.gate.body_json import RefusedJson, parse
from service.web.gate.error_responses import HALF_OF_A_PAIR

MAX_CHOICES = 10_000
# Of a form as it is compiled. A run's record has it while the run is unfinished, and is saved once a second.
MAX_FORM_CHARS = 262_144

_Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
_Pattern = Annotated[str, Field(max_length=MAX_FORM_CHARS)]
# A schema is checked when it is compiled, not here.
_Schema = dict[str, Any] | Annotated[str, Field(max_length=MAX_FORM_CHARS)]
_Wanted = tuple[Form, str]  # a form, and the path of the field that has it


class StructuredOutputs(Body):
    """The form of the text, in vLLM's names: exactly one of `choice`, `regex`, `json` and `json_object`."""

    other_names: ClassVar[Mapping[str, str]] = {
        "choices": "choice", "enum": "choice", "guided_choice": "choice",
        "pattern": "regex", "guided_regex": "regex", "regexp": "regex",
        "json_schema": "json", "schema": "json", "guided_json": "json",
    }  # fmt: skip

    choice: _Choices | None = Field(None, description="the text is one of these strings, up to 10,000")
    regex: _Pattern | None = Field(
        None, description="the whole text matches this pattern, as Python's `re.fullmatch` defines it"
    )
    json_: _Schema | None = Field(
        None, alias="json", description="the text is JSON that fits this schema, an object or a string that has it"
    )
    json_object: bool = Field(False, description="the text is a JSON object")
    grammar: Annotated[Any, Only(NO_GRAMMAR)] = None
    structural_tag: Annotated[Any, Only(NO_TAGS)] = None
    whitespace_pattern: Annotated[Any, Only(NO_WHITESPACE)] = None
    disable_any_whitespace: Annotated[bool | None, Only(NO_WHITESPACE, False)] = None
    disable_additional_properties: Annotated[
        bool | None, Only("a schema says so itself: `additionalProperties`", False)
    ] = None
    disable_fallback: Annotated[bool | None, Anyway("there is one way to compile a form")] = None


class JsonSchemaFormat(Body):
    """A JSON schema, and its name, which changes nothing."""

    name: Annotated[Name | None, Anyway("the models don't read it")] = None
    description: Annotated[
        Annotated[str, Field(max_length=MAX_FORM_CHARS)] | None, Anyway("the models don't read it")
    ] = None
    schema_: dict[str, Any] = Field(alias="schema", description="the text is JSON that fits this schema")
    strict: Annotated[bool | None, Anyway("every text fits its schema")] = None


class ResponseFormat(Body):
    """The form of the text, in OpenAI's names."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="any text, a JSON object, or JSON that fits `json_schema`"
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="only with the type `json_schema`, and needed there")


class FormBody(Body):
    """The form of a text, in one of these fields."""

    structured_outputs: StructuredOutputs | None = Field(None, description="the form of the text, in vLLM's names")
    response_format: ResponseFormat | None = Field(None, description="the form of the text, in OpenAI's names")
    guided_choice: _Choices | None = Field(None, description="older name of `structured_outputs.choice`")
    guided_regex: _Pattern | None = Field(None, description="older name of `structured_outputs.regex`")
    guided_json: _Schema | None = Field(None, description="older name of `structured_outputs.json`")

    @property
    def form(self) -> Form | None:
        """The form that the text must have; None for any."""
        return self._wanted[0]

    @property
    def form_param(self) -> str | None:
        """The path of the field that has the form; None if there is none."""
        return self._wanted[1]

    @cached_property
    def _wanted(self) -> tuple[Form, str] | tuple[None, None]:
        """The form and the path of its field. Raises InvalidValue, also if there are several."""
        forms = [*self._forms()]
        if len(forms) > 1:
            (_, first), (_, second) = forms[:2]
            raise InvalidValue(
                f"{second}: the text can't have a second form beside {first}: send one of them", param=second
            )
        return forms[0] if forms else (None, None)

    def _forms(self) -> Iterator[_Wanted]:
        outputs, response = self.structured_outputs, self.response_format
        if outputs is not None:
            within = [*_vllm_forms("structured_outputs.", outputs.choice, outputs.regex, outputs.json_)]
            if outputs.json_object:
                within.append((Form("json_object", ""), "structured_outputs.json_object"))
            if not within:
                raise InvalidValue(
                    "structured_outputs: has no form: send one of choice, regex, json and json_object",
                    param="structured_outputs",
                )
            yield from within
        if response is not None:
            if (response.json_schema is not None) is not (response.type == "json_schema"):
                raise InvalidValue(
                    "response_format.json_schema: needed with the type json_schema, and only allowed with it",
                    param="response_format.json_schema",
                )
            if response.type == "json_object":
                yield Form("json_object", ""), "response_format"
            if response.json_schema is not None:
                path = "response_format.json_schema.schema"
                yield _written("json", response.json_schema.schema_, path)
        yield from _vllm_forms("guided_", self.guided_choice, self.guided_regex, self.guided_json)

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        _ = self._wanted  # refuses a second form
        return self


class GenerationBody(FormBody, SamplingBody):
    """How far to continue a text, how, and in which form."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.form is not None and self.min_tokens:
            raise InvalidValue(
                f"min_tokens: not with {self.form_param}, which says how long the text may be: write the least "
                "length into the form",
                param="min_tokens",
            )
        return self


def _vllm_forms(
    prefix: str, choice: list[str] | None, regex: str | None, schema: dict[str, Any] | str | None
) -> Iterator[_Wanted]:
    if choice is not None:
        yield _written("choice", choice, f"{prefix}choice")
    if regex is not None:
        yield _checked(Form("regex", regex), f"{prefix}regex")
    if schema is not None:
        path = f"{prefix}json"
        yield _written("json", _parsed(schema, path) if isinstance(schema, str) else schema, path)


def _parsed(schema: str, param: str) -> dict[str, Any]:
    """Return a schema that was sent as a string. It is bounded as a body is."""
    try:
        parsed = parse(schema)
    except RefusedJson as error:
        raise InvalidValue(f"{param}: {str(error).replace('the body', 'the schema')}", param=param) from None
    except ValueError as error:
        raise InvalidValue(f"{param}: the string is not JSON: {error}", param=param) from None
    if not isinstance(parsed, dict):
        raise InvalidValue(f"{param}: a schema is a JSON object", param=param)
    return parsed


def _written(kind: Literal["choice", "json"], value: list[str] | dict[str, Any], param: str) -> _Wanted:
    """Return a form with its value as JSON, in the order in which it was sent."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _checked(Form(kind, text), param)


def _checked(form: Form, param: str) -> _Wanted:
    if len(form.value) > MAX_FORM_CHARS:
        raise InvalidValue(f"{param}: at most {MAX_FORM_CHARS:,} characters, written as JSON", param=param)
    try:
        form.value.encode()
    except UnicodeEncodeError:
        raise InvalidValue(f"{param}: {HALF_OF_A_PAIR}", param=param) from None
    return form, param
