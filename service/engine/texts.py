"""What the engine schedules: texts, and prompts that several texts have in common until they are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from service.arrays import Float32, read_state, write_state
from service.engine.counters import SubmittedBatch
from service.engine.handle import End, EndReason, Handle, Snapshot
from service.engine.request import Request
from service.engine.sampling_settings import PLAIN
from service.engine.stepper import Batch, Row, Steps


@dataclass(eq=False)
class Text:
    """A text that was accepted and has not ended."""

    handle: Handle
    row: Row
    batch: SubmittedBatch  # the texts that were submitted together
    num_bytes: int  # counted in the engine's memory budget
    num_prompt: int  # characters of its prompt; 0 if they are read for another text too, which counts them

    @property
    def client(self) -> str:
        """For whom the text is advanced."""
        return self.row.request.client

    @property
    def texts(self) -> Sequence[Text]:
        """The text itself: what a tick does is done for these."""
        return (self,)

    def end(self, reason: EndReason) -> End:
        """Return the end of the text as it is now."""
        row = self.row
        checkpoints = dict(zip(row.request.checkpoint_positions, row.checkpoints, strict=False))
        automaton = row.request.automaton
        num_stop_chars = int(automaton.stop_chars[row.state]) if automaton is not None and reason == "stop" else 0
        return End(reason, row.hidden, row.position, checkpoints, row.next, num_stop_chars)

    def snapshot(self) -> Snapshot:
        """Return the state of the text as it is now."""
        row = self.row
        return Snapshot(read_state(row.hidden), row.position, row.request.checkpoint_positions, row.checkpoints[:])


@dataclass(eq=False)
class Reading:
    """A prompt that several texts of one submission have in common. It is read once, then each continues by itself."""

    row: Row  # generates nothing
    texts: list[Text]  # of one client
    num_bytes: int  # counted in the engine's memory budget, beside those of the texts

    @property
    def client(self) -> str:
        """For whom the prompt is read."""
        return self.row.request.client

    def catch_up(self, text: Text) -> None:
        """Bring one of the texts to where the reading is."""
        write_state(text.row.hidden, self.row.hidden)
        text.row.progress.position, text.row.progress.num_read = self.row.position, self.row.num_read
        text.row.checkpoints = self.row.checkpoints[:]


Job = Text | Reading  # what takes part in a tick as one row
_MAX_CALLS = 64  # whose results a batch has at a time


class JobBatch:
    """Jobs that the scheduler chooses tick after tick. Most ticks look at none of them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.rows = jobs, Batch(job.row for job in jobs)
        self.readings = [(i, job) for i, job in enumerate(jobs) if isinstance(job, Reading)]
        self._handles = [(i, job.handle) for i, job in enumerate(jobs) if isinstance(job, Text)]
        self._join()

    def _join(self) -> None:
        self._steps: list[Steps] = []
        for i, handle in self._handles:
            handle.join_batch(self._steps, i)

    def add(self, steps: Steps) -> None:
        """Hand over the results of a call with `rows` to the texts' handles, which need not be touched for it."""
        self._steps.append(steps)
        if len(self._steps) >= _MAX_CALLS:
            self.dissolve()
            self._join()

    def dissolve(self) -> None:
        """Let every handle have its results for itself. After it, this object must not be used any more."""
        joined = Steps.joined(self._steps)
        for _, handle in self._handles:
            handle.leave_batch(joined)


def jobs_of(
    texts: Sequence[Text], initial_hidden: Callable[[], Float32], reading_bytes: Callable[[Request], int]
) -> list[Job]:
    """Return the texts of one submission as jobs, in their order: texts that begin alike are one `Reading`.

    They are those with the same array as prompt, in the same state: choices of one prompt.
    """
    groups: dict[Hashable, list[Text]] = {}
    for text in texts:
        groups.setdefault(_beginning(text.row.request), []).append(text)
    jobs: list[Job] = []
    for group in groups.values():
        if len(group) == 1 or not len(group[0].row.request.prompt):
            jobs += group
            continue
        first = group[0].row.request
        request = replace(
            first,
            max_chars=0,
            sampling=PLAIN,
            automaton=None,
            num_left=None,
            generated=None,
            checkpoint_positions=_checkpoints_in_prompt(first),
            num_next=None,
        )
        hidden = initial_hidden()
        write_state(hidden, group[0].row.hidden)
        jobs.append(Reading(Row(request, hidden), group, reading_bytes(request)))
        for text in group[1:]:
            text.num_prompt = 0
    return jobs


def _beginning(request: Request) -> Hashable:
    """Return what the reading of a request's prompt depends on."""
    scores = request.num_logprobs if request.score_prompt else None
    return id(request.prompt), id(request.hidden), request.position, scores, _checkpoints_in_prompt(request)


def _checkpoints_in_prompt(request: Request) -> tuple[int, ...]:
    end = request.position + len(request.prompt)
    return tuple(position for position in request.checkpoint_positions if position <= end)
