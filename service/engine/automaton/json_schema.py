"""JSON schemas: the texts that are JSON and validate, written in one way, with only the members that the schema names.

Every text validates; not every text that validates can be written, see `json_text` and docs/forms.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, InvalidOperation
from typing import Any, NoReturn
from urllib.parse import unquote

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.budget import MAX_POSITIONS, TooLarge
from service.engine.automaton.choice import choice_dfa
from service.engine.automaton.determinise import determinise, size
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.expression import NOTHING, Chars, Either, Expression, Repeat
from service.engine.automaton.json_text import DECIMALS, EXACT, INTEGER_LIMIT, NUMBER_LIMIT, Json, JsonText, dumped
from service.engine.automaton.regex import regex_expression, search_dfa
from service.errors import InvalidValue

MAX_SCHEMA = 65_536  # characters
MAX_NESTING = 32  # schemas in schemas, after references are followed
MAX_BRACKETS = 64  # nested brackets of the schema's text
MAX_RECURSION = 3  # how often a schema may be within itself
MAX_ALTERNATIVES = 64  # of oneOf
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")  # of an item, in a reference
ANY_DEPTH = 2  # levels of objects and arrays in a value that the schema does not describe
_MAX_LENGTH = 10**6  # no count of characters or items above it can be built
_MAX_DIGITS = 400  # of a number in a schema

Schema = dict[str, Any]
_Types = frozenset[str]

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_ALL_TYPES: _Types = frozenset(_TYPES) - {"integer"}
_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$schema", "$id", "$comment", "$defs", "definitions",
}  # fmt: skip
_STRUCTURE = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
_INSTEAD = {
    "multipleOf": "give minimum and maximum, or an enum",
    "not": "name what may be written, in an enum or anyOf",
    "if": "write the cases in anyOf",
    "then": "write the cases in anyOf",
    "else": "write the cases in anyOf",
    "patternProperties": "name the properties, or use additionalProperties",
    "propertyNames": "name the properties",
    "minProperties": "name the properties that are needed in required",
    "maxProperties": "name the properties",
    "dependentRequired": "write the cases in anyOf",
    "dependentSchemas": "write the cases in anyOf",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "contains": "use prefixItems for the items that are needed",
    "minContains": "use prefixItems for the items that are needed",
    "maxContains": "use maxItems",
    "nullable": 'list "null" among the types',
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "$anchor": "refer to the place with a JSON pointer",
}
_HOUR, _OCTET = "(?:[01][0-9]|2[0-3])", "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"  # the last two digits of years that 4 divides, without 00
_DATE = (
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|(?:[1-9][0-9]{_LEAP}|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
_HOSTNAME = f"{_LABEL}(?:\\.{_LABEL}){{0,3}}"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": f"{_OCTET}(?:\\.{_OCTET}){{3}}",
    "ipv6": "(?:(?:0|[1-9a-f][0-9a-f]{0,3}):){7}(?:0|[1-9a-f][0-9a-f]{0,3})",
    "hostname": _HOSTNAME,
    "email": f"[a-z0-9]+(?:[._+-][a-z0-9]+){{0,3}}@{_LABEL}(?:\\.{_LABEL}){{1,3}}",
    "uri": f"https?://{_HOSTNAME}(?:/[A-Za-z0-9._~-]+){{0,8}}/?",
}

_SMALLER = "lower maxLength and maxItems, leave out properties, or nest less"


def schema_dfa(value: str, alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of the JSON texts of a schema. Raises InvalidValue."""
    reader = _Reader(_loaded(value), alphabet)
    try:
        return determinise(reader.whole(), alphabet)
    except TooLarge as error:
        raise InvalidValue(f"{reader.largest()}: {error}; {_SMALLER}") from error


def any_object_dfa(alphabet: Alphabet) -> Dfa:
    """Return the minimal automaton of JSON objects of any form. Raises InvalidValue.

    It accepts nothing if the alphabet lacks a character without which only `{}` could be written.
    """
    try:
        expression = JsonText(alphabet).any_object()
        if not alphabet.missing.keys().isdisjoint('{}":'):
            expression = NOTHING
        return determinise(expression, alphabet)
    except TooLarge as error:
        raise InvalidValue(f"JSON objects can't be compiled for this model: {error}") from error


def _loaded(value: str) -> Any:
    """Return a schema from its text. Raises InvalidValue."""
    if len(value) > MAX_SCHEMA:
        raise InvalidValue(f"the schema has {len(value):,} characters; at most {MAX_SCHEMA:,} are supported")
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', value, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_BRACKETS:
                raise InvalidValue(
                    f"character {token.start()} of the schema: brackets nest more than {MAX_BRACKETS} deep"
                )
        elif token[0] in "]}":
            depth -= 1
    try:
        return json.loads(value, parse_float=_decimal, parse_int=_integer, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise InvalidValue(f"character {error.pos} of the schema: it is not JSON: {error.msg}") from error


def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        _no_number(text[:20])
    if len(text) > _MAX_DIGITS or abs(number.adjusted()) > _MAX_DIGITS:
        raise InvalidValue(f"the number {text[:20]}... of the schema has too many digits")
    return number


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise InvalidValue(f"the number {text[:20]}... of the schema has too many digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise InvalidValue(f"{text} in the schema is not a JSON number")


class _Reader:
    """Translates one schema.

    Every schema has a place, also one that was merged from others: that of the one where merging began.
    """

    def __init__(self, root: Any, alphabet: Alphabet) -> None:
        self._root = root
        self._alphabet = alphabet
        self._text = JsonText(alphabet)
        self._places: dict[int, str] = {}  # of schemas that are objects, by identity
        self._merged: list[Schema] = []  # keeps identities alive
        self._within: Counter[str] = Counter()  # how often each reference is followed around this place
        self._depth = 0
        self._flat_depth = 0
        self._sizes: list[tuple[int, str]] = []
        self._known: dict[int, tuple[int, Expression]] = {}  # sizes of expressions, by identity
        self._strings: dict[tuple[Any, ...], Expression] = {}

    def _find_places(self, root: Any) -> None:
        waiting = [(root, "#")]
        for value, place in waiting:
            self._alphabet.budget.spend(5)
            if isinstance(value, dict):
                self._places[id(value)] = place
                waiting += [(member, f"{place}/{_escaped(name)}") for name, member in value.items()]
            elif isinstance(value, list):
                waiting += [(item, f"{place}/{index}") for index, item in enumerate(value)]

    def whole(self) -> Expression:
        """Return the expression of the whole schema. Raises InvalidValue, TooLarge."""
        self._find_places(self._root)
        return self._expression(self._root, "#")

    def largest(self) -> str:
        """Return the place of the smallest part that is more than half of what was built."""
        total = max(self._sizes, default=(0, "#"))[0]
        return min((one for one in self._sizes if 2 * one[0] > total), default=(0, "#"))[1]

    def _refused(self, schema: Schema, keyword: str, message: str) -> InvalidValue:
        place = self._places.get(id(schema), "#")
        return InvalidValue(f"{place}/{_escaped(keyword)}: {message}" if keyword else f"{place}: {message}")

    # Schemas

    def _expression(self, schema: Any, place: str) -> Expression:
        """Return the expression of a schema."""
        if schema is True:
            schema = self._at({}, place)
        if schema is False:
            return NOTHING
        if not isinstance(schema, dict):
            raise InvalidValue(f"{place}: a schema is an object, true or false")
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._refused(schema, "", f"schemas are nested more than {MAX_NESTING} deep")
        flat, followed = self._flat(schema, [])
        with self._following(followed) as too_often:
            expression = NOTHING if too_often or flat is False else self._of_flat(flat)
        self._depth -= 1
        parts = size(expression, self._known)
        self._known[id(expression)] = (parts, expression)
        self._alphabet.budget.spend(100)
        self._sizes.append((parts, self._places.get(id(schema), place)))
        if parts > MAX_POSITIONS:
            raise TooLarge(f"it has more than {MAX_POSITIONS:,} characters after its repeats are written out")
        return expression

    @contextmanager
    def _following(self, references: list[str]) -> Iterator[bool]:
        """Count references while what they refer to is translated; gives whether one is within itself too often."""
        self._within.update(references)
        yield any(self._within[reference] > MAX_RECURSION for reference in references)
        self._within.subtract(references)

    def _flat(self, schema: Any, following: list[str]) -> tuple[Any, list[str]]:
        """Return a schema without $ref and allOf at its top, and the references that were followed for it.

        following: the references that led here without an object or an array between them.
        """
        if not isinstance(schema, dict):
            return schema, []
        self._alphabet.budget.spend(20 + 2 * len(schema))
        self._check_keywords(schema)
        if "$ref" not in schema and "allOf" not in schema:
            return schema, []
        self._flat_depth += 1
        if self._flat_depth > MAX_NESTING:
            raise self._refused(schema, "", f"references and allOf are nested more than {MAX_NESTING} deep")
        parts: list[Any] = []
        followed: list[str] = []
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in following:
                raise self._refused(schema, "$ref", "the schema refers to itself without an object or array between")
            flat, more = self._flat(self._resolved(schema), [*following, reference])
            parts.append(flat)
            followed += [reference, *more]
        for number, part in enumerate(self._list(schema, "allOf") if "allOf" in schema else ()):
            if not isinstance(part, dict | bool):
                place = self._places.get(id(schema), "#")
                raise InvalidValue(f"{place}/allOf/{number}: a schema is an object, true or false")
            flat, more = self._flat(part, following)
            parts.append(flat)
            followed += more
        own = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
        place = self._places.get(id(schema), "#")
        if own.keys() - _ANNOTATIONS:
            parts.append(self._at(own, place))
        merged = parts[0] if parts else self._at({}, place)
        for part in parts[1:]:
            merged = self._merge(merged, part, place)
        self._flat_depth -= 1
        return merged, followed

    def _check_keywords(self, schema: Schema) -> None:
        known = _ANNOTATIONS | _STRUCTURE | set().union(*_KEYWORDS.values())
        for keyword in schema:
            if keyword not in known and not keyword.startswith("x-"):
                instead = f": {_INSTEAD[keyword]} instead" if keyword in _INSTEAD else ""
                raise self._refused(schema, keyword, f"{_shown(keyword)} is not supported{instead}")

    def _resolved(self, schema: Schema) -> Any:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self._refused(schema, "$ref", "only references into the schema are supported, as in #/$defs/name")
        found = self._root
        for part in reference.split("/")[1:]:
            # A pointer in a URL's fragment: %20 is a space, unless a name is written like that.
            names = [one.replace("~1", "/").replace("~0", "~") for one in (part, unquote(part))]
            if isinstance(found, dict) and (name := next((one for one in names if one in found), None)) is not None:
                found = found[name]
            elif isinstance(found, list) and _INDEX.fullmatch(part) and int(part) < len(found):
                found = found[int(part)]
            else:
                raise self._refused(schema, "$ref", f"the schema has nothing at {_shown(reference)}")
        if not isinstance(found, dict | bool):
            raise self._refused(schema, "$ref", f"what is at {_shown(reference)} is not a schema")
        return found

    def _of_flat(self, schema: Any) -> Expression:
        """Return the expression of a schema without $ref and allOf."""
        if schema is True:
            schema = self._at({}, "#")
        place = self._places.get(id(schema), "#")
        if "enum" in schema or "const" in schema:
            return self._enumeration(schema)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._alternatives(schema, keyword, place)
        types = self._types(schema)
        if types is None:
            types = frozenset(kind for kind, keywords in _KEYWORDS.items() if keywords & schema.keys()) or _ALL_TYPES
            if not schema.keys() - _ANNOTATIONS:
                return self._text.any_value(ANY_DEPTH)
        return Either(tuple(self._of_type(kind, schema, place) for kind in _TYPES if kind in types))

    def _of_type(self, kind: str, schema: Schema, place: str) -> Expression:
        match kind:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                return self._number(schema, is_integer=kind == "integer")
            case "boolean":
                return self._text.boolean
            case "array":
                return self._array(schema, place)
            case "object":
                return self._object(schema, place)
            case _:
                return self._text.written("null")

    def _types(self, schema: Schema) -> _Types | None:
        """Return the types that a schema names; None if it names none. Number includes integer."""
        if "type" not in schema:
            return None
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not types or not all(isinstance(one, str) and one in _TYPES for one in types):
            raise self._refused(schema, "type", f"a type is one or a list of {', '.join(_TYPES)}")
        return frozenset(types) - {"integer"} if "number" in types else frozenset(types)

    def _enumeration(self, schema: Schema) -> Expression:
        keyword = "const" if "const" in schema else "enum"
        others = schema.keys() - _ANNOTATIONS - {"enum", "const", "type"}
        if others:
            extra = min(others)
            raise self._refused(schema, extra, f"{_shown(extra)} beside {keyword} is not supported: leave it out")
        values = self._values(schema)
        types = self._types(schema) or _ALL_TYPES
        return self._text.one_of([value for value in values.values() if _is_of(value, types)])

    def _values(self, schema: Schema) -> dict[str, Json]:
        """Return the values of enum, const or both, by what makes them equal."""
        values: dict[str, Json] | None = None
        if "enum" in schema:
            values = {_identity(value): value for value in self._list(schema, "enum")}
        if "const" in schema:
            key = _identity(schema["const"])
            values = {key: schema["const"]} if values is None or key in values else {}
        self._alphabet.budget.spend(20 * len(values or ()))
        return values or {}

    def _alternatives(self, schema: Schema, keyword: str, place: str) -> Expression:
        if keyword == "anyOf" and "oneOf" in schema:
            raise self._refused(schema, "oneOf", "anyOf and oneOf in one schema are not supported: combine them")
        alternatives = self._list(schema, keyword)
        if keyword == "oneOf":
            self._check_disjoint(schema, alternatives)
        shared = {name: value for name, value in schema.items() if name != keyword and name not in _ANNOTATIONS}
        self._at(shared, place)
        parts = []
        for index, alternative in enumerate(alternatives):
            where = f"{place}/{keyword}/{index}"
            if shared:
                flat, followed = self._flat(alternative, [])
                with self._following(followed) as too_often:
                    parts.append(NOTHING if too_often else self._expression(self._merge(shared, flat, where), where))
            else:
                parts.append(self._expression(alternative, where))
        return Either(tuple(parts))

    # Types

    def _string(self, schema: Schema) -> Expression:
        least = self._count(schema, "minLength") or 0
        most = self._count(schema, "maxLength")
        patterns = schema.get("pattern", ())
        patterns = (patterns,) if not isinstance(patterns, tuple) else patterns
        form = schema.get("format")
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise self._refused(schema, "pattern", "a pattern is a string")
        key = (least, most, patterns, form)
        if "format" in schema and (not isinstance(form, str) or form not in FORMATS):
            raise self._refused(
                schema, "format", f"the supported formats are {', '.join(FORMATS)}; use pattern instead"
            )
        if key not in self._strings:
            self._strings[key] = self._new_string(schema, least, most, patterns, form)
        return self._strings[key]

    def _new_string(
        self, schema: Schema, least: int, most: int | None, patterns: tuple[Any, ...], form: str | None
    ) -> Expression:
        if most is not None and least > most:
            return NOTHING
        if not patterns and form is None:
            return self._text.string(least, most)
        found = None if form is None else regex_expression(FORMATS[form], self._alphabet)
        if found is not None and not patterns and not least and most is None:
            return self._text.quoted(found)
        parts = [] if found is None else [determinise(found, self._alphabet)]
        for pattern in patterns:
            try:
                parts.append(search_dfa(pattern, self._alphabet))
            except InvalidValue as error:
                raise self._refused(schema, "pattern", error.message) from error
        if least or most is not None:
            parts.append(determinise(Repeat(Chars(self._alphabet.everything()), least, most), self._alphabet))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.intersection(part, self._alphabet.budget)
        return self._text.string_of(whole)

    def _number(self, schema: Schema, *, is_integer: bool) -> Expression:
        least, most = self._range(schema, 1 if is_integer else 10**DECIMALS)
        limit = INTEGER_LIMIT if is_integer else NUMBER_LIMIT
        for keyword, end in (("inimum", least), ("aximum", None if most is None else -most)):
            if end is not None and end > limit:
                keyword = next(one for one in ("m" + keyword, "exclusiveM" + keyword) if one in schema)
                digits = "15 digits" if is_integer else f"9 digits before the point and {DECIMALS} after it"
                raise self._refused(
                    schema, keyword, f"numbers of this size are not written: they have at most {digits}"
                )
        make = self._text.integer if is_integer else self._text.number
        return make(least, most)

    def _range(self, schema: Schema, unit: int) -> tuple[int | None, int | None]:
        """Return the least and the most number of a schema, in parts of 1 of which `unit` are 1; None: no limit."""
        ends: dict[str, list[int]] = {"least": [], "most": []}
        for keyword in sorted(_KEYWORDS["number"]):
            if keyword not in schema:
                continue
            bound = schema[keyword]
            if isinstance(bound, bool) or not isinstance(bound, int | Decimal):
                raise self._refused(schema, keyword, f"{keyword} is a number")
            scaled = Decimal(bound).scaleb(len(str(unit)) - 1, EXACT)
            is_least = "inimum" in keyword
            whole = int(scaled.to_integral_value(ROUND_CEILING if is_least else ROUND_FLOOR))
            if keyword.startswith("exclusive") and whole == scaled:
                whole += 1 if is_least else -1
            ends["least" if is_least else "most"].append(whole)
        return max(ends["least"], default=None), min(ends["most"], default=None)

    def _array(self, schema: Schema, place: str) -> Expression:
        if schema.get("uniqueItems", False) is not False:
            raise self._refused(schema, "uniqueItems", "uniqueItems is not supported: leave it out")
        most = self._count(schema, "maxItems")
        least = self._count(schema, "minItems")
        if "prefixItems" in schema:
            first = self._list(schema, "prefixItems")
            items = [self._expression(one, f"{place}/prefixItems/{index}") for index, one in enumerate(first)]
            rest = self._expression(schema.get("items", False), f"{place}/items")
            if rest == NOTHING:
                most = len(items) if most is None else min(most, len(items))
            least = len(items) if least is None else least
            if most is not None and "minItems" not in schema:
                least = min(least, most)
            return NOTHING if most is not None and least > most else self._text.tuple_(items, rest, least, most)
        least = least or 0
        if most is not None and least > most:
            return NOTHING
        item = (
            self._expression(schema["items"], f"{place}/items")
            if "items" in schema
            else self._text.any_value(ANY_DEPTH - 1)
        )
        return self._text.array(item, least, most)

    def _object(self, schema: Schema, place: str) -> Expression:
        if not _KEYWORDS["object"] & schema.keys():
            return self._text.any_object(ANY_DEPTH)
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise self._refused(schema, "properties", "properties is an object of schemas")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._refused(schema, "required", "required is a list of names")
        additional = schema.get("additionalProperties", False)
        unnamed = [name for name in required if name not in properties]
        if unnamed and additional is False:
            raise self._refused(
                schema, "required", f"{_shown(unnamed[0])} is not among the properties: say there what it is"
            )
        members = [
            (name, self._expression(one, f"{place}/properties/{_escaped(name)}"), name not in required)
            for name, one in properties.items()
        ]
        if additional is False:
            return self._text.object(members)
        value = self._expression(additional, f"{place}/additionalProperties")
        members += [(name, value, False) for name in unnamed]
        return self._text.object(members, (self._other_names([name for name, _, _ in members]), value))

    def _other_names(self, names: list[str]) -> Expression:
        """Return the expression of strings that are none of these."""
        if not names:
            return self._text.string()
        every = determinise(Repeat(Chars(self._alphabet.everything()), 0, None), self._alphabet)
        return self._text.string_of(every.difference(choice_dfa(names, self._alphabet), self._alphabet.budget))

    def _count(self, schema: Schema, keyword: str) -> int | None:
        """Return a number of characters or items, None if the schema does not say it."""
        if keyword not in schema:
            return None
        count = schema[keyword]
        if isinstance(count, Decimal) and count == count.to_integral_value():
            count = int(count)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise self._refused(schema, keyword, f"{keyword} is a number that is not negative")
        if count > _MAX_LENGTH:
            raise self._refused(schema, keyword, f"{count} is too many: give a smaller number, or leave {keyword} out")
        return count

    def _list(self, schema: Schema, keyword: str) -> list[Any]:
        found = schema[keyword]
        if not isinstance(found, list) or not found:
            raise self._refused(schema, keyword, f"{keyword} is a list of at least one")
        return found

    # Merging

    def _at(self, schema: Schema, place: str) -> Schema:
        """Return a new schema after it was given a place."""
        self._places[id(schema)] = place
        self._merged.append(schema)
        return schema

    def _merge(self, one: Any, two: Any, place: str) -> Any:
        """Return the schema of what two schemas without $ref and allOf at their tops both accept."""
        if one is False or two is False:
            return False
        if one is True or two is True:
            return two if one is True else one
        for schema in (one, two):
            if not isinstance(schema, dict):
                raise InvalidValue(f"{place}: a schema is an object, true or false")
        self._alphabet.budget.spend(20 + 4 * (len(one) + len(two)))
        merged = self._at({**one, **two}, place)
        if "type" in one and "type" in two:
            types = _common_types(self._types(one) or frozenset(), self._types(two) or frozenset())
            if not types:
                return False
            merged["type"] = sorted(types)
        if ("enum" in one or "const" in one) and ("enum" in two or "const" in two):
            values, others = self._values(one), self._values(two)
            merged.pop("const", None)
            merged["enum"] = [value for key, value in values.items() if key in others]
            if not merged["enum"]:
                return False
        for keyword in sorted(one.keys() & two.keys() - _ANNOTATIONS):
            if keyword in ("minLength", "minItems", "minimum", "exclusiveMinimum"):
                merged[keyword] = max(self._bound(one, keyword), self._bound(two, keyword))
            elif keyword in ("maxLength", "maxItems", "maximum", "exclusiveMaximum"):
                merged[keyword] = min(self._bound(one, keyword), self._bound(two, keyword))
            elif keyword == "pattern":
                merged[keyword] = (*_patterns(one[keyword]), *_patterns(two[keyword]))
            elif keyword == "uniqueItems":
                merged[keyword] = one[keyword] or two[keyword]
            elif keyword == "items":
                merged[keyword] = self._both(one[keyword], two[keyword], place)
            elif keyword in ("format", "anyOf", "oneOf", "prefixItems") and one[keyword] != two[keyword]:
                raise self._refused(merged, keyword, f"two different {keyword} can't be combined: write them as one")
        if "prefixItems" in merged and "items" in merged and ("prefixItems" in one) != ("prefixItems" in two):
            raise self._refused(merged, "prefixItems", "prefixItems can't be combined with other items")
        if {"properties", "required", "additionalProperties"} & merged.keys():
            self._merge_members(one, two, merged, place)
        return merged

    def _merge_members(self, one: Schema, two: Schema, merged: Schema, place: str) -> None:
        """Give a merged schema the members of both."""
        for schema in (one, two):
            if not isinstance(schema.get("properties", {}), dict):
                raise self._refused(schema, "properties", "properties is an object of schemas")
            if not isinstance(schema.get("required", []), list):
                raise self._refused(schema, "required", "required is a list of names")
        mine, theirs = one.get("properties", {}), two.get("properties", {})
        members = {}
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            # A schema that doesn't name a property says with additionalProperties what it may be.
            first = mine.get(name, one.get("additionalProperties", True))
            second = theirs.get(name, two.get("additionalProperties", True))
            members[name] = self._both(first, second, f"{place}/properties/{_escaped(name)}")
        if members:
            merged["properties"] = members
        merged["required"] = [*one.get("required", []), *two.get("required", [])]
        if "additionalProperties" in one and "additionalProperties" in two:
            merged["additionalProperties"] = self._both(
                one["additionalProperties"], two["additionalProperties"], f"{place}/additionalProperties"
            )

    def _both(self, one: Any, two: Any, place: str) -> Any:
        """Return the schema of what two schemas accept, merged when it is translated."""
        if one is True or two is True or one == two:
            return two if one is True else one
        return False if one is False or two is False else self._at({"allOf": [one, two]}, place)

    def _bound(self, schema: Schema, keyword: str) -> int | Decimal:
        bound = schema[keyword]
        if isinstance(bound, bool) or not isinstance(bound, int | Decimal):
            raise self._refused(schema, keyword, f"{keyword} is a number")
        return bound

    # oneOf

    def _check_disjoint(self, schema: Schema, alternatives: list[Any]) -> None:
        """Raise InvalidValue unless it is certain that no value is of two alternatives."""
        if len(alternatives) > MAX_ALTERNATIVES:
            raise self._refused(schema, "oneOf", f"more than {MAX_ALTERNATIVES} alternatives are not supported")
        flat = [self._flat(one, [])[0] for one in alternatives]
        for second in range(len(flat)):
            for first in range(second):
                if not self._are_disjoint(flat[first], flat[second], 3):
                    raise self._refused(
                        schema,
                        "oneOf",
                        f"a value may be of alternatives {first} and {second}: use anyOf, or give each of them a "
                        "required property with another const",
                    )

    def _are_disjoint(self, one: Any, two: Any, depth: int) -> bool:
        """Whether it is certain that no value is of both schemas, as JSON Schema means them."""
        self._alphabet.budget.spend(50)
        if one is False or two is False:
            return True
        if not isinstance(one, dict) or not isinstance(two, dict) or not depth:
            return False
        types, others = self._types(one) or _ALL_TYPES, self._types(two) or _ALL_TYPES
        common = _common_types(types, others)
        if not common:
            return True
        for first, second in ((one, two), (two, one)):
            if "enum" in first or "const" in first:
                values = self._values(first)
                if "enum" in second or "const" in second:
                    others_values = self._values(second)
                    values = {key: value for key, value in values.items() if key in others_values}
                if not any(_is_of(value, common) for value in values.values()):
                    return True
            for keyword in ("anyOf", "oneOf"):
                if keyword in first:
                    flat = [self._flat(each, [])[0] for each in self._list(first, keyword)]
                    if all(self._are_disjoint(each, second, depth - 1) for each in flat):
                        return True
        if common <= {"integer", "number"}:
            (low, high), (other_low, other_high) = (self._range(each, 10**DECIMALS) for each in (one, two))
            return _is_below(high, other_low) or _is_below(other_high, low)
        return common == {"object"} and self._have_disjoint_members(one, two, depth)

    def _have_disjoint_members(self, one: Schema, two: Schema, depth: int) -> bool:
        """Whether a property that objects of both schemas must have can't have a value of both."""
        for first, second in ((one, two), (two, one)):
            required, properties = first.get("required", []), second.get("properties", {})
            mine = first.get("properties", {})
            if not isinstance(required, list) or not isinstance(properties, dict) or not isinstance(mine, dict):
                return False
            for name in required:
                if name not in properties:
                    if second.get("additionalProperties") is False:
                        return True
                elif name in mine:
                    flat = [self._flat(each, [])[0] for each in (mine[name], properties[name])]
                    if self._are_disjoint(flat[0], flat[1], depth - 1) and name in second.get("required", []):
                        return True
        return False


def _is_below(high: int | None, low: int | None) -> bool:
    return high is not None and low is not None and high < low


def _common_types(one: _Types, two: _Types) -> _Types:
    common = one & two
    return (
        common | {"integer"}
        if ("number" in one and "integer" in two) or ("integer" in one and "number" in two)
        else common
    )


def _is_of(value: Json, types: _Types) -> bool:
    """Whether a value is of one of some types."""
    match value:
        case bool():
            return "boolean" in types
        case None:
            return "null" in types
        case int() | Decimal():
            return "number" in types or ("integer" in types and value == int(value))
        case str():
            return "string" in types
        case list():
            return "array" in types
        case _:
            return "object" in types


def _identity(value: Json) -> str:
    """Return a text that is the same for values that JSON Schema takes for equal, and only for them."""
    return dumped(_in_order(value))


def _in_order(value: Json) -> Json:
    match value:
        case dict():
            return {name: _in_order(value[name]) for name in sorted(value)}
        case list():
            return [_in_order(item) for item in value]
        case int() | Decimal() if not isinstance(value, bool):
            return Decimal(value).normalize(EXACT)
        case _:
            return value


def _patterns(pattern: Any) -> tuple[Any, ...]:
    return pattern if isinstance(pattern, tuple) else (pattern,)


def _escaped(name: str) -> str:
    """Return a name as a part of a JSON pointer, shortened if it is long."""
    return (name if len(name) <= 60 else f"{name[:60]}...").replace("~", "~0").replace("/", "~1")


def _shown(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:60]}..."
