"""Records what the page's main thread does, with Chromium's tracing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import Browser, Page

CATEGORIES = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]


@dataclass(frozen=True)
class Trace:
    """A recording of one renderer's main thread."""

    events: list[dict[str, Any]]  # complete events (phase X), ordered by start time

    @classmethod
    def stop(cls, browser: Browser, page: Page) -> Trace:
        """Stop the recording that `start` began and return it."""
        events = json.loads(browser.stop_tracing())["traceEvents"]
        names = [event for event in events if event["name"] == "thread_name"]
        mains = {(event["pid"], event["tid"]) for event in names if event["args"]["name"] == "CrRendererMain"}
        recorded = [event for event in events if (event["pid"], event["tid"]) in mains and event["ph"] == "X"]
        assert recorded, f"the trace has no events of the main thread of {page.url}"
        return cls(sorted(recorded, key=lambda event: event["ts"]))

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The main thread's tasks. While one runs, the page reacts to nothing else."""
        return [event for event in self.events if event["name"] == "RunTask"]

    @property
    def longest_task_ms(self) -> tuple[float, float]:
        """The longest task in CPU time, which other processes don't lengthen, and in wall time."""
        tasks = self.tasks
        return max(task.get("tdur", 0) for task in tasks) / 1000, max(task["dur"] for task in tasks) / 1000

    def key_latencies_ms(self) -> list[tuple[float, float]]:
        """For each key press the time from its event to the end of the frame that shows it, in CPU and in wall time."""
        latencies = []
        keys = [e for e in self.events if e["name"] == "EventDispatch" and e["args"]["data"]["type"] == "keydown"]
        for key in keys:
            end = next((e["ts"] + e["dur"] for e in self.events if e["name"] == "Commit" and e["ts"] > key["ts"]), None)
            if end is not None:
                within = [task for task in self.tasks if task["ts"] + task["dur"] > key["ts"] and task["ts"] < end]
                latencies.append((sum(task.get("tdur", 0) for task in within) / 1000, (end - key["ts"]) / 1000))
        return latencies


def start(browser: Browser, page: Page) -> None:
    """Start a recording."""
    browser.start_tracing(page=page, categories=CATEGORIES)
