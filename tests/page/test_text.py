"""A text on the page is a session of the API, and has the same characters as the API gives for the same operations."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from service.client import Client, ServerError
from tests.harness.browser import OpenPage
from tests.harness.line import SLOW, line_to
from tests.harness.screen import continued, stored
from tests.harness.server import Server


def test_text__after_stop_rewind_and_fork_equals_the_text_of_the_api(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.generate(seed=7, max_tokens=300)
        whole = continued(client, "ROMEO:", 300, 7)
        screen.shows(whole)

        screen.set(seed=8, max_tokens=5000)
        screen.page.click("#go")
        screen.wait_for_length(400, ">=")
        screen.page.click("#go")  # Stop
        screen.wait_until_idle()
        stopped = screen.text
        assert stopped == continued(client, whole, 5000, 8)[: len(stopped)]
        assert len(stopped) < 2000

        screen.click_char(40)
        screen.page.click(".column.active .rewind")
        screen.shows(whole[:41])
        screen.generate(seed=9, max_tokens=100, temperature=0.7, top_k=20, top_p=0.95)
        rewound = continued(client, whole[:41], 100, 9, temperature=0.7, top_k=20, top_p=0.95)
        screen.shows(rewound)
        assert stored(client, screen) == rewound

        screen.click_char(59)
        screen.page.click(".column.active .fork")
        expect(screen.page.locator(".column")).to_have_count(2)
        screen.shows(rewound[:60])
        expect(screen.page.locator(".column.active h3")).to_contain_text("Branch at 60")
        screen.type("\nJULIET:\n")
        screen.generate(seed=10, max_tokens=100, temperature=1, top_k=0, top_p=1)
        branch = continued(client, rewound[:60] + "\nJULIET:\n", 100, 10)
        screen.shows(branch)
        assert stored(client, screen) == screen.text
        screen.page.locator(".column").first.locator("textarea").focus()
        screen.generate(seed=11)
        screen.shows_texts([continued(client, rewound, 100, 11), branch])


def test_fork__without_a_seed_generates_the_same_as_its_origin(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("JULIET:")
    screen.generate(max_tokens=100)
    screen.click_char(30)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.generate(max_tokens=76)
    first, second = screen.texts
    assert first == second
    assert len(first) == 107
    assert stored(client, screen) == second


def test_typing__arrives_in_order_and_backspace_rewinds(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    typed = "What's here? A cup, closed in my true love's hand?\n"
    screen.type(typed)
    for _ in range(6):
        screen.page.keyboard.press("Backspace")
    screen.type("palm?\nO churl! ")
    expected = typed[:-6] + "palm?\nO churl! "
    screen.shows(expected)
    screen.page.keyboard.insert_text("pasted: drunk all,\nand left no friendly drop")
    expected += "pasted: drunk all,\nand left no friendly drop"
    screen.wait_for_length(len(expected))
    screen.generate(max_tokens=50, seed=3)
    screen.shows(continued(client, expected, 50, 3))
    assert stored(client, screen) == screen.text


def test_unknown_character__is_shown_but_not_sent(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("Stra")
    screen.page.keyboard.insert_text("ße 5")
    screen.shows("Stra")
    expect(screen.page.locator(".column.active mark")).to_have_text("ße 5")
    expect(screen.page.locator(".unknown")).to_contain_text("shakespeare@2 doesn't know ß (U+00DF)")
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_contain_text("delete ß (U+00DF) and 5 (U+0035) first")
    assert stored(client, screen) == "Stra"
    for _ in range(4):
        screen.page.locator(".column.active textarea").press("Backspace")
    expect(screen.page.locator(".unknown p")).to_have_text("")
    expect(screen.page.locator("#trouble")).to_have_text("")  # nothing has to be deleted any more
    screen.type("w")
    screen.generate(max_tokens=10, seed=1)
    screen.shows(continued(client, "Straw", 10, 1))


def test_refusal__is_shown_and_leaves_the_text_unchanged(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.page.evaluate("() => document.querySelector('[name=max_tokens]').removeAttribute('max')")
    screen.set(max_tokens=65_536, seed=1)
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_contain_text("max_tokens")
    screen.shows("ROMEO:")
    screen.generate(max_tokens=10)
    assert len(screen.text) == 16


def test_close__deletes_a_text_and_leaves_an_empty_one(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("one")
    session_id = screen.session_id
    client.open(session_id)  # raises if the session does not exist
    screen.page.click("#new")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.type("two")
    screen.shows_texts(["one", "two"])
    screen.generate(max_tokens=1)
    first = screen.page.locator(".column").first
    with screen.page.expect_response(lambda response: response.request.method == "DELETE"):
        first.locator(".close").click()
    expect(screen.page.locator(".column")).to_have_count(1)
    with pytest.raises(ServerError, match="session_not_found"):
        client.open(session_id)
    assert screen.text.startswith("two")
    screen.page.click(".column .close")
    screen.wait_for_length(0)
    screen.shows_texts([""])
    screen.type("three")
    screen.generate(max_tokens=5, seed=1)
    screen.shows(continued(client, "three", 5, 1))
    assert stored(client, screen) == screen.text
