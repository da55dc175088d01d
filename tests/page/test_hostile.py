"""Hostile text (markup, right-to-left scripts, combining marks) is shown as plain text and never executed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.models import publish_pairs
from tests.harness.server import SERVE, Server, serving

# Markup, entities, Hebrew with vowel points, Arabic, letters with combining marks for which no composed letter exists,
# composed letters, characters beyond U+FFFF, and control characters that change the direction of text.
LINES = [
    "<script>alert(1)</script> & <img src=x onerror=alert(2)>",
    "&lt;b&gt; &amp; \"'`javascript:alert(3)",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0645\u0631\u062d\u0628\u0627 hello",
    "q\u0307x\u0323\u0304 m\u0302 \u00e9t\u00e9 \U0001f600\U0001d538 \u202eabc\u202c </textarea></div>",
]
CORPUS = "\n".join(LINES) + "\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model that writes the pairs of characters of these lines."""
    charset = "".join(sorted(set(CORPUS)))
    counts = np.zeros((len(charset), len(charset)))
    for before, after in pairwise(CORPUS):
        counts[charset.index(before), charset.index(after)] += 1
    store = ModelStore(tmp_path_factory.mktemp("hostile"))
    publish_pairs(store, "hostile", charset, np.log(counts + 1e-9))
    settings = {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "hostile"}
    with serving(SERVE, ENVIRONMENT | settings) as server:
        yield server


def test_hostile_text__is_shown_as_plain_text(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    for line in LINES:
        screen.page.keyboard.insert_text(line)
        screen.page.keyboard.press("Enter")
    screen.shows(CORPUS)
    screen.generate(max_tokens=1500, temperature=0.8, seed=3)
    session = client.create(CORPUS)
    whole = CORPUS + "".join(session.generate(1500, temperature=0.8, seed=3))
    screen.shows(whole)
    generated = whole[len(CORPUS) :]
    # The model generates each kind of hostile text.
    assert any(tag in generated for tag in ("<script", "<img", "</"))
    assert any("\u0590" <= char <= "\u06ff" for char in generated)
    assert any("\u0300" <= char <= "\u036f" for char in generated)

    # The cursor can be on any character and a branch can begin after it, also if it joins with the character before it.
    mark = CORPUS.index("\u0307")
    screen.page.locator(".column.active textarea").press("Home")
    for _ in range(mark):
        screen.page.click("#forward")
    expect(screen.page.locator("#char-label")).to_contain_text("\u25cc\u0307 (U+0307)")
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.shows(CORPUS[: mark + 1])
    screen.generate(max_tokens=50, temperature=1, seed=4)
    session = client.create(CORPUS[: mark + 1])
    screen.shows(CORPUS[: mark + 1] + "".join(session.generate(50, seed=4)))
    screen.page.check("#colouring [value=surprise]")
    screen.wait_for("() => [...CSS.highlights.values()].some(highlight => highlight.size)")

    content = screen.page.evaluate("() => document.querySelectorAll('.text script, .text img, .text b').length")
    assert content == 0
    assert screen.page.locator("h3", has_text="Branch at").count() == 1
    assert screen.refusals == []  # `open_page` checks the problems: errors, dialogs, other hosts, policy violations


def test_file_name__with_markup_is_shown_as_plain_text(open_page: OpenPage, tmp_path: Path) -> None:
    screen = open_page()
    path = tmp_path / "<img src=x onerror=alert(1)>.json"
    path.write_text("no state")
    screen.page.set_input_files("#file", path)
    expect(screen.page.locator("#trouble")).to_contain_text(path.name)
    assert screen.page.locator("#trouble img").count() == 0


def test_typing__composes_a_letter_with_its_mark_as_the_service_does(open_page: OpenPage, client: Client) -> None:
    """The model knows \u00e9 as one character, and q with a dot above as two."""
    screen = open_page()
    screen.page.keyboard.insert_text("t\u00e9 t")
    screen.page.keyboard.insert_text("q")
    screen.page.keyboard.insert_text("\u0307")
    screen.shows("t\u00e9 tq\u0307")
    screen.generate(max_tokens=30, seed=4)
    session = client.create("t\u00e9 tq\u0307")
    screen.shows("t\u00e9 tq\u0307" + "".join(session.generate(30, seed=4)))
    assert client.open(screen.session_id).text() == screen.text


def test_screen__records_errors_dialogs_and_policy_violations(open_page: OpenPage) -> None:
    """`open_page` fails a test whose page has such problems. This test shows that it would notice them."""
    screen = open_page()
    screen.page.evaluate("() => { setTimeout(() => { throw new Error('thrown') }); alert('shown') }")
    with screen.page.expect_console_message(lambda message: "policy: img-src" in message.text):
        screen.page.evaluate("() => { new Image().src = 'http://127.0.0.1:9/image.png' }")
    with screen.page.expect_console_message(lambda message: "policy: connect-src" in message.text):
        screen.page.evaluate("() => void fetch('http://127.0.0.1:9/').catch(() => null)")
    problems = "\n".join(screen.problems)
    for problem in ("error: thrown", "dialog: shown", "policy: img-src", "policy: connect-src"):
        assert problem in problems
    screen.problems.clear()
