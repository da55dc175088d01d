"""What the compilation of a form may take: steps, states and memory, counted before they are spent.

Steps are counted instead of seconds, so which forms are accepted depends neither on the machine nor on its load.
"""

from __future__ import annotations

import time

MAX_STEPS = 750_000  # of some 0.1 µs to 0.25 µs of processor time each
MAX_POSITIONS = 12_000  # characters of a form after its repeats are written out
MAX_STATES = 60_000  # of an automaton before it is minimised
# A compilation pauses that often, for that long, so that threads that wait for the interpreter get it. Otherwise each
# of them waits for 5 ms every time that it has read, written or stepped.
_STEPS_BETWEEN_PAUSES = 10_000
_PAUSE_S = 0.0001
MAX_TABLE_BYTES = 16 * 2**20  # of an automaton's transitions


class TooLarge(Exception):
    """A form exceeds the budget. Its compiler raises InvalidValue instead, with a place in the form."""


class Budget:
    """The steps that a compilation has left."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.steps = steps
        self._pause_at = steps - _STEPS_BETWEEN_PAUSES

    def spend(self, steps: int) -> None:
        """Count steps. Raises TooLarge if none are left."""
        self.steps -= steps
        if self.steps < self._pause_at:
            if self.steps < 0:
                raise TooLarge("it takes too much work to compile")
            self._pause_at = self.steps - _STEPS_BETWEEN_PAUSES
            time.sleep(_PAUSE_S)


def check_table(num_states: int, num_classes: int) -> None:
    """Raise TooLarge if transitions of this size, as int32, may not be allocated."""
    if num_states > MAX_STATES:
        raise TooLarge(f"its automaton has more than {MAX_STATES:,} states")
    if num_states * num_classes * 4 > MAX_TABLE_BYTES:
        raise TooLarge(f"its automaton takes more than {MAX_TABLE_BYTES // 2**20} MiB")
