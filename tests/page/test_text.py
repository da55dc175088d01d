"""A text on the page is a session: the same characters as the API's, whatever is done to it."""

from __future__ import annotations

from playwright.sync_api import expect

from service.client import Client
from tests.harness.browser import OpenPage
from tests.harness.line import SLOW, line_to
from tests.harness.screen import continued, stored
from tests.harness.server import Server


def test_continuing_going_back_and_branching_give_the_apis_texts(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.go_on(seed=7, max_tokens=300)
        whole = continued(client, "ROMEO:", 300, 7)
        screen.shows(whole)

        screen.set(seed=8, max_tokens=5000)
        screen.page.click("#go")
        screen.wait_for_length(400, ">=")
        screen.page.click("#go")  # Stop
        screen.wait_until_still()
        stopped = screen.text
        assert stopped == continued(client, whole, 5000, 8)[: len(stopped)]
        assert len(stopped) < 2000

        screen.click_char(40)
        screen.page.click(".column.active .rewind")
        screen.shows(whole[:41])
        screen.go_on(seed=9, max_tokens=100, temperature=0.7, top_k=20, top_p=0.95)
        went_back = continued(client, whole[:41], 100, 9, temperature=0.7, top_k=20, top_p=0.95)
        screen.shows(went_back)
        assert stored(client, screen) == went_back

        screen.click_char(59)
        screen.page.click(".column.active .fork")
        expect(screen.page.locator(".column")).to_have_count(2)
        screen.shows(went_back[:60])
        expect(screen.page.locator(".column.active h3")).to_contain_text("parted at 60")
        screen.type("\nJULIET:\n")
        screen.go_on(seed=10, max_tokens=100, temperature=1, top_k=0, top_p=1)
        branch = continued(client, went_back[:60] + "\nJULIET:\n", 100, 10)
        screen.shows(branch)
        assert stored(client, screen) == screen.text
        screen.page.locator(".column").first.locator("textarea").focus()
        screen.go_on(seed=11)
        screen.shows_texts([continued(client, went_back, 100, 11), branch])


def test_without_a_seed_a_branch_goes_on_as_its_origin_would(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("JULIET:")
    screen.go_on(max_tokens=100)
    screen.click_char(30)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.go_on(max_tokens=76)
    first, second = screen.texts
    assert first == second
    assert len(first) == 107
    assert stored(client, screen) == second


def test_typing_is_sent_in_order_and_erasing_takes_back(open_page: OpenPage, client: Client) -> None:
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
    screen.go_on(max_tokens=50, seed=3)
    screen.shows(continued(client, expected, 50, 3))
    assert stored(client, screen) == screen.text


def test_what_the_model_does_not_know_is_shown_and_not_sent(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("Stra")
    screen.page.keyboard.insert_text("ße 5")
    screen.shows("Stra")
    expect(screen.page.locator(".column.active mark")).to_have_text("ße 5")
    expect(screen.page.locator(".unknown")).to_contain_text("shakespeare@1 doesn't know ß (U+00DF)")
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_contain_text("Remove ß (U+00DF) first")
    assert stored(client, screen) == "Stra"
    for _ in range(4):
        screen.page.locator(".column.active textarea").press("Backspace")
    expect(screen.page.locator(".unknown")).to_have_text("")
    screen.type("w")
    screen.go_on(max_tokens=10, seed=1)
    screen.shows(continued(client, "Straw", 10, 1))


def test_what_the_server_refuses_is_said_and_costs_nothing(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.set(max_tokens=65_536, seed=1)
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_contain_text("max_tokens")
    screen.shows("ROMEO:")
    screen.go_on(max_tokens=10)
    assert len(screen.text) == 16


def test_a_text_can_be_forgotten_and_a_new_one_begun(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("one")
    screen.page.click("#new")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.type("two")
    screen.shows_texts(["one", "two"])
    screen.go_on(max_tokens=1)
    first = screen.page.locator(".column").first
    first.locator(".close").click()
    expect(screen.page.locator(".column")).to_have_count(1)
    assert screen.text.startswith("two")
    screen.page.click(".column .close")
    screen.wait_for_length(0)
    screen.shows_texts([""])
    screen.type("three")
    screen.go_on(max_tokens=5, seed=1)
    screen.shows(continued(client, "three", 5, 1))
    assert stored(client, screen) == screen.text
