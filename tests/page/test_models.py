"""Several models on one page: each text names its own, and what belongs to one is never shown as another's."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Route, expect

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.browser import ENVIRONMENT, PHONE, OpenPage
from tests.harness.models import TINY_CHARSET, publish_tiny
from tests.harness.screen import Screen, comes_to, continued, stored
from tests.harness.server import SERVE, Server, serving

NO_COLOUR = "() => [...Array(17).keys()].every(level => !CSS.highlights.get(`level-${level}`).size)"


@pytest.fixture(scope="module")
def server(store: ModelStore) -> Iterator[Server]:
    settings = {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "tiny", "GRU_SERVE_MAX_TOKENS": "200"}
    with serving(SERVE, ENVIRONMENT | settings) as server:
        yield server


def add_text(screen: Screen, model: str, text: str) -> None:
    """Add a column whose text is read by a model, and type a text."""
    count = screen.page.locator(".column").count()
    screen.page.click("#new")
    expect(screen.page.locator(".column")).to_have_count(count + 1)
    screen.page.select_option("#model", model)
    expect(screen.page.locator(".column.active .model")).to_have_text(f"Model {model}")
    screen.type(text)
    expect(screen.page.locator(".column.active .place p")).to_contain_text(f"{len(text)} of {len(text)}")


def test_columns__name_their_models_and_share_no_units(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("a cab")
    expect(screen.page.locator(".column .model")).to_have_text(["Model tiny@1"])
    expect(screen.page.locator("#all-units")).to_have_text("16 units")
    screen.page.fill("#unit", "5")
    assert len(screen.levels) == 5
    add_text(screen, "deep@1", "abba")
    expect(screen.page.locator(".column .model")).to_have_text(["Model tiny@1", "Model deep@1"])
    # The headline counts all layers, and unit 5 was chosen for the other model.
    expect(screen.page.locator("#all-units")).to_have_text("24 units × 3 layers")
    expect(screen.page.locator(".num-state")).to_have_text("72")
    expect(screen.page.locator("#unit")).to_have_value("")
    screen.wait_for(NO_COLOUR)
    expect(screen.page.locator("#legend p")).to_contain_text("No unit of deep@1")
    screen.page.fill("#unit", "20")
    assert len(screen.levels) == 4
    expect(screen.page.locator("#legend p")).to_contain_text("Unit 20 of deep@1, layer 3")
    coloured = """() => new Set([...Array(17).keys()].flatMap(level => [...CSS.highlights.get(`level-${level}`)].map(
      range => range.startContainer.parentElement.closest(".column").querySelector(".model").textContent))).size"""
    assert screen.page.evaluate(coloured) == 1
    # Each model still has its choice when its text is active again.
    screen.page.locator(".column").first.locator("textarea").focus()
    expect(screen.page.locator("#unit")).to_have_value("5")
    expect(screen.page.locator("#legend p")).to_contain_text("Unit 5 of tiny@1")
    assert len(screen.levels) == 5
    assert screen.page.evaluate(coloured) == 1
    # Surprise is a number of every model: all texts have colours.
    screen.page.check("#colouring [value=surprise]")
    comes_to(lambda: screen.page.evaluate(coloured), 2)


def test_model__when_changed_during_a_reading_shows_nothing_of_the_other(open_page: OpenPage, server: Server) -> None:
    """An answer of the first model that arrives after the change belongs to no text any more."""
    screen = open_page()
    held: list[Route] = []
    screen.page.route("**/v1/inspect", lambda route: held.append(route), times=1)
    screen.type("a cab")
    expect(screen.page.locator(".column.active .place p")).to_contain_text("No character read")
    screen.page.select_option("#model", "deep@1")
    expect(screen.page.locator(".column .model")).to_have_text(["Model deep@1"])
    held[0].continue_()
    screen.page.fill("#unit", "20")
    with Client(f"http://127.0.0.1:{server.port}") as client:
        values = np.asarray(client.inspect("a cab", model="deep").states)[:, 2, 20].astype(np.float64)
    screen.shows_levels(np.floor((values + 1) / 2 * 16 + 0.5).astype(int).tolist())


def test_phone__has_room_for_the_longest_name_of_a_model(open_page: OpenPage, store: ModelStore) -> None:
    ref = publish_tiny(store, "m" * 64)
    screen = open_page(**PHONE)
    screen.page.select_option("#model", ref)
    expect(screen.page.locator(".column .model")).to_have_text([f"Model {ref}"])
    screen.type("aé")
    expect(screen.page.locator(".unknown p")).to_contain_text(f"{ref} doesn't know é")
    screen.page.fill("#unit", "5")
    expect(screen.page.locator("#legend p")).to_contain_text(ref)
    assert screen.page.evaluate("() => document.documentElement.scrollWidth") == 390


def hold_creation(screen: Screen, times: int = 1) -> list[Route]:
    """Let the next sessions that the page creates wait: their requests are added to the list that is returned."""
    held: list[Route] = []
    num_left = iter(range(times))

    def hold(route: Route) -> None:
        if route.request.method == "PUT" and next(num_left, None) is not None:
            held.append(route)
        else:
            route.continue_()

    screen.page.route("**/v1/sessions/*", hold)
    return held


def release(screen: Screen, held: list[Route]) -> None:
    """Let the oldest held request pass, once the page has sent it."""
    comes_to(lambda: (screen.page.title(), len(held) > 0)[1], True)  # a call of the page lets its events arrive
    held.pop(0).continue_()


def test_model__of_an_empty_text_loses_nothing_that_is_typed_meanwhile(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    held = hold_creation(screen)
    screen.page.select_option("#model", "poor@1")
    screen.type("abbé")  # poor@1 doesn't know the last letter
    release(screen, held)
    expect(screen.page.locator(".column .model")).to_have_text(["Model poor@1"])
    expect(screen.page.locator(".column .unknown p")).to_contain_text("poor@1 doesn't know é (U+00E9)")
    screen.page.keyboard.press("Backspace")  # the field of the new text has the focus
    screen.page.keyboard.type(" cab")
    screen.shows("abb cab")
    comes_to(lambda: stored(client, screen), "abb cab")


def test_model__that_was_chosen_last_reads_an_empty_text(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    held = hold_creation(screen, times=2)
    with screen.page.expect_request("**/v1/sessions/*"):
        screen.page.select_option("#model", "deep@1")
    screen.type("a")
    screen.shows("a")
    expect(screen.page.locator("#model")).to_have_value("deep@1")  # also when the page was drawn again
    screen.page.locator(".column.active textarea").press("Backspace")
    screen.shows("")
    with screen.page.expect_request("**/v1/sessions/*"):
        screen.page.select_option("#model", "poor@1")
    with screen.page.expect_response("**/v1/sessions/*"):
        release(screen, held)
    release(screen, held)
    expect(screen.page.locator(".column .model")).to_have_text(["Model poor@1"])
    expect(screen.page.locator("#model")).to_have_value("poor@1")
    screen.type("abba")
    comes_to(lambda: stored(client, screen), "abba")


def test_close__twice_leaves_one_text(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    held = hold_creation(screen)
    screen.type("a cab")
    screen.page.click(".column .close")
    screen.page.click(".column .close")
    release(screen, held)
    screen.shows_texts([""])
    screen.type("abba")
    comes_to(lambda: stored(client, screen), "abba")


def test_models__appear_without_a_reload(open_page: OpenPage, store: ModelStore) -> None:
    screen = open_page(is_ready=False)
    screen.page.clock.install()
    screen.page.reload()
    screen.wait_until_ready()
    screen.type("a cab")
    ref = publish_tiny(store, "late", seed=3)
    screen.page.clock.fast_forward(60_000)
    expect(screen.page.locator(f"#model option[value='{ref}']")).to_have_count(1)
    expect(screen.page.locator("#model")).to_have_value("tiny@1")
    screen.page.select_option("#model", ref)
    expect(screen.page.locator(".column .model")).to_have_text([f"Model {ref}"])
    screen.shows("a cab")


def test_length__has_the_servers_limit(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    field = screen.page.locator("[name=max_tokens]")
    expect(field).to_have_attribute("max", "200")
    expect(field).to_have_value("200")  # the usual 300 would be refused
    expect(screen.page.locator("#max-tokens")).to_have_text("(at most 200)")
    screen.type("a")
    screen.generate(seed=1)
    screen.shows(continued(client, "a", 200, 1))
    screen.set(max_tokens=201)
    screen.page.click("#go")
    assert not field.evaluate("field => field.validity.valid")
    assert len(screen.text) == 201


def test_unknown_characters__are_replaced_or_left_out_at_once(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("a cab ")
    warning, fold, drop = (screen.page.locator(f".column.active .unknown {part}") for part in ("p", ".fold", ".drop"))
    expect(fold).to_be_hidden()
    screen.page.keyboard.insert_text("“Brei” à la Mörike… ")
    expect(warning).to_contain_text(
        "tiny@1 doesn't know “ (U+201C), ” (U+201D), à (U+00E0), ö (U+00F6) and … (U+2026)."
    )
    screen.shows("a cab ")
    fold.click()
    folded = "a cab ''Brei'' a la Morike... "
    screen.shows(folded)
    expect(warning).to_have_text("")
    expect(fold).to_be_hidden()
    expect(screen.page.locator(".column.active textarea")).to_be_focused()
    screen.type("abc")
    assert stored(client, screen) == folded + "abc"

    # Folding stops at the first one that has no similar character. Leaving out such ones still folds the others.
    expected = folded + "abc"
    screen.page.keyboard.insert_text("é" * 40 + "q\u0307b\U0001f600\u0301é5b\nö\U0001f600\u0301a\U0001f638")
    fold.click()
    expect(warning).to_contain_text(
        "tiny@1 has no similar character for \U0001f600 (U+1F600) and \u25cc\u0301 (U+0301)."
    )
    expect(fold).to_be_hidden()
    expected += "e" * 40 + "qb"
    screen.shows(expected)
    screen.page.keyboard.insert_text("c")
    expect(drop).to_have_text("Leave out what has none")
    drop.click()
    expected += "eb\noac"
    screen.shows(expected)
    expect(warning).to_have_text("")
    screen.generate(max_tokens=20, seed=2)
    screen.shows(continued(client, expected, 20, 2))
    assert stored(client, screen) == screen.text

    # Leaving out all of them folds none.
    screen.page.locator(".column.active textarea").focus()
    screen.page.keyboard.insert_text("é5b")
    drop.click()
    screen.shows(continued(client, expected, 20, 2) + "b")
    assert stored(client, screen) == screen.text


def test_unknown_characters__may_be_typed_and_deleted_during_the_replacement(
    open_page: OpenPage, client: Client
) -> None:
    screen = open_page()
    held: list[Route] = []
    screen.page.keyboard.insert_text("é")
    screen.page.route("**/feed", lambda route: held.append(route), times=1)
    screen.page.click(".column.active .fold")
    field = screen.page.locator(".column.active textarea")
    field.press("Backspace")  # the server reads it already
    screen.type("ab5")
    field.press("Backspace")
    release(screen, held)
    screen.shows("eab")
    assert stored(client, screen) == "eab"

    # Text that is deleted meanwhile takes the replacement with it.
    held.clear()
    screen.page.keyboard.insert_text("é")
    screen.page.route("**/feed", lambda route: held.append(route), times=1)
    screen.page.click(".column.active .fold")
    comes_to(lambda: len(held), 1)
    screen.click_char(0)
    screen.page.click(".column.active .rewind")
    screen.type("xy")
    held[0].continue_()
    screen.shows("exy")
    screen.generate(max_tokens=5, seed=1)
    screen.shows(continued(client, "exy", 5, 1))
    assert stored(client, screen) == screen.text


def test_unknown_characters__of_a_long_paste_are_sent_in_parts(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.page.keyboard.insert_text("…" + "é b" * 3000)
    screen.page.click(".column.active .fold")
    screen.shows("..." + "e b" * 3000)
    assert stored(client, screen) == screen.text


def test_model__that_does_not_know_the_text_offers_a_changed_copy(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("A cab-b")
    screen.page.select_option("#model", "poor@1")
    warning = screen.page.locator(".unknown p").first
    expect(warning).to_contain_text("poor@1 doesn't know A (U+0041) and - (U+002D)")
    expect(screen.page.locator("#model")).to_have_value("tiny@1")
    screen.page.click(".column.active .drop")
    expect(screen.page.locator(".column .model")).to_have_text(["Model tiny@1", "Model poor@1"])
    screen.shows_texts(["A cab-b", " cabb"])
    expect(warning).to_have_text("")
    assert stored(client, screen) == " cabb"


def test_stop__ends_the_text_before_it(open_page: OpenPage, client: Client) -> None:
    screen = open_page()
    screen.type("a")
    whole = continued(client, "a", 200, 4)
    # A stop of two characters, the first of which is written as an escape where the text has a new line.
    assert "\n" in whole[1:]
    screen.set(max_tokens=200, seed=4, stop="\\n")
    screen.page.click("#go")
    screen.shows(whole[: whole.index("\n", 1)])
    screen.wait_until_idle()
    assert stored(client, screen) == screen.text
    expect(screen.page.locator(".column .place p")).to_contain_text("seed used: 4")

    screen.set(stop="Straße")
    screen.page.click("#go")
    trouble = screen.page.locator("#trouble")
    expect(trouble).to_have_text(re.compile("stop before: tiny@1 doesn't know .*ß"))
    screen.set(stop="\\\\")
    screen.page.click("#go")
    expect(trouble).to_contain_text("doesn't know \\ (U+005C)")
    assert "\\" not in TINY_CHARSET
    screen.set(stop="")
    screen.page.locator(".column.active textarea").press("Escape")  # the message is no longer true
    expect(trouble).to_have_text("")


def test_seed__is_that_of_the_last_continuation(open_page: OpenPage) -> None:
    screen = open_page()
    place = screen.page.locator(".column.active .place p")
    screen.type("a")
    expect(place).to_have_text(re.compile(r" · seed: \d+$"))
    own = screen.page.inner_text(".column.active .place p").split("seed: ")[1]
    screen.generate(max_tokens=5, seed=77)
    expect(place).to_have_text(re.compile(r" · seed used: 77$"))
    assert screen.session_id
    screen.page.reload()
    screen.wait_until_ready()
    expect(place).to_have_text(re.compile(r" · seed used: 77$"))
    screen.page.click(".column.active .fork")
    expect(screen.page.locator(".column")).to_have_count(2)
    expect(place).to_have_text(re.compile(r" · seed used: 77$"))
    screen.generate(max_tokens=5)
    expect(place).to_have_text(re.compile(rf" · seed used: {own}$"))
    # A continuation that the server refuses has used no seed.
    screen.page.evaluate("() => document.querySelector('[name=max_tokens]').removeAttribute('max')")
    screen.set(max_tokens=1000, seed=5)
    screen.page.click("#go")
    expect(screen.page.locator("#trouble")).to_contain_text("max_tokens")
    expect(place).to_have_text(re.compile(rf" · seed used: {own}$"))


def test_legend__has_numbers(open_page: OpenPage) -> None:
    screen = open_page()
    screen.type("a cab")
    expect(screen.page.locator("#legend")).to_be_hidden()
    screen.page.fill("#unit", "5")
    ticks = screen.page.locator("#legend .ticks span")
    expect(ticks).to_have_text(["−1", "0", "1"])
    screen.page.check("#colouring [value=surprise]")
    expect(ticks).to_have_text(["0", "3", "6 or more"])
    expect(screen.page.locator("#legend p")).to_contain_text("nats")
    screen.page.check("#colouring [value=none]")
    expect(screen.page.locator("#legend")).to_be_hidden()


def test_ranking__has_speakers_names_only_where_the_text_has_them(open_page: OpenPage) -> None:
    screen = open_page()
    rows = screen.page.locator("#ranking tbody th")
    prose = "Old men at sea: all of them. He cut it short.\n\nAnd so: they left at once.\nOne more line."
    screen.page.keyboard.insert_text(prose)
    expect(rows.filter(has_text="end of a sentence")).to_have_count(1)
    expect(rows.filter(has_text="speaker")).to_have_count(0)
    for play in ("ROMEO:\nA rose.\n\nJULIET:\nO me.\n", "Romeo: a rose.\nJuliet: o me.\nRomeo: so it is.\n"):
        screen.page.click("#new")
        screen.shows("")
        screen.page.keyboard.insert_text(play)
        expect(rows.filter(has_text="inside a speaker's name")).to_have_count(1)
