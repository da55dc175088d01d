"""Drives the page as a user does, and reads what the screen shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from playwright.sync_api import Dialog, Error, Page, Request, expect

from service.client import Client

# The text of a column: of its lines, without unencodable characters and without text that was loaded from a file.
_TEXT = """column => [...column.querySelectorAll(".text > div:not(.past)")].map(
  line => [...line.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join("")).join("")"""
_LENGTH = "length => Array.from((%s)(document.querySelector('.column.active'))).length %s length"
# The page draws pending changes in the next frame.
_FRAME = "() => new Promise(requestAnimationFrame)"
# The middle of a character's box, in window coordinates.
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
# The colour level of every character in the active column: 0 to 16, or -1 for no colour.
_LEVELS = """() => {
  const levels = [], starts = new Map();
  for (const line of document.querySelectorAll(".column.active .text > div:not(.past)")) {
    const node = [...line.childNodes].find(node => node.nodeType === 3);
    starts.set(node, levels.length);
    for (const char of node.data) levels.push(-1);
  }
  for (let level = 0; level < 17; level++) {
    for (const range of CSS.highlights.get(`level-${level}`)) {
      const start = starts.get(range.startContainer);
      if (start === undefined) continue;
      for (let i = range.startOffset; i < range.endOffset; i++) levels[start + i] = level;
    }
  }
  return levels;
}"""

Value = TypeVar("Value")


def comes_to(read: Callable[[], Value], expected: Value) -> None:
    """Read a value of the page until it is the expected one. Fails after a minute."""
    deadline = time.monotonic() + 60
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value == expected, f"{value!r}, not {expected!r}"


@dataclass
class Screen:
    """A page in the browser. Methods act on the active column unless they say otherwise."""

    page: Page
    url: str
    # What the page must never do: script errors, dialogs, requests to other hosts, violations of the content policy.
    problems: list[str] = field(default_factory=list)
    # Requests that failed, because the server refused them or the connection was broken; as the console reports them.
    refusals: list[str] = field(default_factory=list)
    # The browser has broken off a request because of a change of the network since the page was loaded.
    is_network_changed: bool = False
    # Requests without a whole answer so far.
    unanswered: list[Request] = field(default_factory=list)

    def listen(self) -> None:
        """Start collecting problems and refusals."""
        page = self.page
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", self._on_dialog)
        page.on("request", self._on_request)
        for event in ("requestfinished", "requestfailed"):
            page.on(event, self._on_answer)
        page.on("console", lambda message: self._on_console(message.type, message.text))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', "
            "event => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )

    def _on_dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request: Request) -> None:
        self.unanswered.append(request)
        if not request.url.startswith((self.url + "/", "blob:")):
            self.problems.append(f"request: {request.url}")

    def _on_answer(self, request: Request) -> None:
        if request in self.unanswered:
            self.unanswered.remove(request)

    def _on_console(self, kind: str, text: str) -> None:
        if "net::ERR_NETWORK_CHANGED" in text:
            self.is_network_changed = True
        elif text.startswith("Failed to load resource"):
            self.refusals.append(text)
        elif kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def load(self) -> Screen:
        """Open the page."""
        self.is_network_changed = False
        self.page.goto(self.url + "/")
        return self.wait_until_ready()

    def wait_until_ready(self) -> Screen:
        """Wait until the page can be used. A failure tells what it shows, and what it waits for.

        The browser breaks off requests when an interface of the machine's network changes, also one that they don't
        use, such as a container's. The page repeats its own, but not those for its files, so it is loaded again.
        """
        try:
            for _ in range(30):
                with suppress(Error):  # it took too long
                    self.page.wait_for_selector("body.ready", timeout=2_000)
                    return self
                if self.is_network_changed:
                    self.is_network_changed = False
                    self.page.reload()
            self.page.wait_for_selector("body.ready", timeout=2_000)
        except Error as error:
            shown = self.page.locator("#trouble").all_inner_texts()
            waits = [f"{request.method} {request.url}" for request in self.unanswered]
            raise AssertionError(f"{shown}, {self.problems}, {self.refusals}, unanswered: {waits}") from error
        return self

    @property
    def text(self) -> str:
        """The text of the active column."""
        self.page.evaluate(_FRAME)
        text: str = self.page.eval_on_selector(".column.active", _TEXT)
        return text

    @property
    def texts(self) -> list[str]:
        """The texts of all columns, from left to right."""
        self.page.evaluate(_FRAME)
        return [column.evaluate(_TEXT) for column in self.page.query_selector_all(".column")]

    def shows(self, text: str) -> None:
        """Wait until the active column shows this text."""
        comes_to(lambda: self.text, text)

    def shows_texts(self, texts: list[str]) -> None:
        """Wait until the columns show these texts."""
        comes_to(lambda: self.texts, texts)

    def shows_levels(self, levels: list[int]) -> None:
        """Wait until the characters of the active column have these colour levels."""
        comes_to(lambda: self.levels, levels)

    def wait_for_length(self, length: int, comparison: str = "===") -> None:
        """Wait until the number of characters shown is equal to `length`, or compares to it as `comparison` says."""
        self.page.wait_for_function(_LENGTH % (_TEXT, comparison), arg=length, timeout=60_000)

    def wait_for(self, condition: str, arg: Any = None) -> None:
        """Wait for a condition, which is a JavaScript function."""
        self.page.wait_for_function(condition, arg=arg, timeout=60_000)

    def type(self, text: str) -> None:
        """Type a text, key by key."""
        self.page.locator(".column.active textarea").press_sequentially(text)

    def set(self, **fields: object) -> None:
        """Fill in fields of the settings: max_tokens, temperature, top_p, top_k, seed."""
        for name, value in fields.items():
            self.page.fill(f"#settings [name={name}]", str(value))

    def generate(self, **fields: object) -> None:
        """Fill in settings, press Continue, and wait until the whole continuation is shown."""
        self.set(**fields)
        length = len(self.text) + int(self.page.input_value("#settings [name=max_tokens]"))
        self.page.click("#go")
        self.wait_for_length(length)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait until no text is being generated."""
        expect(self.page.locator("#go")).to_have_text("Continue", timeout=60_000)

    def place(self, index: int) -> tuple[float, float]:
        """Scroll a character into view and return the middle of its box in window coordinates."""
        x, y = self.page.evaluate(_PLACE, [self.page.query_selector(".column.active"), index])
        return x, y

    def click_char(self, index: int) -> None:
        """Click a character."""
        self.page.mouse.click(*self.place(index))

    def wait_for_step(self) -> None:
        """Wait until the page shows the step of a character."""
        self.wait_for("() => !document.querySelector('#glyph').textContent.includes('·')")

    @property
    def levels(self) -> list[int]:
        """The colour level of every character, once all have one."""
        self.wait_for(f"() => ({_LEVELS})().every(level => level >= 0)")
        levels: list[int] = self.page.evaluate(_LEVELS)
        return levels

    @property
    def session_id(self) -> str:
        """The session of the active column, once the page has stored the shown text for a reload."""
        condition = f"""() => {{
          const stored = JSON.parse(sessionStorage.getItem("gru-serve.texts"));
          const branch = stored?.branches[stored.active];
          return branch?.text === ({_TEXT})(document.querySelector(".column.active")) && branch.id;
        }}"""
        session_id: str = self.page.wait_for_function(condition).json_value()
        return session_id


def continued(client: Client, text: str, num_chars: int, seed: int, **fields: Any) -> str:
    """Return a text with the continuation that the API generates."""
    session = client.create(text)
    return text + "".join(session.generate(num_chars, seed=seed, **fields))


def stored(client: Client, screen: Screen) -> str:
    """Return the text that the server has in the session of the active column."""
    return client.open(screen.session_id).text()
