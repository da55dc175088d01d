from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pydantic import TypeAdapter

from service.engine.automaton import budget, compiler
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import FormCache, compile_form
from service.engine.automaton.form import Form
from service.engine.turns import Turns
from service.errors import InvalidValue, Overloaded, UnknownCharacters
from service.shares import work_for
from tests.harness.wait import wait_until

CHARSET = "abc 0123456789"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The values of the forms that are compiled, each time that one is."""
    values: list[str] = []
    compiled = compiler._compiled

    def counted(form: Form, charset: str, allowed: tuple[int, ...] | None) -> Automaton:
        values.append(form.value)
        return compiled(form, charset, allowed)

    monkeypatch.setattr(compiler, "_compiled", counted)
    return values


def test_form__survives_json() -> None:
    adapter = TypeAdapter(Form)
    form = Form("choice", '["a"]')
    assert adapter.validate_json(adapter.dump_json(form)) == form
    with pytest.raises(ValueError, match="kind"):
        adapter.validate_python({"kind": "grammar", "value": ""})


def test_cache__compiles_a_form_once_for_many_threads(compilations: list[str]) -> None:
    cache = FormCache()
    barrier = threading.Barrier(8)

    def get(number: int) -> Automaton:
        barrier.wait(60)
        return cache.get(Form("regex", r"(?:\d{1,20} ){1,20}" + "abcd"[number % 4]), CHARSET + "d")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(get, range(8)))
    assert len(compilations) == 4
    assert all(found[number] is found[number + 4] for number in range(4))
    assert len(set(map(id, found))) == 4


def test_cache__remembers_errors_and_raises_a_new_one_each_time(compilations: list[str]) -> None:
    cache = FormCache()
    for form, kind in ((Form("regex", "(a|b)*a(a|b){30}"), InvalidValue), (Form("choice", '["x"]'), UnknownCharacters)):
        errors = []
        for _ in range(3):
            with pytest.raises(InvalidValue) as raised:
                cache.get(form, CHARSET)
            errors.append(raised.value)
        assert {type(error) for error in errors} == {kind}
        assert len({id(error) for error in errors}) == 3
        assert len({str(error) for error in errors}) == 1
        # An error that is raised repeatedly would grow, and keep what its frames hold alive.
        assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1
        assert all(error.__context__ is None for error in errors)
    assert len(compilations) == 2


def test_cache__distinguishes_charsets_and_allowed_ids(compilations: list[str]) -> None:
    cache = FormCache()
    form = Form("regex", "[a-c]+")
    whole, other, part = cache.get(form, CHARSET), cache.get(form, "cb"), cache.get(form, CHARSET, (0, 1, 3))
    assert len(compilations) == 3
    assert len({id(one) for one in (whole, other, part)}) == 3
    assert (len(whole.classes), len(other.classes)) == (14, 2)
    assert np.flatnonzero(part.allowed(0, 5)).tolist() == [0, 1]
    assert cache.get(form, "".join(["abc ", "0123456789"]), (0, 1, 3)) is part


def test_cache__discards_the_least_recently_used(compilations: list[str]) -> None:
    one_size = FormCache()
    one_size.get(Form("regex", "a{400}"), CHARSET)
    cache = FormCache(max_bytes=3 * one_size.num_bytes + 200)
    forms = [Form("regex", f"a{{40{number}}}") for number in range(4)]
    for form in (*forms[:3], forms[0], forms[3]):
        cache.get(form, CHARSET)
    assert cache.num_bytes <= 3 * one_size.num_bytes + 200
    compilations.clear()
    for form in (forms[0], forms[2], forms[3]):
        cache.get(form, CHARSET)
    assert not compilations
    cache.get(forms[1], CHARSET)
    assert compilations == [forms[1].value]
    # A form that is larger than the cache is compiled, and makes room for the next one.
    small = FormCache(max_bytes=100)
    for number in range(20):
        with pytest.raises(InvalidValue):
            small.get(Form("regex", f"({number}"), CHARSET)
    assert small.num_bytes < 3_000


def test_compilation__pauses_for_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each thread that waits for the interpreter waits for 5 ms, every time that it has read or written."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(InvalidValue, match="too much work"):
        FormCache().get(Form("regex", "(a|b)*a(a|b){30}"), CHARSET)
    assert 20 <= len(pauses) <= budget.MAX_STEPS // 10_000
    assert sum(pauses) < 0.05


def test_automaton__can_not_be_changed() -> None:
    """Rows of many requests share it."""
    automaton = compile_form(Form("regex", "a+"), CHARSET)
    for table in (automaton.classes, automaton.transitions, automaton.fewest, automaton.stop_chars, automaton.withheld):
        with pytest.raises(ValueError, match="read-only"):
            table[...] = 0
    assert {table.dtype for table in (automaton.classes, automaton.transitions, automaton.fewest)} == {np.dtype("i4")}


def test_pattern__is_intersected_with_the_charset_and_allowed_ids() -> None:
    form = Form("regex", "[a-cé]{2}|x+")
    assert compile_form(form, CHARSET).fewest[0] == 2
    with pytest.raises(UnknownCharacters, match=r"lacks 'x' \(U\+0078\)$"):
        compile_form(Form("regex", "x+a"), CHARSET)
    with pytest.raises(UnknownCharacters, match=r"lacks 'x' \(U\+0078\), 'y'"):
        compile_form(Form("regex", "(?i)x[yz]"), CHARSET)
    with pytest.raises(UnknownCharacters, match=r"lacks 'α' \(U\+03B1\)$"):
        compile_form(Form("regex", "a[α-γ]{2}"), CHARSET)
    with pytest.raises(UnknownCharacters, match=r"lacks U\+D800$"):
        compile_form(Form("regex", r"[\ud800-\udfff]|\ud800"), CHARSET)
    for pattern in ("a^b", r"[^\s\S]", "ax^b", "a[α-γ]^b"):
        with pytest.raises(InvalidValue, match=r"^no text has this form$"):
            compile_form(Form("regex", pattern), CHARSET)


def test_cache__compiles_new_forms_in_turns_between_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many forms one client sends, another waits for the one in progress only; and each has a limit."""
    begun, allowed, done = threading.Event(), threading.Event(), list[str]()
    compiled = compiler._compiled

    def held_up(form: Form, charset: str, ids: tuple[int, ...] | None) -> Automaton:
        begun.set()
        assert allowed.wait(60)
        done.append(form.value)
        return compiled(form, charset, ids)

    monkeypatch.setattr(compiler, "_compiled", held_up)
    turns = Turns(6, 20.0, "too many forms")
    monkeypatch.setattr("service.engine.automaton.automaton_cache._turns", turns)
    caches = FormCache(), FormCache()

    def get(client: str, value: str) -> int:
        work_for(client)
        return int(caches[value == "b"].get(Form("regex", value), CHARSET).fewest[0])

    with ThreadPoolExecutor(20) as pool:
        wanted = [pool.submit(get, "greedy", "a" * number) for number in range(1, 7)]
        assert begun.wait(20)
        wait_until(lambda: turns.num_waiting == 6)
        wanted.append(pool.submit(get, "greedy", "aaa"))  # waits already
        wanted.append(pool.submit(get, "other", "b"))
        wait_until(lambda: turns.num_waiting == 8)
        with pytest.raises(Overloaded, match="too many forms"):
            pool.submit(get, "greedy", "c").result(60)
        allowed.set()
        assert [future.result(60) for future in wanted] == [1, 2, 3, 4, 5, 6, 3, 1]
    assert done.index("b") == 1
    assert len(done) == 7


@pytest.mark.parametrize(
    ("form", "lacking"),
    [
        (Form("regex", "a"), ": they lack 'a' (U+0061)"),
        (Form("regex", "."), ""),
        (Form("regex", "a|é"), ": they lack 'a' (U+0061), 'é' (U+00E9)"),
        (Form("choice", '["b", "é"]'), ": they lack 'b' (U+0062), 'é' (U+00E9)"),
        (Form("json", "{}"), ": they lack "),
        (Form("json_object", ""), ": they lack "),
    ],
)
def test_allowed_ids__that_leave_no_text_are_what_is_refused(form: Form, lacking: str) -> None:
    with pytest.raises(InvalidValue) as raised:
        compile_form(form, CHARSET + '{}":,[]truefalsn', ())
    assert raised.value.param == "allowed_token_ids"
    expected = f"allowed_token_ids: no text of the form consists of these characters alone{lacking}"
    assert raised.value.message.startswith(expected)
    with pytest.raises(InvalidValue) as raised:  # without any text in the whole charset, the form is
        compile_form(Form("regex", "é+"), CHARSET, (1, 2))
    assert (raised.value.param, raised.value.code) == (None, "unknown_characters")
