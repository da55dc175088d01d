"""The main thread's CPU time while a long text grows fast. Other processes don't change it.

`benchmarks.page` measures wall time.
"""

from __future__ import annotations

from playwright.sync_api import Browser, expect

from tests.harness import trace
from tests.harness.browser import OpenPage
from tests.harness.line import SLOW, line_to
from tests.harness.server import Server

MAX_CPU_MS = 100


def test_main_thread__stays_responsive_while_a_long_text_grows(
    server: Server, browser: Browser, open_page: OpenPage
) -> None:
    with line_to(server.port) as line:
        screen = open_page(line.url)
        screen.page.click("#new")
        expect(screen.page.locator(".column")).to_have_count(2)
        screen.type("ROMEO:")
        screen.generate(max_tokens=4994, seed=7)
        screen.page.fill("#unit", "181")
        assert len(screen.levels) == 5000
        line.chars_per_s = SLOW
        screen.set(max_tokens=8000, seed=8)
        screen.page.click("#go")
        screen.wait_for_length(5050, ">=")
        trace.start(browser, screen.page)
        typed = "Two households, both alike in dignity,"
        first = screen.page.locator(".column").first.locator("textarea")
        first.press_sequentially(typed, delay=30)
        growing_text = screen.texts[1]
        recorded = trace.Trace.stop(browser, screen.page)
        assert screen.texts[0] == typed
        assert 5050 < len(growing_text) < 13_000
        assert recorded.longest_task_ms[0] < MAX_CPU_MS
        latencies = [cpu_ms for cpu_ms, _ in recorded.key_latencies_ms()]
        assert len(latencies) > len(typed) / 2
        assert max(latencies) < MAX_CPU_MS
        screen.page.locator(".column").nth(1).locator("textarea").focus()
        screen.page.click("#go")  # Stop
        screen.wait_until_idle()
