"""The buttons below a text: the words that the API suggests, which a click types."""

from __future__ import annotations

from playwright.sync_api import expect

from service.client import Client
from tests.harness.browser import OpenPage
from tests.harness.screen import Screen, comes_to, stored

BUTTONS = ".column.active .suggestions button"
BEGINNING = "JULIET:\nO Romeo, Romeo! wherefore art th"


def shown(screen: Screen) -> list[str]:
    """The suggestions that can be clicked."""
    found: list[str] = screen.page.eval_on_selector_all(f"{BUTTONS}:enabled", "all => all.map(one => one.innerText)")
    return found


def suggested(client: Client, text: str) -> list[str]:
    """What the buttons say: the rest of a word after an ellipsis, or words."""
    before = "\u2026" if text[-1].isalpha() else ""
    return [before + one.text.replace("\n", "\u23ce").strip() for one in client.create(text).suggest(5).texts]


def test_suggestions__are_the_likeliest_words_and_are_typed_by_a_click(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    assert shown(screen) == []
    screen.type(BEGINNING)
    comes_to(lambda: shown(screen), suggested(client, BEGINNING))
    first = screen.page.locator(BUTTONS).first
    assert first.inner_text() == "\u2026ou"
    assert first.get_attribute("aria-label") == "Type: ou"
    first.click()
    screen.shows(BEGINNING + "ou ")
    expect(screen.page.locator(".column.active textarea")).to_be_focused()
    comes_to(lambda: shown(screen), suggested(client, BEGINNING + "ou "))
    screen.type("Romeo?")
    comes_to(lambda: shown(screen), suggested(client, BEGINNING + "ou Romeo?"))
    assert stored(client, screen) == BEGINNING + "ou Romeo?"
    screen.page.keyboard.press("Tab")
    expect(screen.page.locator(BUTTONS).first).to_be_focused()
    text = BEGINNING + "ou Romeo?" + client.create(BEGINNING + "ou Romeo?").suggest(1).texts[0].text + " "
    screen.page.keyboard.press("Enter")
    screen.shows(text)


def test_suggestions__of_an_earlier_text_are_not_typed(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type(BEGINNING)
    comes_to(lambda: shown(screen), suggested(client, BEGINNING))
    screen.page.route("**/suggest", lambda _: None)
    with screen.page.expect_request("**/suggest"):
        screen.type("i")
    expect(screen.page.locator(f"{BUTTONS}:enabled")).to_have_count(0)
    screen.type("s")
    screen.page.unroute("**/suggest")  # the page has given up the held request by now
    comes_to(lambda: shown(screen), suggested(client, BEGINNING + "is"))
    screen.generate(seed=7, max_tokens=20)
    assert shown(screen) == []


def test_suggestions__that_fail_leave_the_text_alone(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.page.route("**/suggest", lambda route: route.fulfill(status=400, json={"error": {"message": "no"}}))
    with screen.page.expect_response("**/suggest"):
        screen.type(BEGINNING)
    assert stored(client, screen) == BEGINNING
    assert shown(screen) == []
    expect(screen.page.locator("#trouble")).to_have_text("")
