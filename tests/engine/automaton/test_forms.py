"""The forms of the harness: what is compiled gives only texts of the form, and what is refused is refused in bounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc

import jsonschema
import numpy as np
import pytest

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.budget import MAX_TABLE_BYTES
from service.engine.automaton.compiler import FormCache, compile_form
from service.engine.automaton.form import Form
from service.errors import InvalidValue
from tests.harness.forms import (
    CHARSET,
    HOSTILE_PATTERNS,
    HOSTILE_SCHEMAS,
    PATTERNS,
    SCHEMAS,
    assert_minimal,
    sample,
    schema_text,
)

LENGTHS = (0, 0, 1, 2, 5, 10, 20, 40, 80, 150, 300, 600)  # characters beyond the fewest


def samples(automaton: Automaton, seed: int = 0) -> list[str]:
    """Draw texts of an automaton: of several lengths, down to the fewest that suffice."""
    random = np.random.default_rng(seed)
    fewest = int(automaton.fewest[0])
    texts = [sample(automaton, CHARSET, random, fewest + more) for more in LENGTHS]
    assert all(len(text) <= fewest + more for text, more in zip(texts, LENGTHS, strict=True))
    assert len(texts[0]) == fewest
    return texts


def test_forms__are_fifty_patterns_and_twenty_schemas() -> None:
    assert len(PATTERNS) == len(set(PATTERNS.values())) == 50
    assert len(SCHEMAS) == 20


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern__gives_only_texts_that_match(name: str) -> None:
    automaton = compile_form(Form("regex", PATTERNS[name]), CHARSET)
    assert_minimal(automaton)
    for text in samples(automaton):
        assert re.fullmatch(PATTERNS[name], text), text


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema__gives_only_texts_that_validate(name: str) -> None:
    automaton = compile_form(Form("json", schema_text(SCHEMAS[name])), CHARSET)
    assert_minimal(automaton)
    validator = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for text in samples(automaton):
        validator.validate(json.loads(text))


def test_json_object__gives_only_objects() -> None:
    automaton = compile_form(Form("json_object", ""), CHARSET)
    assert_minimal(automaton)
    for text in samples(automaton):
        assert isinstance(json.loads(text), dict)
    for text in ("{}", '{"a": 1,"b": [{"c": {"d": [true, null,"e\\n"]}}]}', '{"日本":-0.5}'):
        assert accepts(automaton, text), text
    for text in ("", "[]", "1", '{"a": 1,}', '{"a":  1}', '{"a": 01}', '{"a": 1.0}', '{"a": 1e5}', '{"a": "\n"}'):
        assert not accepts(automaton, text), text


def accepts(automaton: Automaton, text: str) -> bool:
    """Whether an automaton over CHARSET accepts a text."""
    state = automaton.walk(0, map(CHARSET.index, text))
    return state >= 0 and automaton.fewest[state] == 0


def hostile_forms() -> list[tuple[Form, str]]:
    """The forms that are refused, with parts of the messages."""
    patterns = [(Form("regex", pattern), message) for pattern, message in HOSTILE_PATTERNS.items()]
    return patterns + [(Form("json", schema_text(schema)), message) for schema, message in HOSTILE_SCHEMAS]


@pytest.mark.parametrize(("form", "message"), hostile_forms(), ids=range(len(hostile_forms())))
@pytest.mark.parametrize("charset", [CHARSET, "".join(map(chr, range(32, 50_000)))], ids=["small", "large"])
def test_hostile_form__is_refused_with_its_place_and_in_bounded_memory(form: Form, message: str, charset: str) -> None:
    """Memory is measured with the large charset only, which takes more of it: to measure is slow."""
    most = 0
    if charset != CHARSET:
        tracemalloc.start()
    try:
        with pytest.raises(InvalidValue) as error:
            FormCache().get(form, charset)
        if tracemalloc.is_tracing():
            most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in error.value.message
    assert error.value.param is None
    assert len(error.value.message) < 500
    assert most < 100 * 2**20


def test_forms__take_the_same_steps_and_tables_in_every_process() -> None:
    """Which forms are refused depends on counted steps: not on the machine, its load, or the order of sets."""
    script = "from tests.harness.forms import steps_and_tables; print(*steps_and_tables())"
    found = []
    for seed in ("1", "2"):
        variables = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(found[0]) > 70


@pytest.mark.parametrize(
    "value",
    [
        "",
        "{",
        "[" * 70 + "]" * 70,
        '{"minimum": NaN}',
        '{"minimum": 1e999999999}',
        '{"a": ' + "9" * 5_000 + "}",
        "x" * 70_000,
    ],
)
def test_schema__that_is_no_json_is_refused_with_its_place(value: str) -> None:
    with pytest.raises(
        InvalidValue, match=r"^(character \d+ of the schema: |the number (9+|1e9+)|NaN in|the schema has 70,000)"
    ):
        compile_form(Form("json", value), CHARSET)


def test_tables__have_a_limit() -> None:
    charset = "".join(map(chr, range(0x4E00, 0x4E00 + 5_000)))
    choices = [charset[index : index + 3] for index in range(4_000)]
    with pytest.raises(InvalidValue, match=f"more than {MAX_TABLE_BYTES // 2**20} MiB"):
        compile_form(Form("choice", json.dumps(choices)), charset)
