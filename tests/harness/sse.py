"""Server-sent events as a client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event of a session's stream."""

    id: int  # the position after it
    kind: str  # "text", "done", "error" or "reconnect"
    data: dict[str, Any]

    @classmethod
    def parse(cls, block: str) -> Event:
        """Parse the lines of an event, without the empty line that ends it."""
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        return cls(int(fields["id"]), fields["event"], json.loads(fields["data"]))


def read_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Parse the events of a stream as they arrive. An event that is cut off before its end does not count."""
    block = ""
    for line in lines:
        block += line.decode()
        if block.endswith("\n\n"):
            yield Event.parse(block[:-2])
            block = ""
