"""The record of a session: a text with its state."""

from __future__ import annotations

from dataclasses import dataclass

from service.arrays import Float32
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import FinishReason
from service.sessions.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Run:
    """One continuation that was asked for, under way or over: enough to go on with it, or to tell it again.

    start: the position it began at. max_chars: how many it may generate. stops: strings that end it, which are not part
    of the text. context: the characters before it that repetition_penalty takes for the prompt, each once.
    finish_reason, end: why and where it ended; None while it has not. One that was cut has not.
    """

    start: int
    max_chars: int
    seed: int
    sampling: SamplingSettings
    stops: tuple[str, ...] = ()
    context: str = ""
    finish_reason: FinishReason | None = None
    end: int | None = None

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        return 512 + 4 * (sum(map(len, self.stops)) + len(self.context)) + 128 * len(self.sampling.logit_bias)


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A text that stays open, at one moment. Saving it stores another moment.

    hidden: (L, H) float32, the state after the whole text, not to be written to. model: name@version; identity: what
    its numbers have to be for the state to mean anything (`LoadedModel.identity`). seed: draws its characters, unless a
    run brings its own. ttl_s: seconds it lives after its last use. created_at, expires_at: seconds since 1970.
    run: the last one, as long as the text it made is there. origin: hash of what it was created from, by which a
    repeated creation is known; None: it can't be repeated. revision: how often it was saved. Neither id nor owner may
    have a slash in it.
    """

    id: str
    owner: str
    model: str
    identity: str
    seed: int
    ttl_s: float
    created_at: float
    expires_at: float
    hidden: Float32
    transcript: Transcript
    run: Run | None = None
    origin: bytes | None = None
    revision: int = 0

    @property
    def position(self) -> int:
        """Characters consumed."""
        return self.transcript.position
