"""The record of a session: a text together with the network's state after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, ClassVar, NamedTuple

from pydantic import ConfigDict, Field

from service.arrays import MAX_POSITION, Float32
from service.engine.automaton.form import Form
from service.engine.sampling_settings import SamplingSettings
from service.engine.stepper import FinishReason
from service.errors import PositionConflict, plural
from service.sessions.text import Text

# The limits of numbers in a stored record.
Position = Annotated[int, Field(ge=0, le=MAX_POSITION)]  # in a text
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def digest_of(form: Form | None) -> str:
    """Return a hexadecimal digest that names a form; an empty string for None."""
    return blake2b(f"{form.kind} {form.value}".encode(), digest_size=16).hexdigest() if form is not None else ""


class SessionKey(NamedTuple):
    """Names a session: an id among the sessions of an owner. Neither contains a slash."""

    owner: str  # the name of an API key; empty if the service has no API keys
    id: str


@dataclass(frozen=True, slots=True)
class Run:
    """One continuation of a session's text: all that is needed to generate the rest of it, or to generate it again.

    A run that was interrupted is unfinished, and can be resumed. The field names are part of the stored record.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)  # for stored records

    start: Position  # the position at which it began
    max_chars: Position  # generates at most this many characters
    seed: Seed
    sampling: SamplingSettings
    stops: tuple[str, ...] = ()  # strings that end the run; unless `includes_stop`, they don't become part of the text
    # The distinct characters of the text before the run, which repetition_penalty treats as the prompt. Empty if the
    # sampling settings have no such penalty.
    context: str = ""
    finish_reason: FinishReason | None = None  # None while the run is unfinished
    end: Position | None = None  # the position at which it ended; None while it is unfinished
    min_chars: Position = 0  # none of its first `min_chars` characters completes a stop string
    includes_stop: bool = False  # the stop string that ends the run becomes part of the text
    # The form of what it generates; None for any. A form can be longer than the text, and every save of the session
    # would write it again, so a finished run has only its digest.
    form: Form | None = None
    ended_form: str = ""  # hexadecimal digest of the form of a finished run; empty if it had none

    @property
    def form_digest(self) -> str:
        """Names the form of the run, finished or not; empty if it has none."""
        return self.ended_form if self.form is None else digest_of(self.form)

    def ended(self, reason: FinishReason, end: int) -> Run:
        """Return the run as it ended at a position."""
        return replace(self, finish_reason=reason, end=end, form=None, ended_form=self.form_digest)

    @property
    def is_finished(self) -> bool:
        """Whether it has ended. An interrupted run has not."""
        return self.finish_reason is not None

    @property
    def num_bytes(self) -> int:
        """Approximate memory in bytes."""
        num_chars = sum(map(len, self.stops)) + len(self.context) + (len(self.form.value) if self.form else 0)
        num_ids = len(self.sampling.allowed or ())
        return 512 + 4 * num_chars + 128 * len(self.sampling.logit_bias) + 40 * num_ids


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What a list shows of a session."""

    id: str
    model: str  # name@version
    position: int
    text_from: int  # position of the first character that is retained
    seed: int
    ttl_s: float  # lifetime in seconds after the last use
    created_at: float  # seconds since 1970
    expires_at: float  # seconds since 1970


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A session as it was at one save. It never changes; every save stores a new one."""

    id: str  # contains no slash
    owner: str  # contains no slash; empty if the service has no API keys
    model: str  # name@version
    identity: str  # `LoadedModel.identity` of the model that computed the state; no other model can use the state
    seed: int  # used for every run that doesn't have its own seed
    ttl_s: float  # lifetime in seconds after the last use
    created_at: float  # seconds since 1970
    expires_at: float  # seconds since 1970
    text: Text
    run: Run | None = None  # the last run; None if there was none, or if its text was changed since
    origin: bytes | None = None  # hash of the request that created it; None if that request can't be repeated
    revision: int = 0  # number of saves

    @property
    def position(self) -> int:
        """Number of characters read and generated so far."""
        return self.text.position

    @property
    def hidden(self) -> Float32:
        """(L, H), the state after the whole text; must not be written to."""
        return self.text.hidden

    @property
    def last_character(self) -> str:
        """The last character of the text; nothing if the text is empty, or if that character is not retained."""
        return self.text.slice(max(self.text.start, self.position - 1), self.position)

    @property
    def key(self) -> SessionKey:
        """The name under which a store finds the session."""
        return SessionKey(self.owner, self.id)

    @property
    def summary(self) -> SessionSummary:
        """What a list shows of it."""
        return SessionSummary(
            self.id,
            self.model,
            self.position,
            self.text.start,
            self.seed,
            self.ttl_s,
            self.created_at,
            self.expires_at,
        )

    @property
    def finished_run(self) -> Run | None:
        """The last run if it is finished. An unfinished run can't be resumed once the text has changed."""
        return self.run if self.run is not None and self.run.is_finished else None

    def require_position(self, position: int | None) -> None:
        """Raise PositionConflict unless the session is at this position. None accepts any."""
        if position is not None and position != self.position:
            raise PositionConflict(
                f"the text has {plural(self.position, 'character')}, not {position}: read it and send its end "
                "as position",
                self.position,
            )

    def require_within(self, position: int, param: str = "position") -> None:
        """Raise PositionConflict, naming `param`, if a position is after the end of the text."""
        if position > self.position:
            raise PositionConflict(
                f"the text has {self.position} characters, so {position} is after its end", self.position, param=param
            )
