from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.errors import InvalidValue, UnknownCharacters
from tests.harness.forms import CHARSET, sample, schema_text


def compiled(schema: Any, charset: str = CHARSET) -> Automaton:
    return compile_form(Form("json", schema_text(schema)), charset)


def compiled_or_none(schema: Any, refusals: str = "^no text has this form$") -> Automaton | None:
    """Return the automaton of a schema or of its text, None if it is refused for one of the reasons."""
    try:
        return compile_form(Form("json", schema if isinstance(schema, str) else schema_text(schema)), CHARSET)
    except InvalidValue as error:
        if not re.search(refusals, error.message):
            raise
        return None


def accepts(automaton: Automaton, text: str, charset: str = CHARSET) -> bool:
    """Whether an automaton accepts a text."""
    if not set(text) <= set(charset):
        return False
    state = automaton.walk(0, map(charset.index, text))
    return state >= 0 and automaton.fewest[state] == 0


def assert_valid(
    schema: Any, automaton: Automaton, seed: int, lengths: tuple[int, ...] = (0, 1, 3, 10, 30, 100)
) -> None:
    """Draw texts of an automaton, and check that they validate."""
    random = np.random.default_rng(seed)
    validator = jsonschema.Draft202012Validator(schema)
    for more in lengths:
        text = sample(automaton, CHARSET, random, int(automaton.fewest[0]) + more)
        validator.validate(json.loads(text))


# Numbers

INTEGERS = st.integers(-30, 30) | st.integers(-12_000, 12_000) | st.integers(-(10**16), 10**16)


@settings(max_examples=100)
@given(INTEGERS, INTEGERS, st.booleans(), st.booleans(), st.lists(INTEGERS, max_size=30))
def test_integers__are_those_of_the_range(one: int, two: int, above: bool, below: bool, numbers: list[int]) -> None:
    low, high = sorted((one, two))
    schema = {
        "type": "integer",
        "exclusiveMinimum" if above else "minimum": low,
        "exclusiveMaximum" if below else "maximum": high,
    }
    low, high = low + above, high - below
    if low > high or low >= 10**15 or high <= -(10**15):
        with pytest.raises(InvalidValue, match=r"no text has this form|imum: numbers of this size are not written"):
            compiled(schema)
        return
    automaton = compiled(schema)
    near = [*range(low - 2, low + 3), *range(high - 2, high + 3), low // 10, high * 10, (low + high) // 2, 0]
    for number in [*numbers, *near]:
        expected = low <= number <= high and abs(number) < 10**15
        assert accepts(automaton, str(number)) == expected, number
    for text in ("", "-", "-0", "00", "01", "+1", "1.0", "1e1", " 1"):
        assert not accepts(automaton, text), text


DECIMALS = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(-(10**9), 10**9), st.integers(0, 8)
)


@settings(max_examples=100)
@given(DECIMALS, DECIMALS, st.booleans(), st.booleans(), st.lists(DECIMALS, max_size=30))
@example(Decimal(10**9), Decimal(10**9), False, False, [])
@example(Decimal("0.1"), Decimal("0.1"), False, False, [])
@example(Decimal("-0.000001"), Decimal("0.000001"), True, True, [])
@example(Decimal("0.0000001"), Decimal("0.0000019"), False, False, [])
def test_numbers__are_those_of_the_range(
    one: Decimal, two: Decimal, above: bool, below: bool, numbers: list[Decimal]
) -> None:
    low, high = sorted((one, two))
    text = json.dumps(
        {"type": "number", "exclusiveMinimum" if above else "minimum": 0, "exclusiveMaximum" if below else "maximum": 1}
    )
    text = text.replace(": 0,", f": {low:f},").replace(": 1}", f": {high:f}}}")
    unit = Decimal("0.000001")

    def is_inside(number: Decimal) -> bool:
        return (low < number if above else low <= number) and (number < high if below else number <= high)

    steps = [low.quantize(unit) + unit * step for step in range(-2, 3)] + [
        high.quantize(unit) + unit * step for step in range(-2, 3)
    ]
    candidates = [*steps, *(number.quantize(unit) for number in numbers), Decimal(0), Decimal(1), (low + high) / 2]
    candidates = [number.quantize(unit).normalize() + 0 for number in candidates]
    if low >= 10**9 or high <= -(10**9):
        with pytest.raises(InvalidValue, match="imum: numbers of this size are not written"):
            compiled_or_none(text)
        return
    automaton = compiled_or_none(text)
    if automaton is None:
        assert not any(map(is_inside, candidates))
        return
    for number in candidates:
        expected = is_inside(number) and abs(number) < 10**9
        assert accepts(automaton, f"{number:f}") == expected, number
        if number != number.to_integral_value():
            assert not accepts(automaton, f"{number:f}0")
    assert_valid(json.loads(text), automaton, 0)
    for wrong in ("", "-", "-0", "0.0", "1.", ".5", "1e0", "00.5", "-0.0"):
        assert not accepts(automaton, wrong), wrong


# Strings


@settings(max_examples=100)
@given(
    st.integers(0, 4),
    st.none() | st.integers(0, 6),
    st.sampled_from([None, "a", "^a", '["x]$', "^[^a]*$", r"^\w+$", r"\\|\n", "^.{2}$", "日|b{2}", "(^a|b$)"]),
    st.lists(st.text(st.sampled_from('aabbx"\\\n日 \t\x01'), max_size=7), max_size=20),
)
def test_strings__are_those_of_the_length_and_pattern(
    least: int, most: int | None, pattern: str | None, strings: list[str]
) -> None:
    schema: dict[str, Any] = {"type": "string", "minLength": least}
    if most is not None:
        schema["maxLength"] = most
    if pattern is not None:
        schema["pattern"] = pattern
    validator = jsonschema.Draft202012Validator(schema)
    # $ of a JSON schema matches only at the end; Python's also before a newline there.
    strings = [string for string in strings if pattern is None or not string.endswith("\n")]
    automaton = compiled_or_none(schema)
    if automaton is None:
        assert not any(map(validator.is_valid, strings))
        return
    assert_valid(schema, automaton, 1)
    for string in strings:
        writable = "\x01" not in string and (pattern is None or "\t" not in string)  # CHARSET has no tab to match
        expected = validator.is_valid(string) and writable
        assert accepts(automaton, json.dumps(string, ensure_ascii=False)) == expected, string


# Objects and arrays


def test_object__has_the_named_members_in_their_order() -> None:
    schema = {
        "properties": {"b": {"type": "null"}, "a": {"type": "null"}, "c": {"type": "null"}},
        "required": ["a"],
    }
    automaton = compiled(schema)
    for text in ('{"a":null}', '{"b":null,"a": null}', '{"b":null, "a":null, "c":null}', '{"a":null,"c":null}'):
        assert accepts(automaton, text), text
    for text in (
        "{}",
        '{"b":null}',
        '{"a":null,"b":null}',
        '{"a":null,"d":null}',
        '{"a":null,}',
        '{"a" :null}',
        '{ "a":null}',
    ):
        assert not accepts(automaton, text), text


@pytest.mark.parametrize("additional", [True, {}, {"type": "integer"}])
def test_object__has_other_members_if_the_schema_says_so(additional: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": ["z"],
        "additionalProperties": additional,
    }
    automaton = compiled(schema)
    assert accepts(automaton, '{"a":null,"z":1}')
    assert accepts(automaton, '{"z":1, "aa": 2, "": 3}')
    assert not accepts(automaton, '{"z":1,"a":2}')
    assert not accepts(automaton, '{"z":1,"z":2}')
    assert accepts(automaton, '{"z":"x"}') == (additional in (True, {}))
    assert_valid(schema, automaton, 3)


@pytest.mark.parametrize("least", [0, 1, 2, 3, 5, None])
@pytest.mark.parametrize("most", [None, 0, 1, 2, 3, 5])
@pytest.mark.parametrize("items", [None, False, {"const": 9}])
@pytest.mark.parametrize("prefix", [0, 2])
def test_array__has_items_of_the_number(least: int | None, most: int | None, items: Any, prefix: int) -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema |= {"minItems": least} if least is not None else {}
    schema |= {"maxItems": most} if most is not None else {}
    schema |= {"items": items} if items is not None else {}
    schema |= {"prefixItems": [{"const": 1}, {"const": 2}]} if prefix else {}
    validator = jsonschema.Draft202012Validator(schema)
    arrays = [[1, 2, *[9] * 4][:length] if prefix else [9] * length for length in range(7)]
    valid = [array for array in arrays if validator.is_valid(array)]
    if prefix and least is None:  # all of them are written, if they may
        valid = [array for array in valid if len(array) >= min(2, 2 if most is None else most)]
    if prefix and items is None:
        valid = [array for array in valid if len(array) <= 2]
    if not valid:
        with pytest.raises(InvalidValue, match="no text has this form"):
            compiled(schema)
        return
    automaton = compiled(schema)
    assert [array for array in arrays if accepts(automaton, json.dumps(array))] == valid
    assert_valid(schema, automaton, 4, (0, 5, 20))


def test_recursion__ends_at_a_depth() -> None:
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    automaton = compiled(schema)
    depths = [depth for depth in range(8) if accepts(automaton, '{"next":' * depth + "{}" + "}" * depth)]
    assert depths == [0, 1, 2, 3]
    needed = {
        "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}},
        "$ref": "#/$defs/n",
    }
    with pytest.raises(InvalidValue, match="no text has this form"):
        compiled(needed)


# Alternatives


@pytest.mark.parametrize(
    ("alternatives", "are_disjoint"),
    [
        ([{"type": "integer"}, {"type": "string"}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"minimum": 3}, {"maximum": 2}], False),  # neither says anything of other types
        ([{"minimum": 3}, {"type": "integer", "maximum": 2}], True),
        ([{"type": "number", "minimum": 3}, {"type": "integer", "exclusiveMaximum": 3}], True),
        ([{"type": "number", "minimum": 3}, {"type": "number", "maximum": 3}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}, {"const": "1"}], True),
        ([{"enum": ["a", "b"]}, {"enum": ["c", "b"]}], False),
        ([{"const": "a"}, {"type": "string"}], False),
        ([{"const": "a"}, {"type": "null"}, {"anyOf": [{"type": "integer"}, {"type": "boolean"}]}], True),
        ([{"type": "object", "properties": {"a": {"const": one}}, "required": ["a"]} for one in (1, 2, 3)], True),
        ([{"type": "object", "properties": {"a": {"const": one}}} for one in (1, 2, 3)], False),
        ([{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
          {"type": "object", "properties": {"a": {"const": 2}}}], False),
        ([{"type": "object", "properties": {"a": {}}, "required": ["a"]},
          {"type": "object", "properties": {"b": {}}, "required": ["b"]}], False),
        ([{"type": "object", "properties": {"a": {}}, "required": ["a"]},
          {"type": "object", "properties": {"b": {}}, "required": ["b"], "additionalProperties": False}], True),
    ],
)  # fmt: skip
def test_one_of__is_accepted_only_if_its_alternatives_exclude_each_other(
    alternatives: list[Any], are_disjoint: bool
) -> None:
    schema = {"oneOf": alternatives}
    if are_disjoint:
        assert_valid(schema, compiled(schema), 5)
    else:
        with pytest.raises(InvalidValue, match="#/oneOf: a value may be of alternatives 0 and 1"):
            compiled(schema)


SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 700},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
        {"type": "string", "maxLength": 5},
        {"type": "string", "minLength": 2, "pattern": "^[a-c日]+$"},
        {"type": "string", "format": "date"},
        {"type": "boolean"},
        {"type": ["null", "integer"]},
        {"enum": ["x", 1, None, [1, {"a": "\n"}]]},
        {"const": "ä\"\\"},
        {"type": "array"},
        {"type": "object"},
        {"$ref": "#/$defs/shared"},
        {},
        True,
    ]
)  # fmt: skip


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "c", "é", 'q"', ""])
    members = st.dictionaries(names, inner, max_size=4)
    objects = st.builds(
        lambda members, additional, seed: {
            "type": "object",
            "properties": members,
            "required": [name for index, name in enumerate(members) if seed >> index & 1],
            **({} if additional is None else {"additionalProperties": additional}),
        },
        members,
        st.sampled_from([None, None, False, True, {"type": "integer"}]),
        st.integers(0, 15),
    )
    arrays = st.builds(
        lambda item, least, more: {"type": "array", "items": item, "minItems": least, "maxItems": least + more},
        inner, st.integers(0, 2), st.integers(0, 3),
    )  # fmt: skip
    tuples = st.builds(
        lambda first, rest, least: {"type": "array", "prefixItems": first, "items": rest, "minItems": least},
        st.lists(inner, min_size=1, max_size=2), inner | st.just(False), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(
        objects, arrays, tuples,
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        st.lists(objects, min_size=1, max_size=3).map(lambda parts: {"allOf": parts}),
        st.builds(lambda parts, base: {**base, "anyOf": parts}, st.lists(objects, min_size=1, max_size=2), objects),
    )  # fmt: skip


@settings(max_examples=120)
@given(st.recursive(SCALARS, larger, max_leaves=8), st.integers(0, 2**32))
def test_schema__gives_only_texts_that_validate(schema: Any, seed: int) -> None:
    if not isinstance(schema, dict):
        schema = {}
    schema = {
        **schema,
        "$defs": {
            "shared": {"type": "object", "properties": {"in": {"$ref": "#/$defs/shared"}, "n": {"type": "integer"}}}
        },
    }
    refusals = "no text has|too much work|more than 12,000 characters|can't be combined|is not supported"
    automaton = compiled_or_none(schema, refusals)
    if automaton is not None:
        assert_valid(schema, automaton, seed)


# Characters


def test_characters__that_the_model_lacks_are_not_written() -> None:
    small = '{}":, abz0123456789ntrue\n'
    automaton = compiled({"type": "object", "properties": {"a": {"type": "string"}, "q": {"type": "null"}}}, small)
    assert accepts(automaton, '{"a": "bz 1"}', small)
    assert not accepts(automaton, '{"a":"\\n"}', small)
    assert accepts(automaton, "{}", small)
    assert compiled({"enum": ["ab", "xy"]}, small).fewest[0] == 4
    with pytest.raises(UnknownCharacters, match=r"lacks 'q' \(U\+0071\), 'x' \(U\+0078\)"):
        compiled({"properties": {"qx": {"type": "integer"}}, "required": ["qx"]}, small)
    with pytest.raises(UnknownCharacters, match=r"'\"' \(U\+0022\)"):
        compile_form(Form("json_object", ""), "abc{}[]")


# Malformed schemas

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "#", "#/a/0", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "$ref"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYWORDS = st.sampled_from(
    [
        "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "properties", "required",
        "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength",
        "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "not", "title",
    ]
)  # fmt: skip
MALFORMED = st.recursive(
    JUNK,
    lambda inner: (
        st.dictionaries(KEYWORDS, st.one_of(inner, st.lists(inner, max_size=3), JUNK), max_size=4)
        | st.builds(lambda name, value: {"properties": {name: value}}, st.sampled_from(["a", "b"]), inner)
        | st.builds(
            lambda parts, keyword: {keyword: parts},
            st.lists(inner, max_size=3),
            st.sampled_from(["anyOf", "allOf", "oneOf"]),
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(MALFORMED, st.integers(0, 2**32))
@example({"enum": [4.804881196082834e16, 1e300, -1e-300, 12345678901234567890, 0.1]}, 0)
@example({"allOf": [{"pattern": []}, {"pattern": {}}]}, 0)
@example({"allOf": [3, {"type": "null"}]}, 0)
@example({"format": {}}, 0)
@example({"minItems": True, "allOf": [{"minItems": "a"}]}, 0)
@example({"required": [[]], "properties": {"a": 3}}, 0)
@example({"type": [[]]}, 0)
@example({"$ref": []}, 0)
def test_schema__that_is_malformed_is_refused_or_gives_valid_texts(schema: Any, seed: int) -> None:
    automaton = compiled_or_none(schema_text(schema), "^(#|no text of this form|no text has|the number|the schema)")
    if automaton is not None:
        assert_valid(schema, automaton, seed, (0, 3, 20))


@pytest.mark.parametrize("schema", [{"minimum": 3, "maximum": 2}, {"minimum": 2.5, "maximum": 2.7}])
def test_characters__are_named_only_if_they_would_help(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=r"^no text has this form$"):
        compiled(schema | {"type": "integer"}, "0123456789-")
    with pytest.raises(UnknownCharacters, match=r"lacks '\"' \(U\+0022\)$"):
        compiled({"anyOf": [schema | {"type": "integer"}, {"type": "string"}]}, "0123456789-a,:")


# References


def test_reference__is_a_pointer_in_a_fragment() -> None:
    names = {"a b": "a%20b", "a/b": "a~1b", "a~b": "a~0b", "a%20c": "a%20c", "é": "%C3%A9", "%zz": "%zz", "~1": "~01"}
    for name, written in names.items():
        assert accepts(compiled({"$ref": f"#/$defs/{written}", "$defs": {name: {"type": "null"}}}), "null")
    two = {"anyOf": [{"type": "null"}, {"type": "boolean"}]}
    assert accepts(compiled({"properties": {"x": two, "y": {"$ref": "#/properties/x/anyOf/1"}}}), '{"y":true}')
    for wrong in ("0000000001", "00", "01", "2", "-1", "-", "٠", "1e0", "99999999999999999999", ""):
        with pytest.raises(InvalidValue, match=r"^#/properties/y/\$ref: the schema has nothing at "):
            compiled({"properties": {"x": two, "y": {"$ref": f"#/properties/x/anyOf/{wrong}"}}})
