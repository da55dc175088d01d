"""Measures the page at / in a browser while a text grows, compared with the simplest page that shows the same stream.

    python -m benchmarks.page [--before 5000] [--rates 100 500] [--seconds 5] [--rounds 3] [--json FILE]

Needs `chromium`. The plain page appends each event's text to a `<pre>` and has a field to type into. Both pages get the
same stream at a fixed number of characters a second. For both, the benchmark reports the frames a second, the longest
task of the main thread, the longest wait for a typed key, and the share of time in which the main thread is busy. The
first three are wall-clock times, so that other work on the machine affects them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.pairs import in_turns
from benchmarks.table import machine, spread
from tests.page import trace
from tests.page.conftest import ENVIRONMENT, FLAGS
from tests.page.line import Line, line_to
from tests.page.screen import Screen
from tests.parts import program
from tests.serving import SERVE, serving

TYPED = "Two households, both alike in dignity,"
PLAIN = """<!doctype html><title>plain</title><pre></pre><textarea></textarea><script>
const pre = document.querySelector("pre");
document.querySelector("textarea").addEventListener("input", () => {});
async function go(text, length) {
  const post = (method, path, body) => fetch(path, { method, headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body) });
  await post("PUT", "/v1/sessions/" + ID, { text });
  pre.textContent = text;
  const response = await post("POST", `/v1/sessions/${ID}/generate`, { max_tokens: length, stream: true, seed: 8 });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done; ) {
    const blocks = (rest + part.value).split("\\n\\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.includes("event: text")) pre.textContent += JSON.parse(block.split("data: ")[1]).text;
    }
  }
}
</script>"""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a page in one turn."""

    frames_per_s: float
    longest_task_ms: float  # of the main thread
    longest_answer_ms: float  # until a typed key takes effect
    main_thread_share: float  # of the time, in which the main thread is busy


def measure(browser: Browser, page: Page, field: str, seconds: float) -> Measurement:
    """Measure a page whose text grows, while typing into its field."""
    page.evaluate("() => { let n = 0; const f = () => { window.frames_ = ++n; requestAnimationFrame(f) }; f() }")
    trace.start(browser, page)
    began, first = time.perf_counter(), page.evaluate("() => window.frames_")
    page.locator(field).press_sequentially(TYPED, delay=30)
    while time.perf_counter() - began < seconds:
        page.wait_for_timeout(50)
    num_frames, elapsed = page.evaluate("() => window.frames_") - first, time.perf_counter() - began
    recorded = trace.Trace.stop(browser, page)
    return Measurement(
        num_frames / elapsed,
        recorded.longest_task_ms[1],
        max(wall for _, wall in recorded.answers_ms()),
        sum(task.get("tdur", 0) for task in recorded.tasks) / 1e6 / elapsed,
    )


def measure_page(browser: Browser, line: Line, num_before: int, rate: float, seconds: float) -> Measurement:
    """Measure the page with a growing text that is coloured by a unit, while typing into another text.

    The text has `num_before` characters at first, and `rate` more every second.
    """
    with closing(browser.new_context(viewport={"width": 1440, "height": 1000})) as context:
        screen = Screen(context.new_page(), line.url).load()
        screen.page.click("#new")
        screen.wait_for("() => document.querySelectorAll('.column').length === 2")
        screen.type("ROMEO:")
        line.chars_per_s = None
        screen.go_on(max_tokens=num_before - 6, seed=7)
        screen.page.fill("#unit", "181")
        assert len(screen.levels) == num_before
        line.chars_per_s = rate
        screen.set(max_tokens=8000, seed=8)
        screen.page.click("#go")
        screen.wait_for_length(num_before + 20, ">=")
        return measure(browser, screen.page, ".column:first-child textarea", seconds)


def measure_plain_page(browser: Browser, line: Line, num_before: int, rate: float, seconds: float) -> Measurement:
    """Measure the plain page with the same stream."""
    with closing(browser.new_context(viewport={"width": 1440, "height": 1000})) as context:
        page = context.new_page()
        html = PLAIN.replace("ID", json.dumps(f"plain-{time.time_ns()}"))
        page.route("**/plain", lambda route: route.fulfill(content_type="text/html", body=html))
        page.goto(f"{line.url}/plain")
        line.chars_per_s = rate
        text = ("ROMEO:\nBut soft, what light through yonder window breaks?\n" * num_before)[:num_before]
        page.evaluate("([text, length]) => void go(text, length)", [text, 8000])
        grown = "length => document.querySelector('pre').textContent.length > length + 20"
        page.wait_for_function(grown, arg=num_before)
        return measure(browser, page, "textarea", seconds)


def report(rate: float, plain: list[Measurement], ours: list[Measurement]) -> None:
    """Print a line for each figure, with the medians of both pages and the ratios of the rounds."""
    print(f"\n{rate:.0f} characters a second{'':<14}{'this page':>12}{'plain page':>12}   this / plain")
    for name, description in (
        ("frames_per_s", "frames a second"),
        ("longest_task_ms", "longest task, ms"),
        ("longest_answer_ms", "longest wait for a typed key, ms"),
        ("main_thread_share", "busy share of the main thread"),
    ):
        page_values, plain_values = ([getattr(turn, name) for turn in turns] for turns in (ours, plain))
        ratios = [value / plain_value for value, plain_value in zip(page_values, plain_values, strict=True)]
        medians = f"{statistics.median(page_values):>12.2f}{statistics.median(plain_values):>12.2f}"
        print(f"{description:<36}{medians}   {spread(ratios)}")


def main() -> None:
    """Measure both pages in turns at each rate, and print the figures."""
    parser = argparse.ArgumentParser(description="Measure the page in a browser while a text grows.")
    parser.add_argument("--before", type=int, default=5000, help="characters of the text at the start  [5000]")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 500.0], help="characters a second  [100 500]")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each turn  [5]")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds  [3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    print(machine())
    figures = {}
    with sync_playwright() as playwright, serving(SERVE, ENVIRONMENT) as server, line_to(server.port) as line:
        browser = playwright.chromium.launch(executable_path=program("chromium"), args=FLAGS)
        for rate in arguments.rates:

            def turn(measured: Callable[..., Measurement], rate: float = rate) -> Callable[[], Measurement]:
                return lambda: measured(browser, line, arguments.before, rate, arguments.seconds)

            plain, ours = in_turns([turn(measure_plain_page), turn(measure_page)], arguments.rounds)
            report(rate, plain, ours)
            figures[rate] = {"plain": [asdict(turn) for turn in plain], "page": [asdict(turn) for turn in ours]}
        browser.close()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rates": figures}, indent=2))


if __name__ == "__main__":
    main()
