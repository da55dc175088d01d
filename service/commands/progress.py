"""Progress bars on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def char_bar(total: int, initial: int = 0, description: str | None = None) -> tqdm[Any]:
    """A bar that counts characters: how many, how many a second, how long still."""
    tqdm.monitor_interval = 0  # its watching thread is of no use to us and outlives the bar
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="char",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log gets a line now and then
    )
