"""What a user sees of the page and does on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from playwright.sync_api import Dialog, Page, expect

from service.client import Client

# The text of a column: of its lines, without what is typed and not sent, and without what came from a file.
_TEXT = """column => [...column.querySelectorAll(".text > div:not(.past)")].map(
  line => [...line.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join("")).join("")"""
_LENGTH = "length => Array.from((%s)(document.querySelector('.column.active'))).length %s length"
# What has happened so far is drawn with the next frame.
_FRAME = "() => new Promise(requestAnimationFrame)"
# The window's place of a character: of the middle of its box.
_PLACE = """([column, index]) => {
  for (const line of column.querySelectorAll(".text > div:not(.past)")) {
    const node = [...line.childNodes].find(node => node.nodeType === 3);
    const chars = Array.from(node.data);
    if (index >= chars.length) { index -= chars.length; continue; }
    line.scrollIntoView({ block: "center" });
    const range = document.createRange();
    const start = chars.slice(0, index).join("").length;
    range.setStart(node, start);
    range.setEnd(node, start + chars[index].length);
    const box = range.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  }
}"""
# Every character's level of colour, 0 to 16, of the active column; -1: none.
_LEVELS = """() => {
  const found = [], starts = new Map();
  for (const line of document.querySelectorAll(".column.active .text > div:not(.past)")) {
    const node = [...line.childNodes].find(node => node.nodeType === 3);
    starts.set(node, found.length);
    for (const char of node.data) found.push(-1);
  }
  for (let level = 0; level < 17; level++) {
    for (const range of CSS.highlights.get(`level-${level}`)) {
      const start = starts.get(range.startContainer);
      if (start === undefined) continue;
      for (let i = range.startOffset; i < range.endOffset; i++) found[start + i] = level;
    }
  }
  return found;
}"""

CachedSession = TypeVar("CachedSession")


def comes_to(read: Callable[[], CachedSession], expected: CachedSession) -> None:
    """Read what the page shows until it is what is expected, for 10 s: a server was asked, or a frame is to come."""
    deadline = time.monotonic() + 10
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


@dataclass
class Screen:
    """A page in the browser. problems: what it should never do, as it happened. refusals: what a server or a line that
    was cut did to it, as the console says it.
    """

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Note errors, what the policy refuses, and requests to other hosts."""
        page = self.page
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", self._was_asked)
        page.on("request", lambda request: self._asked(request.url))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', "
            "event => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )

    def _was_asked(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url + "/", "blob:")):
            self.problems.append(f"request: {url}")

    def _said(self, kind: str, text: str) -> None:
        if text.startswith("Failed to load resource"):
            self.refusals.append(text)
        elif kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def load(self) -> Screen:
        """Open the page."""
        self.page.goto(self.url + "/")
        return self.is_ready()

    def is_ready(self) -> Screen:
        """Wait until it can be used."""
        self.page.wait_for_selector("body.ready")
        return self

    @property
    def text(self) -> str:
        """Of the active column."""
        self.page.evaluate(_FRAME)
        found: str = self.page.eval_on_selector(".column.active", _TEXT)
        return found

    @property
    def texts(self) -> list[str]:
        """Of all columns, from left to right."""
        self.page.evaluate(_FRAME)
        return [column.evaluate(_TEXT) for column in self.page.query_selector_all(".column")]

    def shows(self, text: str) -> None:
        """The active column's text is, or becomes, this one."""
        comes_to(lambda: self.text, text)

    def shows_texts(self, texts: list[str]) -> None:
        """All columns' texts are, or become, these."""
        comes_to(lambda: self.texts, texts)

    def shows_levels(self, levels: list[int]) -> None:
        """The colours of the active column's text are, or become, these."""
        comes_to(lambda: self.levels, levels)

    def wait_for_length(self, length: int, comparison: str = "===") -> None:
        """Wait until the active column shows so many characters."""
        self.page.wait_for_function(_LENGTH % (_TEXT, comparison), arg=length, timeout=60_000)

    def wait_for(self, condition: str, arg: Any = None) -> None:
        """Wait for a condition in the page's own words."""
        self.page.wait_for_function(condition, arg=arg, timeout=60_000)

    def type(self, text: str) -> None:
        """Into the active column."""
        self.page.locator(".column.active textarea").press_sequentially(text)

    def set(self, **fields: object) -> None:
        """How to go on: max_tokens, temperature, top_p, top_k, seed."""
        for name, value in fields.items():
            self.page.fill(f"#settings [name={name}]", str(value))

    def go_on(self, **fields: object) -> None:
        """Press Continue, and wait until all of it is there."""
        self.set(**fields)
        length = len(self.text) + int(self.page.input_value("#settings [name=max_tokens]"))
        self.page.click("#go")
        self.wait_for_length(length)
        self.wait_until_still()

    def wait_until_still(self) -> None:
        """No stream is shown any more."""
        expect(self.page.locator("#go")).to_have_text("Continue", timeout=60_000)

    def place(self, index: int) -> tuple[float, float]:
        """The window's place of a character of the active column: the middle of its box."""
        x, y = self.page.evaluate(_PLACE, [self.page.query_selector(".column.active"), index])
        return x, y

    def click_char(self, index: int) -> None:
        """Click a character of the active column."""
        self.page.mouse.click(*self.place(index))

    def wait_for_units(self) -> None:
        """Every character of the active column has been read by the inspector, and one is shown."""
        self.wait_for("() => !document.querySelector('#glyph').textContent.includes('·')")

    @property
    def levels(self) -> list[int]:
        """Of every character's colour, once all have one."""
        self.wait_for(f"() => ({_LEVELS})().every(level => level >= 0)")
        found: list[int] = self.page.evaluate(_LEVELS)
        return found

    @property
    def session_id(self) -> str:
        """Of the active column."""
        condition = f"""() => {{
          const all = JSON.parse(sessionStorage.getItem("gru-serve.texts"));
          const one = all?.branches[all.active];
          return one?.text === ({_TEXT})(document.querySelector(".column.active")) && one.id;
        }}"""
        found: str = self.page.wait_for_function(condition).json_value()
        return found


def continued(client: Client, text: str, num_chars: int, seed: int, **fields: object) -> str:
    """The API's answer: a text and its continuation."""
    session = client.create(text)
    return text + "".join(session.generate(num_chars, seed=seed, **fields))


def stored(client: Client, screen: Screen) -> str:
    """What the server has of the active text."""
    return client.open(screen.session_id).text()
