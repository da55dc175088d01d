"""What the page's main thread did, from Chromium's own trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import Browser, Page

CATEGORIES = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]


@dataclass(frozen=True)
class Trace:
    """Of one renderer's main thread: complete events, in order of time."""

    events: list[dict[str, Any]]

    @classmethod
    def stop(cls, browser: Browser, page: Page) -> Trace:
        """End the recording that `start` began."""
        events = json.loads(browser.stop_tracing())["traceEvents"]
        names = [event for event in events if event["name"] == "thread_name"]
        mains = {(event["pid"], event["tid"]) for event in names if event["args"]["name"] == "CrRendererMain"}
        found = [event for event in events if (event["pid"], event["tid"]) in mains and event["ph"] == "X"]
        assert found, f"nothing was recorded of {page.url}"
        return cls(sorted(found, key=lambda event: event["ts"]))

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """What the main thread does without a pause: nothing else is answered meanwhile."""
        return [event for event in self.events if event["name"] == "RunTask"]

    @property
    def longest_task_ms(self) -> tuple[float, float]:
        """By the thread's own clock, which stands still while others have the processor; and by the wall's."""
        tasks = self.tasks
        return max(task.get("tdur", 0) for task in tasks) / 1000, max(task["dur"] for task in tasks) / 1000

    def answers_ms(self) -> list[tuple[float, float]]:
        """Of every key: from its event to the end of the frame that shows it, by both clocks."""
        found = []
        keys = [e for e in self.events if e["name"] == "EventDispatch" and e["args"]["data"]["type"] == "keydown"]
        for key in keys:
            end = next((e["ts"] + e["dur"] for e in self.events if e["name"] == "Commit" and e["ts"] > key["ts"]), None)
            if end is not None:
                within = [task for task in self.tasks if task["ts"] + task["dur"] > key["ts"] and task["ts"] < end]
                found.append((sum(task.get("tdur", 0) for task in within) / 1000, (end - key["ts"]) / 1000))
        return found


def start(browser: Browser, page: Page) -> None:
    """Begin to record."""
    browser.start_tracing(page=page, categories=CATEGORIES)
