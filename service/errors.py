"""The errors that the service raises on purpose, as a tree by category.

    GruServeError
    ├── InvalidRequest              the request itself is wrong; sending it again can't help
    │   ├── InvalidValue            out_of_range
    │   │   └── UnknownCharacters   unknown_characters
    │   ├── NoChatTemplate          no_chat_template
    │   └── InvalidState            invalid_state
    │       ├── StateExpired        state_expired
    │       └── StateModelMismatch  state_model_mismatch
    ├── AccessDenied                the caller may not do this
    │   ├── InvalidApiKey           invalid_api_key
    │   ├── Forbidden               forbidden
    │   └── ListingNeedsKeys        listing_needs_keys
    ├── NotFound                    the thing named in the request doesn't exist
    │   ├── ModelNotFound           model_not_found
    │   └── SessionNotFound         session_not_found
    ├── Gone                        the thing existed, and was discarded for good
    │   ├── SessionGone             session_gone
    │   └── PositionGone            position_gone
    ├── Conflict                    the request doesn't fit the present state of the session or of its model
    │   ├── SessionExists           session_exists
    │   ├── SessionBusy             session_busy
    │   ├── SessionLost             session_lost
    │   ├── RevisionConflict        revision_conflict
    │   ├── PositionConflict        position_conflict
    │   ├── NoRun                   no_run
    │   ├── RunTakenOver            run_taken_over
    │   └── ModelChanged            model_changed
    ├── LimitReached                too much work is open already; try again later
    │   ├── Overloaded              overloaded
    │   ├── TooManyStreams          too_many_streams
    │   └── TooManyScores           too_many_scores
    ├── Unavailable                 a part of the service can't work at present
    │   ├── NotReady                not_ready
    │   ├── Draining                draining
    │   ├── EngineFailed            engine_failed
    │   ├── InvalidArtifact         invalid_artifact
    │   ├── StoreError              store_error
    │   └── StoreUnavailable        session_store_unavailable
    ├── ClientGone                  client_gone: nobody waits for the answer any more
    ├── OutcomeUnknown              outcome_unknown: nobody knows whether the operation took effect
    └── OperatorError               raised at startup and by commands, never by a request
        ├── InvalidSettings         invalid_settings
        ├── AddressUnusable         address_unusable
        ├── InvalidCharset          invalid_charset
        ├── InvalidCorpus           invalid_corpus
        ├── InvalidCheckpoint       invalid_checkpoint
        ├── TrainingDiverged        training_diverged
        ├── TrainingFailed          training_failed
        ├── InvalidModelFile        invalid_model_file
        ├── UnsupportedModel        unsupported_model
        └── MissingLibrary          missing_library

Only classes with a code are raised; a category exists to be caught. A code is part of the API and never changes. This
module doesn't know HTTP: `service/web/gate/error_responses.py` maps each category to a status, and has the codes of
errors that only HTTP has, such as a body that is not JSON.

A message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

UnknownCharsRemedy = Literal["fold", "fold_drop", "drop"]


def plural(count: int, noun: str, separator: Literal["", ","] = "") -> str:
    """Return a number with the noun in its form for it, such as `1 character`; `separator` of thousands."""
    return f"{count:{separator}} {noun}{'s' * (count != 1)}"


class GruServeError(Exception):
    """The root of all errors that the service raises on purpose and can explain."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field or option that caused the error, None if no single one did

    def copy(self) -> Self:
        """Return a new error that says the same: one that is raised twice would collect the tracebacks of both."""
        error = type(self).__new__(type(self))
        error.__dict__ |= self.__dict__
        error.args = self.args
        return error


class InvalidRequest(GruServeError):
    """Category: the request itself is wrong; sending it again unchanged can't help."""


class InvalidValue(InvalidRequest):
    """A value is outside the accepted range or form; `param` names it."""

    code = "out_of_range"


class UnknownCharacters(InvalidValue):
    """A text contains characters that the model's charset lacks."""

    code = "unknown_characters"

    def __init__(self, fault: str, remedies: Sequence[UnknownCharsRemedy] = (), *, param: str | None = None) -> None:
        """Describe the characters in `fault`. remedies: values of `unknown_chars` with which the text is accepted."""
        self.fault, self._remedies = fault, remedies
        super().__init__(self._advising('"unknown_chars": "{}"'), param=param)

    def within(self, text: str) -> UnknownCharacters:
        """Return the error that also names the text, one of many."""
        return UnknownCharacters(f"{text}: {self.fault}", self._remedies, param=self.param)

    @property
    def command_message(self) -> str:
        """The message with the option of a command instead of the field of a request."""
        return self._advising("--unknown-chars {}")

    def _advising(self, setting: str) -> str:
        return "; ".join([self.fault, *(f"{setting.format(name)} {_EFFECTS[name]}" for name in self._remedies)])


_EFFECTS: dict[UnknownCharsRemedy, str] = {
    "fold": "replaces such characters by the nearest known ones",
    "fold_drop": "replaces those that have a similar known one, and leaves the others out",
    "drop": "leaves them out",
}


class NoChatTemplate(InvalidRequest):
    """A version has no chat template, so it can't answer chats."""

    code = "no_chat_template"


class InvalidState(InvalidRequest):
    """A portable state is damaged, forged, or signed with a key that this server doesn't have."""

    code = "invalid_state"


class StateExpired(InvalidState):
    """A portable state is past its expiry time."""

    code = "state_expired"


class StateModelMismatch(InvalidState):
    """A portable state was made by another model, or by the same model with other arithmetic."""

    code = "state_model_mismatch"


class AccessDenied(GruServeError):
    """Category: the caller may not do this."""


class InvalidApiKey(AccessDenied):
    """The request has no API key, or one that the server doesn't know."""

    code = "invalid_api_key"


class Forbidden(AccessDenied):
    """The route needs an API key, and the server has none: so nobody may use it."""

    code = "forbidden"


class ListingNeedsKeys(AccessDenied):
    """The server has no API keys, so a list of sessions would have those of everybody."""

    code = "listing_needs_keys"


class NotFound(GruServeError):
    """Category: the thing named in the request doesn't exist."""


class ModelNotFound(NotFound):
    """The model store has no model, version or alias of that name."""

    code = "model_not_found"

    def __init__(self, message: str, *, param: str | None = None, others: Sequence[str] | None = None) -> None:
        super().__init__(message, param=param)
        self.others = (
            others  # names of models that the store has instead; None if it has the name, without this version
        )


class SessionNotFound(NotFound):
    """No session has that id, or it belongs to another owner."""

    code = "session_not_found"


class Gone(GruServeError):
    """Category: the thing existed, and was discarded for good."""


class SessionGone(Gone):
    """The session existed, and expired or was evicted."""

    code = "session_gone"


class PositionGone(Gone):
    """The session's text once reached back to that position, and no longer does: its beginning was dropped."""

    code = "position_gone"


class Conflict(GruServeError):
    """Category: the request doesn't fit the present state of the session or of its model."""


class SessionExists(Conflict):
    """A session with that id exists already, and was created with other parameters."""

    code = "session_exists"


class SessionBusy(Conflict):
    """Another operation on the session is in progress."""

    code = "session_busy"


class SessionLost(Conflict):
    """The session store lost the newest saved record of the session; the one it has is older than what clients saw."""

    code = "session_lost"


class RevisionConflict(Conflict):
    """Another operation changed the session between this one's read and its write."""

    code = "revision_conflict"


class PositionConflict(Conflict):
    """The caller expects a text of another length than the session has."""

    code = "position_conflict"

    def __init__(self, message: str, position: int, *, param: str | None = "position") -> None:
        super().__init__(message, param=param)
        self.position = position  # the session's actual length in characters


class NoRun(Conflict):
    """The session has no run that could be resumed."""

    code = "no_run"


class RunTakenOver(Conflict):
    """Another connection resumed the run, so this connection receives no more of it."""

    code = "run_taken_over"


class ModelChanged(Conflict):
    """The model version that a session uses was deleted, or its files or arithmetic changed."""

    code = "model_changed"


class LimitReached(GruServeError):
    """Category: too much work is open already; the same request may succeed later."""


class Overloaded(LimitReached):
    """Every place in the batch is taken and the queue is full."""

    code = "overloaded"


class TooManyStreams(LimitReached):
    """The caller has the largest allowed number of streams open."""

    code = "too_many_streams"


class TooManyScores(LimitReached):
    """Other requests have reserved the log-probabilities that the server computes at a time."""

    code = "too_many_scores"


class Unavailable(GruServeError):
    """Category: a part of the service can't work at present; nothing is wrong with the request."""


class NotReady(Unavailable):
    """The service is starting or draining, or a part that it needs is missing."""

    code = "not_ready"


class Draining(Unavailable):
    """The process is shutting down and doesn't start or finish this work; another replica can."""

    code = "draining"


class EngineFailed(Unavailable):
    """The engine can't compute: its thread died, is stuck in a step or is being closed."""

    code = "engine_failed"


class InvalidArtifact(Unavailable):
    """The files of a model version are damaged, incomplete, or contradict their manifest or config."""

    code = "invalid_artifact"


class StoreError(Unavailable):
    """The model store can't carry out an operation. Published versions are unchanged."""

    code = "store_error"


class StoreUnavailable(Unavailable):
    """The session store can't be reached. Nothing was done, or doing it again is harmless."""

    code = "session_store_unavailable"


class ClientGone(GruServeError):
    """The client has closed its connection while the server worked on its request. Nothing was done."""

    code = "client_gone"


class OutcomeUnknown(GruServeError):
    """The session store received an operation and didn't answer, so it may or may not have taken effect."""

    code = "outcome_unknown"


class OperatorError(GruServeError):
    """Category: raised at startup and by commands, for the person who runs them; never by a request."""


class InvalidSettings(OperatorError):
    """An environment variable or option of the service is unknown or has an unusable value."""

    code = "invalid_settings"


class AddressUnusable(OperatorError):
    """The server can't listen on the address of its settings."""

    code = "address_unusable"


class InvalidCharset(OperatorError):
    """A sequence of characters can't serve as a model's charset."""

    code = "invalid_charset"


class InvalidCorpus(OperatorError):
    """A text file can't be used for training or evaluation."""

    code = "invalid_corpus"


class InvalidCheckpoint(OperatorError):
    """A training checkpoint can't be written, or can't be resumed."""

    code = "invalid_checkpoint"


class TrainingDiverged(OperatorError):
    """The loss of a training run became infinite or not a number."""

    code = "training_diverged"


class TrainingFailed(OperatorError):
    """Training ran out of memory, or its GPU failed."""

    code = "training_failed"


class InvalidModelFile(OperatorError):
    """A file of another library can't be read, is damaged, or declares more than it has."""

    code = "invalid_model_file"


class UnsupportedModel(OperatorError):
    """A file of another library holds a model that computes another function than this service's models do."""

    code = "unsupported_model"


class MissingLibrary(OperatorError):
    """A command needs an optional library that is not installed."""

    code = "missing_library"
