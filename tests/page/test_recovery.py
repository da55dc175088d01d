"""What fails between a page and its server costs a pause, and no character."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import expect

from service.client import Client
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.line import SLOW, line_to
from tests.harness.screen import continued, stored
from tests.harness.server import KEYS, SERVE, Server, serving


def test_a_cut_and_a_reload_in_mid_stream_lose_and_double_nothing(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.set(seed=7, max_tokens=1500)
        screen.page.click("#go")
        screen.wait_for_length(100, ">=")
        line.cut()
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        cut_at = len(screen.text)
        line.mend()
        screen.wait_for_length(cut_at + 100, ">=")
        expect(screen.page.locator("#trouble")).to_have_text("")
        screen.page.reload()
        screen.is_ready()
        reloaded_at = len(screen.text)
        assert cut_at < reloaded_at < 1506
        expect(screen.page.locator("#go")).to_have_text("Stop")
        screen.wait_for_length(1506)
        screen.wait_until_still()
        screen.shows(continued(client, "ROMEO:", 1500, 7))
        assert stored(client, screen) == screen.text


def test_a_reload_while_a_stream_is_being_taken_up_goes_on_too(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.set(seed=7, max_tokens=1000)
        screen.page.click("#go")
        screen.wait_for_length(100, ">=")
        line.cut()
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        line.mend()
        screen.page.reload()
        screen.is_ready()
        screen.wait_for_length(1006)
        screen.wait_until_still()
        screen.shows(continued(client, "ROMEO:", 1000, 7))
        assert stored(client, screen) == screen.text


def test_what_is_typed_erased_and_reloaded_while_the_line_is_cut_arrives(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port) as line:
        screen = open_page(line.url)
        screen.type("What's in a name? ")
        screen.go_on(max_tokens=20, seed=1)
        line.cut()
        screen.page.locator(".column textarea").press("Backspace")
        screen.type("that which we call a rose")
        typed = screen.text
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        # The tab keeps what the server has not got, and gives it after a reload.
        assert screen.session_id
        line.mend()
        screen.page.reload()
        screen.is_ready()
        screen.shows(typed)
        screen.go_on(max_tokens=30, seed=2)
        screen.shows(continued(client, typed, 30, 2))
        assert stored(client, screen) == screen.text


def test_several_texts_come_back_and_the_one_that_was_active_is(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.go_on(max_tokens=50, seed=1)
    screen.click_char(20)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.type(" no")
    screen.page.locator(".column").first.locator("textarea").focus()
    texts, names = screen.texts, screen.page.locator(".column h3").all_inner_texts()
    assert screen.session_id
    screen.page.reload()
    screen.is_ready()
    screen.shows_texts(texts)
    assert screen.page.locator(".column h3").all_inner_texts() == names
    screen.shows(texts[0])


def test_a_server_that_forgot_the_text_reads_it_again(open_page: OpenPage) -> None:
    """Sessions in memory end with their server; the page has the text, and the seed."""
    with serving(SERVE, ENVIRONMENT) as first, line_to(first.port) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.go_on(max_tokens=100, seed=5)
        before = screen.text
        with serving(SERVE, ENVIRONMENT) as second, Client(f"http://127.0.0.1:{second.port}") as client:
            line.server_port_behind = second.port
            screen.type("And ")
            expect(screen.page.locator("#trouble")).to_contain_text("reads it again")
            screen.go_on(max_tokens=50, seed=6)
            screen.shows(continued(client, before + "And ", 50, 6))
            assert stored(client, screen) == screen.text


def test_a_saved_state_goes_on_on_another_server(open_page: OpenPage, tmp_path: Path) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.go_on(max_tokens=100, seed=5)
    before = screen.text
    with screen.page.expect_download() as download:
        screen.page.click("#save")
    assert download.value.suggested_filename == "shakespeare-106.json"
    download.value.save_as(tmp_path / "state.json")
    screen.go_on(max_tokens=50, seed=6)
    with serving(SERVE, ENVIRONMENT | KEYS) as other:
        there = open_page(f"http://127.0.0.1:{other.port}")
        there.page.set_input_files("#file", tmp_path / "state.json")
        expect(there.page.locator(".column")).to_have_count(2)
        expect(there.page.locator(".column.active .past")).to_have_text(before)
        there.go_on(max_tokens=50, seed=6)
        assert before + there.text == screen.text
        # Its states are known too, from the saved one on.
        there.click_char(10)
        expect(there.page.locator(".column.active .place p")).to_contain_text("117 of 156")
        there.wait_for_units()
        expect(there.page.locator("#bars li").first).to_be_visible()


def test_what_is_no_saved_state_is_refused(open_page: OpenPage, tmp_path: Path) -> None:
    screen = open_page()
    wrong = {
        "text.json": "ROMEO:",
        "other.json": '{"format": "something else"}',
        "list.json": "[1]",
        "null.json": "null",
        "damaged.json": '{"format": "gru-serve state 1", "model": "shakespeare@1", "state": "AAAA", "text": "x"}',
    }
    for name, content in wrong.items():
        (tmp_path / name).write_text(content)
        screen.page.set_input_files("#file", tmp_path / name)
        said = "is not a state that was saved here" if name != "damaged.json" else "state"
        expect(screen.page.locator("#trouble")).to_contain_text(said)
        screen.page.evaluate("document.querySelector('#trouble').textContent = ''")
    (tmp_path / "large.json").write_bytes(b" " * (5 * 1024 * 1024))
    screen.page.set_input_files("#file", tmp_path / "large.json")
    expect(screen.page.locator("#trouble")).to_contain_text("too large")
    expect(screen.page.locator(".column")).to_have_count(1)
