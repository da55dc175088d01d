"""Failures between the page and its server, and reloads, cost a pause but no character."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from service.client import Client
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.line import SLOW, line_to
from tests.harness.screen import comes_to, continued, stored
from tests.harness.server import KEYS, SERVE, Server, serving


def test_stream__resumes_after_a_broken_connection_and_a_reload(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.set(seed=7, max_tokens=6000)  # more than is sent until the check below
        screen.page.click("#go")
        screen.wait_for_length(100, ">=")
        line.interrupt()
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        length_at_break = len(screen.text)
        line.restore()
        screen.wait_for_length(length_at_break + 100, ">=")
        expect(screen.page.locator("#trouble")).to_have_text("")
        screen.page.reload()
        screen.wait_until_ready()
        assert length_at_break < len(screen.text) < 6006
        expect(screen.page.locator("#go")).to_have_text("Stop")
        line.chars_per_s = None
        screen.wait_for_length(6006)
        screen.wait_until_idle()
        screen.shows(continued(client, "ROMEO:", 6000, 7))
        assert stored(client, screen) == screen.text


def test_stream__resumes_after_a_reload_during_a_reconnection(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.set(seed=7, max_tokens=6000)
        screen.page.click("#go")
        screen.wait_for_length(100, ">=")
        line.interrupt()
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        line.restore()
        screen.page.reload()
        screen.wait_until_ready()
        line.chars_per_s = None
        screen.wait_for_length(6006)
        screen.wait_until_idle()
        screen.shows(continued(client, "ROMEO:", 6000, 7))
        assert stored(client, screen) == screen.text


def test_typing__reaches_the_server_after_a_broken_connection_and_a_reload(
    server: Server, open_page: OpenPage, client: Client
) -> None:
    with line_to(server.port) as line:
        screen = open_page(line.url)
        screen.type("What's in a name? ")
        screen.generate(max_tokens=20, seed=1)
        line.interrupt()
        screen.page.locator(".column textarea").press("Backspace")
        screen.type("that which we call a rose")
        typed = screen.text
        expect(screen.page.locator("#trouble")).to_contain_text("can't be reached")
        # The tab stores the changes that the server doesn't have, and sends them after a reload.
        assert screen.session_id  # waits until the tab has stored the text
        line.restore()
        screen.page.reload()
        screen.wait_until_ready()
        screen.shows(typed)
        screen.generate(max_tokens=30, seed=2)
        screen.shows(continued(client, typed, 30, 2))
        assert stored(client, screen) == screen.text


def test_reload__restores_all_texts_and_the_active_one(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.generate(max_tokens=50, seed=1)
    screen.click_char(20)
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    screen.type(" no")
    screen.page.locator(".column").first.locator("textarea").focus()
    texts, names = screen.texts, screen.page.locator(".column h3").all_inner_texts()
    assert screen.session_id  # waits until the tab has stored the texts
    screen.page.reload()
    screen.wait_until_ready()
    screen.shows_texts(texts)
    assert screen.page.locator(".column h3").all_inner_texts() == names
    screen.shows(texts[0])


def test_reload__restores_characters_that_were_not_sent(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("Stra")
    screen.page.keyboard.insert_text("ße, 5 Äpfel")
    mark = screen.page.locator(".column.active mark")
    expect(mark).to_have_text("ße, 5 Äpfel")
    screen.page.reload()
    screen.wait_until_ready()
    expect(mark).to_have_text("ße, 5 Äpfel")
    screen.shows("Stra")
    assert stored(client, screen) == "Stra"
    screen.page.click(".column.active .drop")
    screen.shows("Strae,  pfel")
    assert stored(client, screen) == screen.text


def test_reload__during_a_feed_loses_no_character_that_was_typed_meanwhile(open_page: OpenPage, client: Client) -> None:
    """The server has more of the text than the page knows, and less than the page has."""
    screen = open_page()
    requests: list[Route] = []

    def hold(route: Route) -> None:
        route.fetch()
        requests.append(route)

    screen.page.route("**/feed", hold, times=1)
    screen.type("S")
    comes_to(lambda: (screen.page.title(), len(requests))[1], 1)  # a call of the page lets `hold` run
    screen.type("tra")
    screen.page.reload()
    screen.wait_until_ready()
    screen.shows("Stra")
    assert stored(client, screen) == "Stra"
    expect(screen.page.locator("#trouble")).to_have_text("")


def test_reload__keeps_a_text_that_can_not_be_restored_now(open_page: OpenPage) -> None:
    """Such as one whose model is not in the store at the moment."""
    screen = open_page()
    screen.type("Stra")
    assert screen.session_id
    screen.page.add_init_script(
        """if (sessionStorage.getItem("gru-serve.texts").includes("shakespeare@2")) sessionStorage.setItem(
          "gru-serve.texts", sessionStorage.getItem("gru-serve.texts").replace("shakespeare@2", "gone@1"))"""
    )
    for _ in range(2):
        screen.page.reload()
        screen.wait_until_ready()
        expect(screen.page.locator("#trouble")).to_contain_text("no model 'gone'")
        screen.shows_texts([""])
    stored_texts = screen.page.evaluate("() => JSON.parse(sessionStorage.getItem('gru-serve.texts')).branches")
    assert ["gone@1", "Stra"] in [[branch["model"], branch["text"]] for branch in stored_texts]


@pytest.mark.parametrize("arrives", [True, False])
def test_reload__during_a_replacement_neither_doubles_nor_loses_a_character(
    open_page: OpenPage, client: Client, arrives: bool
) -> None:
    """The server has carried out the request when the page is left, or never gets it."""
    screen = open_page()
    screen.type("Stra")
    assert screen.session_id
    screen.page.keyboard.insert_text("ße")
    requests: list[Route] = []

    def hold(route: Route) -> None:
        if arrives and not requests:
            route.fetch()
        requests.append(route)

    screen.page.route("**/feed", hold, times=1)
    screen.page.click(".column.active .fold")
    comes_to(lambda: (screen.page.title(), len(requests))[1], 1)  # a call of the page lets `hold` run
    screen.page.reload()
    screen.wait_until_ready()
    mark = screen.page.locator(".column.active mark")
    if not arrives:
        expect(mark).to_have_text("ße")
        screen.page.click(".column.active .fold")
    screen.shows("Strasse")
    expect(mark).to_have_text("")
    screen.type("n")
    screen.shows("Strassen")
    assert stored(client, screen) == "Strassen"


def test_lost_session__is_created_again_from_the_text_of_the_page(open_page: OpenPage) -> None:
    """A server that restarts loses its sessions in memory. The page still has the text and the seed."""
    with serving(SERVE, ENVIRONMENT) as first, line_to(first.port) as line:
        screen = open_page(line.url)
        screen.type("ROMEO:")
        screen.generate(max_tokens=100, seed=5)
        before = screen.text
        with serving(SERVE, ENVIRONMENT) as second, Client(f"http://127.0.0.1:{second.port}") as client:
            line.upstream_port = second.port
            screen.type("And ")
            expect(screen.page.locator("#trouble")).to_contain_text("sends it again")
            screen.generate(max_tokens=50, seed=6)
            screen.shows(continued(client, before + "And ", 50, 6))
            assert stored(client, screen) == screen.text


def test_saved_state__continues_on_another_server(open_page: OpenPage, tmp_path: Path) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    screen.generate(max_tokens=100, seed=5)
    before = screen.text
    with screen.page.expect_download() as download:
        screen.page.click("#save")
    assert download.value.suggested_filename == "shakespeare-106.json"
    download.value.save_as(tmp_path / "state.json")
    screen.generate(max_tokens=50, seed=6)
    with serving(SERVE, ENVIRONMENT | KEYS) as other:
        other_screen = open_page(f"http://127.0.0.1:{other.port}")
        other_screen.page.set_input_files("#file", tmp_path / "state.json")
        expect(other_screen.page.locator(".column")).to_have_count(2)
        expect(other_screen.page.locator(".column.active .past")).to_have_text(before)
        other_screen.generate(max_tokens=50, seed=6)
        assert before + other_screen.text == screen.text
        # The page shows the steps of the characters after the saved state.
        other_screen.click_char(10)
        expect(other_screen.page.locator(".column.active .place p")).to_contain_text("117 of 156")
        other_screen.wait_for_step()
        expect(other_screen.page.locator("#bars li").first).to_be_visible()


def test_saved_state__is_refused_if_the_file_is_no_state(open_page: OpenPage, tmp_path: Path) -> None:
    screen = open_page()
    wrong = {
        "text.json": "ROMEO:",
        "other.json": '{"format": "something else"}',
        "list.json": "[1]",
        "null.json": "null",
    }
    for name, content in wrong.items():
        (tmp_path / name).write_text(content)
        screen.page.set_input_files("#file", tmp_path / name)
        expect(screen.page.locator("#trouble")).to_have_text(f"{name} is not a state that this page saved.")
    # Only the server can tell that a well-formed file has a damaged state; the message is the server's.
    (tmp_path / "damaged.json").write_text(
        '{"format": "gru-serve state 1", "model": "shakespeare@1", "state": "AAAA", "text": "x"}'
    )
    screen.page.set_input_files("#file", tmp_path / "damaged.json")
    expect(screen.page.locator("#trouble")).to_have_text(re.compile("^(?!.*this page saved).+"))
    (tmp_path / "large.json").write_bytes(b" " * (5 * 1024 * 1024))
    screen.page.set_input_files("#file", tmp_path / "large.json")
    expect(screen.page.locator("#trouble")).to_contain_text("too large")
    expect(screen.page.locator(".column")).to_have_count(1)


def test_stream__is_resumed_after_an_error_that_the_server_marks(open_page: OpenPage, client: Client) -> None:
    """The page knows no code. The first answer to the request is lost, and an error arrives in its place."""
    screen = open_page()
    screen.type("ROMEO:")
    error = {"message": "It failed.", "code": "unheard_of", "retry": True}

    def fail(route: Route) -> None:
        route.fetch()  # the server generates the text
        route.fulfill(content_type="text/event-stream", body=f"event: error\ndata: {json.dumps({'error': error})}\n\n")

    screen.page.route("**/generate", fail, times=1)
    screen.generate(max_tokens=50, seed=3)
    whole = continued(client, "ROMEO:", 50, 3)
    screen.shows(whole)
    expect(screen.page.locator("#trouble")).to_have_text("")

    error = {"message": "It failed for good.", "code": "engine_failed"}
    screen.page.route("**/generate", fail, times=1)
    screen.set(max_tokens=50, seed=4)
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_have_text("It failed for good.")
    screen.shows(continued(client, whole, 50, 4))  # the page shows the server's text


def test_problem__is_shown_only_as_long_as_a_request_has_it(server: Server, open_page: OpenPage) -> None:
    with line_to(server.port, SLOW) as line:
        screen = open_page(line.url)
        trouble = screen.page.locator("#trouble")
        screen.type("ROMEO:")
        screen.set(seed=7, max_tokens=6000)
        screen.page.click("#go")
        screen.wait_for_length(50, ">=")
        line.interrupt()
        expect(trouble).to_contain_text("can't be reached")
        line.restore()
        line.chars_per_s = None
        screen.wait_until_idle()
        expect(trouble).to_have_text("")

        # A request that is refused for a while leaves its problem with it, even if no other request follows.
        error = {"error": {"message": "Too busy.", "code": "overloaded"}}
        screen.page.route("**/generate", lambda route: route.fulfill(status=429, body=json.dumps(error)))
        screen.page.click("#go")
        expect(trouble).to_contain_text("Too busy. Trying again")
        screen.page.route("**/v1/sessions/**", lambda _route: None)  # nothing is answered any more
        screen.page.click("#go")  # Stop
        expect(trouble).to_have_text("")
        screen.page.unroute_all(behavior="ignoreErrors")


def test_problem__of_one_request_outlasts_the_success_of_another(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("ROMEO:")
    error = {"error": {"message": "Too busy.", "code": "overloaded"}}
    screen.page.route(
        "**/generate",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "30"}, body=json.dumps(error)),
    )
    screen.set(max_tokens=10)
    screen.page.click("#go")
    trouble = screen.page.locator("#trouble")
    expect(trouble).to_contain_text("Too busy. Trying again")
    with screen.page.expect_response("**/v1/models") as response:
        screen.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    response.value.finished()
    screen.page.evaluate("() => new Promise(requestAnimationFrame)")
    expect(trouble).to_contain_text("Too busy. Trying again")
    screen.page.unroute_all(behavior="ignoreErrors")
