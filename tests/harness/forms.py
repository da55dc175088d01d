"""Forms of text for tests and benchmarks, and texts that are drawn from automata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.automaton import NEVER, Automaton
from service.engine.automaton.budget import Budget
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.json_schema import schema_dfa
from service.engine.automaton.regex import regex_dfa
from service.errors import InvalidValue

# A charset with which every form below can be written. Its characters are in normal form C.
CHARSET = "\n" + "".join(map(chr, range(32, 127))) + "ÄÖÜßäéöüñčαβγжя日本語€–"

# Patterns that are compiled, by names.
PATTERNS = {
    "date": r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])",
    "german date": r"(?:0?[1-9]|[12]\d|3[01])\.(?:0?[1-9]|1[0-2])\.(?:19|20)\d\d",
    "time": r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?",
    "time of twelve hours": r"(?:1[0-2]|[1-9]):[0-5]\d ?(?i:[ap]m)",
    "date and time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)",
    "weekday": r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day",
    "month and year": r"(?:January|February|March|April|May|June|July|August|September|October|November|December) \d+",
    "name": r"[A-Z][a-z]{1,12}(?:[ -][A-Z][a-z]{1,12}){1,2}",
    "name with title": r"(?:(?:Dr|Prof|Mr|Mrs|Ms)\. )?[A-ZÄÖÜ][a-zäöüß]+ (?:[A-Z]\. )?[A-ZÄÖÜ][a-zäöüß]+",
    "CSV of 31 columns": r"(?:[^,\n\"]*,){30}[^,\n\"]*",
    "CSV of 31 numbers": r"-?\d{1,3}(?:\.\d{1,2})?(?:,-?\d{1,3}(?:\.\d{1,2})?){30}",
    "CSV with quotes": r'(?:[^,"\n]*|"(?:[^"]|"")*")(?:,(?:[^,"\n]*|"(?:[^"]|"")*")){4}',
    "SMILES": r"(?:[BCNOPSFIbcnops]|Br|Cl|\[\d?[A-Z][a-z]?@{0,2}H?[+-]?\]|[-=#]|\((?:[CNO]|=O|Cl){1,4}\)|[1-9]){1,40}",
    "molecular formula": r"(?:(?:C|H|N|O|S|Cl|Br)\d{0,2}){1,6}",
    "DNA": r"[ACGT]{10,100}",
    "codons": r"ATG(?:[ACGT]{3}){1,40}(?:TAA|TAG|TGA)",
    "hex colour": r"#(?:[0-9a-fA-F]{3}){1,2}",
    "colour or its name": r"#[0-9a-f]{6}|rgb\(\d{1,3}, ?\d{1,3}, ?\d{1,3}\)|red|green|blue|black|white",
    "IPv4": r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)",
    "IPv6": r"(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "MAC address": r"(?:[0-9A-F]{2}[:-]){5}[0-9A-F]{2}",
    "Roman numeral": r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})",
    "UUID": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": r"[\w.+-]+@[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z]{2,6}",
    "URL": r"https?://(?:[a-z0-9-]{1,20}\.){1,3}[a-z]{2,4}(?:/[\w.~-]*)*(?:\?\w+=\w*(?:&\w+=\w*)*)?",
    "version": r"v?(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)(?:-[0-9A-Za-z.-]+)?",
    "telephone": r"\+\d{1,3}(?: ?\(\d{1,4}\))?(?: ?\d{2,4}){2,4}",
    "price": r"(?:€|\$) ?(?:0|[1-9]\d{0,2}(?:,\d{3})*)(?:\.\d\d)?",
    "number": r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?",
    "integer": r"-?(?:0|[1-9]\d{0,17})",
    "even number of a": r"(?:b*ab*a)*b*",
    "multiple of three": r"(?:[0369]|[147](?:[0369]|[147][0369]*[258])*[258]|[258](?:[0369]|[258][0369]*[147])*[147])+",
    "nested groups": r"((a|(b|(c|(d|(e(f(g)?)?)?)?)?)?)x){2,5}",
    "nested repeats": r"(?:(?:ab?){2,3}c){2,4}",
    "lazy": r"<(?P<tag>[a-z]+?)>.*?</[a-z]+?>",
    "ranges": r"[!-/:-@[-`{-~]{1,8}",
    "negations": r"[^\W\d_]+[^\w\s][^a-zA-Z]{2,}",
    "classes": r"\w+\s\S+\s\d+\D",
    "any two lines": r"(?s:.+)\n(?-s:.+)",
    "lines": r"(?m)(?:^[a-z ]{1,30}$\n?){1,3}",
    "words": r"\b[a-z]+\b(?:[ ,]+\b[a-z]+\b){2,6}\.",
    "anchors": r"^(?:\A[A-Z])?[a-z]{2,8}$",
    "ignoring case": r"(?i)(?:yes|no|maybe|straße|ärger)",
    "verbose": "(?x) \\d{3}  # three digits\n [ ] [A-Z]{2}  # a space and two letters",
    "Greek": r"[α-γ]{1,10}(?: [α-γ]{1,10})*",
    "Russian or Japanese": r"[жя]+|[日本語]{1,6}",
    "dialogue": r"[A-Z]{2,12}:\n(?:[A-Z][^\n.!?]{1,60}[.!?]\n){1,3}",
    "chess moves": r"(?:\d\d?\. (?:[KQRBN]?[a-h]?x?[a-h][1-8]|O-O(?:-O)?)[+#]? [KQRBN]?x?[a-h][1-8][+#]? ?){1,10}",
    "key and value": r"(?:[a-z_]{1,16}=(?:\d+|\"[^\"\n]*\"|true|false)\n){1,8}",
    "up to 200 characters": r".{1,200}",
}  # fmt: skip
# Patterns that are refused, with a part of the message.
HOSTILE_PATTERNS = {
    r"(a|b)*a(a|b){30}": "too much work",
    r"(((a{1,100}){1,100}){1,100})": "more than 12,000 characters",
    r"((a{1,1000}){1,1000}){1,1000}": "more than 12,000 characters",
    r"(.*)*.*a.{20}": "too much work",
    r"(?:a?b?c?d?){300}": "too much work",
    r"(a{0,40}b{0,40}){40}": "too much work",
    r"a{1,65535}": "more than 12,000 characters",
    r"a{99999999999}": "repetition number is too large",
    "(" * 5_000 + ")" * 5_000: "nested more than 50 deep",
    "(?:" * 200 + "a" + ")*" * 200: "nested more than 50 deep",
    "a" * 10_001: "at most 10,000 are supported",
    "|".join(f"word{number}" for number in range(5_000)): "at most 10,000 are supported",
    r"(?:[^,]*,){60}(?:x|[^x]{1,40}){40}": "too much work",
    r"(?:x[日本]|[語-￿]){1,50}(?:\w|\W.){1,50}": "too much work",
    r"(?=a)b": "position 0: look-around is not supported",
    r"ab(?<!a)c": "position 2: look-around is not supported",
    r"(a|b)\1": r"position 5: a back-reference is not supported",
    r"(?P<one>a)(?P=one)": "position 10: a back-reference is not supported",
    r"(a)?(?(1)b|c)": "position 4: a conditional group is not supported",
    r"x(?>ab|a)c": "position 1: an atomic group is not supported",
    r"[+*]+a++b": "position 6: a possessive repeat is not supported",
    r"a(b": "position 1: missing ), unterminated subpattern",
    r"a[z-a]": "position 2: bad character range z-a",
    r"x\q": r"position 1: bad escape \q",
}

# Schemas that are compiled, by names.
SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 40},
            "born": {"type": "string", "format": "date"},
            "height": {"type": "number", "minimum": 0.3, "maximum": 2.8},
            "children": {"type": "integer", "minimum": 0, "maximum": 20},
            "married": {"type": "boolean"},
        },
        "required": ["name", "born", "married"],
    },
    "all optional": {
        "type": "object",
        "properties": {name: {"type": ["integer", "null"]} for name in "abcdefgh"},
    },
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 6},
    "integers of a range": {"type": "array", "items": {"type": "integer", "minimum": -128, "exclusiveMaximum": 1_000}},
    "decimal range": {"type": "number", "exclusiveMinimum": -0.125, "maximum": 99.99},
    "enumeration": {"enum": ["red", "green", "blue", 1, 2.5, None, True, ["a"], {"b": 1}]},
    "constant": {"const": {"version": 1, "text": 'a "quoted" \\ word\n'}},
    "point": {
        "type": "array",
        "prefixItems": [{"type": "number"}, {"type": "number"}, {"type": "string", "maxLength": 3}],
        "items": {"type": "boolean"},
        "minItems": 2,
        "maxItems": 5,
    },
    "tagged union": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}},
             "required": ["kind", "radius"]},
            {"type": "object", "properties": {"kind": {"const": "square"}, "side": {"type": "number"}},
             "required": ["kind", "side"]},
        ],
    },
    "any of types": {"anyOf": [{"type": "string", "pattern": "^[a-z]+$"}, {"type": "integer"}, {"type": "null"}]},
    "formats": {
        "type": "object",
        "properties": {
            name: {"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4")
        },
        "required": ["date", "time", "date-time", "uuid", "ipv4"],
    },
    "addresses": {
        "type": "object",
        "properties": {name: {"type": "string", "format": name} for name in ("email", "uri", "hostname", "ipv6")},
        "required": ["email", "uri", "hostname", "ipv6"],
    },
    "patterns": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}\\d{4}$"},
            "free": {"type": "string", "pattern": "x\"|\\\\", "maxLength": 8},
            "word": {"type": "string", "pattern": "\\bab\\b", "minLength": 4, "maxLength": 12},
        },
        "required": ["code", "free"],
    },
    "other members": {
        "type": "object",
        "properties": {"id": {"type": "integer"}, "ids": {"type": "string", "maxLength": 4}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"size": {"type": "integer", "minimum": 3}}, "required": ["size"]},
            {"properties": {"size": {"maximum": 250}, "note": {"type": "string", "maxLength": 12}}},
        ],
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value"],
            },
        },
    },
    "list of records": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}, "label": {"enum": ["a", "b", "c"]}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
        "minItems": 2,
        "maxItems": 8,
    },
    "nullable object": {
        "type": ["object", "null"],
        "title": "a title",
        "properties": {"é/~ \"": {"type": "string", "minLength": 2}, "日本": {"type": "boolean", "default": True}},
        "required": ["日本"],
    },
    "anything": {},
    "as pydantic writes it": {
        "$defs": {
            "Line": {
                "title": "Line", "type": "object", "required": ["product", "number"],
                "properties": {
                    "product": {"maxLength": 30, "title": "Product", "type": "string"},
                    "number": {"exclusiveMinimum": 0, "maximum": 99, "title": "Number", "type": "integer"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"},
                },
            },
        },
        "title": "Order", "type": "object", "required": ["id", "status", "lines"],
        "properties": {
            "id": {"format": "uuid", "title": "Id", "type": "string"},
            "status": {"enum": ["open", "paid", "sent"], "title": "Status", "type": "string"},
            "lines": {"items": {"$ref": "#/$defs/Line"}, "maxItems": 5, "minItems": 1, "type": "array"},
        },
    },
}  # fmt: skip
# Schemas that are refused, with a part of the message.
HOSTILE_SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "string", "maxLength": 100_000}, "#: it has more than 12,000 characters"),
    ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 900}, "maxItems": 900},
     "more than 12,000 characters"),
    ({"properties": {"a": {"type": "string", "maxLength": 20_000}, "b": {}}}, "#/properties/a: it has more"),
    ({"$defs": {"n": {"properties": {f"p{i}": {"$ref": "#/$defs/n"} for i in range(30)}}}, "$ref": "#/$defs/n"}, "#"),
    ({"$ref": "#"}, "#/$ref: the schema refers to itself"),
    ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
     "refers to itself"),
    ({"$ref": "#/$defs/none"}, "#/$ref: the schema has nothing at #/$defs/none"),
    ({"$ref": "https://example.org/schema.json"}, "#/$ref: only references into the schema"),
    ({"type": "integer", "multipleOf": 3}, "#/multipleOf: multipleOf is not supported"),
    ({"properties": {"a/b": {"not": {"type": "null"}}}}, "#/properties/a~1b/not: not is not supported"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems: uniqueItems is not supported"),
    ({"type": "string", "pattern": "a(?=b)"}, "#/pattern: position 1: look-around"),
    ({"type": "string", "pattern": "(a|b)*a(a|b){30}"}, "#/pattern: position 12: it takes too much work"),
    ({"type": "string", "format": "iri"}, "#/format: the supported formats are"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "#/oneOf: a value may be of alternatives 0 and 1"),
    ({"type": "object", "patternProperties": {"^a": {}}}, "#/patternProperties: patternProperties is not supported"),
    ({"type": "object", "required": ["a"]}, "#/required: a is not among the properties"),
    ({"type": "text"}, "#/type: a type is one or a list of"),
    ({"properties": []}, "#/properties: properties is an object of schemas"),
    ({"type": "string", "minLength": -1}, "#/minLength: minLength is a number that is not negative"),
    ({"minimum": "3"}, "#/minimum: minimum is a number"),
    ({"enum": []}, "#/enum: enum is a list of at least one"),
    ({"propertees": {}}, "#/propertees: propertees is not supported"),
    (3, "#: a schema is an object"),
    ({"allOf": [{}, 1]}, "#/allOf/1: a schema is an object"),
    ({"properties": {"a": {"pattern": []}}}, "#/properties/a/pattern: a pattern is a string"),
]  # fmt: skip


def schema_text(schema: Any) -> str:
    """Return a schema as the value of a form."""
    return json.dumps(schema, ensure_ascii=False)


def steps_and_tables() -> list[str]:
    """Compile every form; return the steps that each took, and the sums of their tables or the errors."""
    found = []
    for name, value in (*PATTERNS.items(), *((pattern, pattern) for pattern in HOSTILE_PATTERNS)):
        found.append(_steps_and_table(name, value, regex_dfa))
    schemas = [*SCHEMAS.items(), *((message, schema) for schema, message in HOSTILE_SCHEMAS)]
    found += [_steps_and_table(name, schema_text(schema), schema_dfa) for name, schema in schemas]
    return found


def _steps_and_table(name: str, value: str, compiled: Callable[[str, Alphabet], Dfa]) -> str:
    budget = Budget()
    try:
        dfa = compiled(value, Alphabet(CHARSET, None, budget))
        outcome = f"{zlib.crc32(dfa.classes.tobytes())} {zlib.crc32(dfa.transitions.tobytes())}"
    except InvalidValue as error:
        outcome = error.message
    return f"{name}: {budget.steps} {outcome}"


def sample(automaton: Automaton, charset: str, random: np.random.Generator, max_chars: int) -> str:
    """Return a text that an automaton accepts, of at most `max_chars` characters: each next one with equal chances.

    It ends where nothing may follow and, with equal chances, where it may end.
    """
    state, text = 0, ""
    while len(text) < max_chars and not automaton.ends(state, max_chars - len(text)):
        chars = np.flatnonzero(automaton.allowed(state, max_chars - len(text)))
        choice = int(random.integers(len(chars) + (automaton.fewest[state] == 0)))
        if choice == len(chars):
            break
        text += charset[chars[choice]]
        state = automaton.next_state(state, int(chars[choice]))
    assert automaton.fewest[state] == 0
    return text


def assert_minimal(automaton: Automaton) -> None:
    """Check that an automaton's states are reachable and useful, and its states and classes all different."""
    transitions, fewest = automaton.transitions, automaton.fewest
    reached, waiting = {0}, [0]
    for state in waiting:
        new = set(transitions[state].tolist()) - reached - {-1}
        reached |= new
        waiting += new
    assert len(reached) == automaton.num_states
    assert fewest.max() < NEVER
    after = np.where(transitions >= 0, fewest[transitions], NEVER - 1).min(axis=1, initial=NEVER - 1)
    assert (fewest[fewest > 0] == after[fewest > 0] + 1).all()
    # Refined from whether a text may end, states are told apart down to the last one.
    blocks = np.unique(fewest == 0, return_inverse=True)[1]
    while True:
        rows = np.column_stack([np.where(transitions >= 0, blocks[transitions], -1), blocks])
        refined = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        if refined.max() == blocks.max():
            break
        blocks = refined
    assert blocks.max() + 1 == automaton.num_states
    assert len(np.unique(transitions, axis=1).T) == transitions.shape[1]
    assert set(automaton.classes.tolist()) == set(range(transitions.shape[1]))
    assert not automaton.stop_chars.any()
    assert not automaton.withheld.any()
