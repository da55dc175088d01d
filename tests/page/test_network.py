"""The drawings show the engine's numbers: of the character under the cursor and of the chosen unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray
from playwright.sync_api import FloatRect, Locator, expect

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.browser import ENVIRONMENT, OpenPage
from tests.harness.screen import Screen, comes_to
from tests.harness.server import SERVE, serving

CSS = Path(__file__).parent.parent.parent / "service" / "web" / "static" / "page" / "page.css"
PLACES = (0, 40, 105)
NUM_CHARS = 106
_PIXELS = """id => { const canvas = document.getElementById(id);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return Array.from(data); }"""


def scale(scheme: str = "light") -> list[NDArray[np.int64]]:
    """The colours of -1, 0 and 1 in the style sheet."""
    codes = re.findall(r"--(?:cold|zero|warm): #([0-9a-f]{6})", CSS.read_text())
    first = 0 if scheme == "light" else 3
    return [np.array([int(code[at : at + 2], 16) for at in (0, 2, 4)]) for code in codes[first : first + 3]]


def colours(values: NDArray[np.float16], scheme: str = "light", largest: float = 1) -> NDArray[np.int64]:
    """(n, 3): the colours that the page paints for numbers. It rounds them to 257 steps."""
    cold, zero, warm = scale(scheme)
    steps = np.floor((np.clip(values.astype(np.float64) / largest, -1, 1) + 1) / 2 * 256 + 0.5)
    parts = (2 * steps / 256 - 1)[:, None]
    return np.floor(zero + np.abs(parts) * (np.where(parts < 0, cold, warm) - zero) + 0.5).astype(np.int64)


def pixels(screen: Screen, name: str) -> NDArray[np.int64]:
    """(cells, 3): the colours of a grid's cells, without the unused cells at its end."""
    rgba = np.array(screen.page.evaluate(_PIXELS, name)).reshape(-1, 4)
    return rgba[rgba[:, 3] > 0, :3]


def visible(char: str) -> str:
    """The form in which the page shows a character; blanks get a symbol."""
    return {"\n": "⏎", " ": "␣"}.get(char, char)


def expect_pixels(screen: Screen, name: str, expected: NDArray[np.int64]) -> None:
    """Wait until a grid has these colours."""
    comes_to(lambda: pixels(screen, name).tolist(), expected.tolist())


def percentages(rows: Locator) -> list[str]:
    """The percentages of the first 11 bars."""
    return [row.split("\n")[-1].split(" ←")[0] for row in rows.all_inner_texts()[:11]]


def show_step(screen: Screen, index: int) -> None:
    """Click a character and wait until its step is shown."""
    screen.click_char(index)
    expect(screen.page.locator(".column.active .place p")).to_contain_text(f" {index + 1} of ")
    screen.wait_for("() => document.getElementById('update').getContext('2d').getImageData(0, 0, 1, 1).data[3] === 255")


@pytest.fixture
def screen(open_page: OpenPage) -> Screen:
    screen = open_page()
    screen.type("ROMEO:")
    screen.generate(max_tokens=NUM_CHARS - 6, seed=7)
    return screen


def test_grids__show_the_numbers_of_the_clicked_character(screen: Screen, client: Client) -> None:
    seen = client.inspect(screen.text, gates=True, embedding=True, logprobs=20)
    states = np.asarray(seen.states)[:, 0]
    before = np.concatenate([np.asarray(seen.before), states[:-1]])
    for place in PLACES:
        show_step(screen, place)
        for name, values in {
            "state": states[place],
            "before": before[place],
            "reset": np.asarray(seen.reset)[place, 0],
            "update": np.asarray(seen.update)[place, 0],
            "candidate": np.asarray(seen.candidate)[place, 0],
        }.items():
            expect_pixels(screen, name, colours(values))
        embedding = np.asarray(seen.embedding)[place]
        expect_pixels(screen, "embedding", colours(embedding, largest=0.25))
        expect(screen.page.locator("#glyph")).to_have_text(visible(screen.text[place]))


def test_bars__show_the_distribution_and_mark_the_character_that_follows(screen: Screen, client: Client) -> None:
    text = screen.text
    seen = client.inspect(text, logprobs=20)
    rows = screen.page.locator("#bars li:visible")
    for place in (0, 40):
        show_step(screen, place)
        top = sorted(seen.top_logprobs[place + 1].items(), key=lambda pair: -pair[1])
        expect(rows).to_have_count(12)
        expected = [f"{100 * math.exp(logprob):.1f} %" for _, logprob in top[:11]]
        comes_to(lambda: percentages(rows), expected)
        expect(screen.page.locator("#bars li.drawn b")).to_have_text(visible(text[place + 1]))
    show_step(screen, NUM_CHARS - 1)
    expect(screen.page.locator("#bars li.drawn")).to_have_count(0)
    expect(screen.page.locator("#bars li b").first).to_have_text(visible(seen.next[0][0]))


def test_unit__when_clicked_colours_the_text_and_shows_its_sum(screen: Screen, client: Client) -> None:
    unit = 7 * 32 + 5
    box = screen.page.locator("#state").bounding_box()
    assert box
    screen.page.mouse.click(box["x"] + box["width"] * 5.5 / 32, box["y"] + box["height"] * 7.5 / 32)
    assert screen.page.input_value("#unit") == str(unit)
    values = np.asarray(client.inspect(screen.text).states)[:, 0, unit].astype(np.float64)
    expected = np.floor((values + 1) / 2 * 16 + 0.5).astype(int).tolist()
    screen.shows_levels(expected)

    show_step(screen, 40)
    value = f"{values[40]:.2f}".replace("-", "−")
    expect(screen.page.locator("#sum")).to_have_text(re.compile(rf"^Unit {unit}:.*{value}\D*$", re.DOTALL))
    shown = screen.page.inner_text("#sum").replace("−", "-")
    update, candidate, update_again, before, after = map(float, re.findall(r"-?\d+\.\d\d", shown))
    assert update == update_again
    assert after == round(values[40], 2)
    assert abs((1 - update) * candidate + update * before - after) < 0.03  # the page rounds each number

    # After erasing and typing, the changed characters get the colours of their new values.
    screen.page.locator(".column textarea").press("Backspace")
    screen.type("x")
    text = screen.text
    values = np.asarray(client.inspect(text).states)[:, 0, unit].astype(np.float64)
    expected = np.floor((values + 1) / 2 * 16 + 0.5).astype(int).tolist()
    screen.wait_for("() => document.querySelector('.place p').textContent.startsWith('x (')")
    screen.shows_levels(expected)

    screen.page.check("#colouring [value=none]")
    screen.wait_for("() => [...Array(17).keys()].every(level => !CSS.highlights.get(`level-${level}`).size)")


def test_colours__are_painted_on_old_and_new_lines(screen: Screen) -> None:
    """Checks the pixels of spaces, which have no glyph: the paper's colour, mixed with up to 62 % of the level's."""
    screen.page.fill("#unit", "181")
    screen.generate(max_tokens=100, seed=9)
    levels, text = screen.levels, screen.text
    styles = "name => getComputedStyle(document.documentElement).getPropertyValue(name)"
    paper = np.array([int(screen.page.evaluate(styles, "--paper")[at : at + 2], 16) for at in (1, 3, 5)])
    cold, _, warm = scale()
    seen = set()
    spaces = [place for place, char in enumerate(text[:-1]) if char == " " and text[place + 1] != "\n"]
    for place in spaces:
        x, y = screen.place(place)
        clip: FloatRect = {"x": round(x), "y": round(y), "width": 1, "height": 1}
        pixel = imread(BytesIO(screen.page.screenshot(clip=clip)), format="png")[0, 0, :3] * 255
        share = abs(levels[place] - 8) / 8
        expected = paper + 0.62 * share * ((cold if levels[place] < 8 else warm) - paper)
        assert np.abs(pixel - expected).max() < 3, (place, levels[place])
        seen.add(levels[place])
    assert len(seen) > 4


def test_surprise__colours_the_text_by_log_probabilities(screen: Screen, client: Client) -> None:
    screen.page.check("#colouring [value=surprise]")
    logprobs = np.array(client.inspect(screen.text, logprobs=0).logprobs)
    expected = np.floor((np.minimum(1, -logprobs / 6) + 1) / 2 * 16 + 0.5).astype(int).tolist()
    screen.shows_levels(expected)


def test_ranking__lists_the_units_with_the_highest_correlation(screen: Screen, client: Client) -> None:
    text = screen.text
    row = screen.page.locator("#ranking tr", has_text="length of the line so far")
    button = row.locator("button").first
    expect(button).to_be_visible()
    states = np.asarray(client.inspect(text).states)[:, 0].astype(np.float64)
    # The length is 0 after a newline and 1 after the first character of the text.
    length, lengths = 0, []
    for char in text:
        length = 0 if char == "\n" else length + 1
        lengths.append(length)
    correlations = np.array([np.corrcoef(unit, lengths)[0, 1] if unit.std() > 1e-3 else 0 for unit in states.T])
    best = int(np.argmax(np.abs(correlations)))
    screen.wait_for(f"() => document.querySelector('#ranking td button').textContent.startsWith('{best} (')")
    assert abs(float(button.inner_text().split("(")[1].rstrip(")").replace("−", "-")) - correlations[best]) < 0.006
    button.click()
    assert screen.page.input_value("#unit") == str(best)
    assert screen.page.is_checked("#colouring [value=unit]")


def test_cursor__follows_arrow_keys_buttons_and_player(screen: Screen) -> None:
    place = screen.page.locator(".column.active .place p")
    field = screen.page.locator(".column.active textarea")
    expect(place).to_contain_text(f"{NUM_CHARS} of {NUM_CHARS}")
    for _ in range(3):
        field.press("ArrowLeft")
    expect(place).to_contain_text(f"{NUM_CHARS - 3} of")
    field.press("ArrowRight")
    expect(place).to_contain_text(f"{NUM_CHARS - 2} of")
    field.press("Home")
    expect(place).to_contain_text("R (U+0052), 1 of")
    screen.page.click("#forward")
    expect(place).to_contain_text("O (U+004F), 2 of")
    screen.page.click("#back")
    expect(place).to_contain_text(" 1 of")
    screen.page.locator("#speed").fill("60")
    screen.page.click("#play")
    expect(screen.page.locator("#play")).to_have_text("Pause")
    expect(screen.page.locator("#play")).to_have_text("Play", timeout=30_000)
    expect(place).to_contain_text(f"{NUM_CHARS} of {NUM_CHARS}")
    screen.page.click("#play")
    screen.page.click("#play")
    expect(screen.page.locator("#play")).to_have_text("Play")
    field.press("End")
    expect(screen.page.locator("#last")).to_be_disabled()


@pytest.fixture(scope="module")
def models_url(store: ModelStore) -> Iterator[str]:
    with serving(SERVE, ENVIRONMENT | {"GRU_SERVE_MODEL_STORE": str(store.root), "GRU_SERVE_MODEL": "tiny"}) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_model__when_changed_reads_the_text_and_shows_its_layers(open_page: OpenPage, models_url: str) -> None:
    screen = open_page(models_url)
    screen.type("a cab")
    screen.page.select_option("#model", "deep@1")
    expect(screen.page.locator("#layer")).to_be_visible()
    expect(screen.page.locator(".num-units")).to_have_text("24")
    with Client(models_url) as client:
        states = np.asarray(client.inspect("a cab", model="deep").states)
        show_step(screen, 3)
        for layer in (3, 1):
            screen.page.select_option("#layer", label=str(layer))
            expect_pixels(screen, "state", colours(states[3, layer - 1]))
        screen.generate(max_tokens=40, seed=1)
        session = client.create("a cab", model="deep")
        screen.shows("a cab" + "".join(session.generate(40, seed=1)))
        text = screen.text
        # A model that doesn't know all characters of the text can't read it: nothing changes.
        screen.page.select_option("#model", "poor@1")
        expect(screen.page.locator(".unknown p")).to_contain_text("poor@1 doesn't know")
        expect(screen.page.locator("#model")).to_have_value("deep@1")
        screen.shows(text)


def test_model__can_be_any_for_an_empty_text(open_page: OpenPage, models_url: str) -> None:
    screen = open_page(models_url)
    screen.page.select_option("#model", "poor@1")
    expect(screen.page.locator(".column")).to_have_count(1)
    expect(screen.page.locator("#model")).to_have_value("poor@1")
    screen.page.locator(".column textarea").wait_for()
    screen.type("abba")
    screen.shows("abba")
    screen.generate(max_tokens=20)
    assert set(screen.text) <= set("ab c")


def test_grids__follow_the_colour_scheme(open_page: OpenPage, client: Client) -> None:
    screen = open_page(color_scheme="dark")
    screen.type("ROMEO:")
    screen.generate(max_tokens=10, seed=1)
    show_step(screen, 9)
    states = np.asarray(client.inspect(screen.text).states)[:, 0]
    expect_pixels(screen, "state", colours(states[9], "dark"))
    screen.page.emulate_media(color_scheme="light")
    screen.wait_for("() => matchMedia('(prefers-color-scheme: light)').matches")
    expect_pixels(screen, "state", colours(states[9]))
