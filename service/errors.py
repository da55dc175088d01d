"""The tree of errors. Every error that a caller can cause has a stable `code`; no HTTP status appears here.

A message says what was wrong, where, and what to do. `param` names the input that caused it, where there is one.
"""

from __future__ import annotations


class GruServeError(Exception):
    """The root: something failed in a way that we foresaw and can explain."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidValue(GruServeError):
    """A value lies outside what is accepted; `param` names it."""

    code = "out_of_range"


class UnknownCharacters(InvalidValue):
    """A text holds characters that the model's charset lacks."""

    code = "unknown_characters"


class InvalidCharset(GruServeError):
    """A sequence of characters can't serve as a charset."""

    code = "invalid_charset"


class InvalidArtifact(GruServeError):
    """A model version on disk is damaged, incomplete or not what its manifest and config say."""

    code = "invalid_artifact"


class ModelNotFound(GruServeError):
    """No model, version or alias of that name is in the store."""

    code = "model_not_found"


class StoreError(GruServeError):
    """The model store refused an operation; its contents are unchanged."""

    code = "store_error"


class InvalidCorpus(GruServeError):
    """A text file can't be trained or evaluated on."""

    code = "invalid_corpus"


class InvalidCheckpoint(GruServeError):
    """A training checkpoint can't be written, or can't be resumed."""

    code = "invalid_checkpoint"


class TrainingDiverged(GruServeError):
    """A training run came to a loss that is not a finite number."""

    code = "training_diverged"


class InvalidSettings(GruServeError):
    """An environment variable or an option of the service has a value that it can't start with."""

    code = "invalid_settings"


class MissingLibrary(GruServeError):
    """Something was asked for that takes a library which is not installed."""

    code = "missing_library"


class SessionNotFound(GruServeError):
    """There is no session of that id, or it is another owner's."""

    code = "session_not_found"


class SessionGone(GruServeError):
    """The session was there, and expired or was evicted."""

    code = "session_gone"


class SessionExists(GruServeError):
    """There is a session of that id, and it was created otherwise."""

    code = "session_exists"


class SessionBusy(GruServeError):
    """Another operation on the session is under way."""

    code = "session_busy"


class RevisionConflict(GruServeError):
    """The session was changed by somebody else meanwhile."""

    code = "revision_conflict"


class SessionLost(GruServeError):
    """The store has lost what was saved of the session last; what it has left is older than what was acknowledged."""

    code = "session_lost"


class StoreUnavailable(GruServeError):
    """The session store can't be reached; nothing was done, or it is harmless to do it again."""

    code = "session_store_unavailable"


class OutcomeUnknown(GruServeError):
    """The session store didn't answer: what was asked for may have been done."""

    code = "outcome_unknown"


class PositionConflict(GruServeError):
    """The text is not as long as the caller thinks; `position` is how long it is."""

    code = "position_conflict"

    def __init__(self, message: str, position: int, *, param: str | None = "position") -> None:
        super().__init__(message, param=param)
        self.position = position


class PositionGone(GruServeError):
    """The session once held the text there, and no longer does."""

    code = "position_gone"


class NoRun(GruServeError):
    """The session has no continuation that could be taken up again."""

    code = "no_run"


class RunTakenOver(GruServeError):
    """Another connection has taken up the continuation; this one gets no more of it."""

    code = "run_taken_over"


class ModelChanged(GruServeError):
    """The model version of a session is no longer there, or no longer the same."""

    code = "model_changed"


class InvalidState(GruServeError):
    """A portable state is damaged, forged, or signed with a key that is not known here."""

    code = "invalid_state"


class StateExpired(InvalidState):
    """A portable state was good until a moment that has passed."""

    code = "state_expired"


class StateModelMismatch(InvalidState):
    """A portable state belongs to another model, or to another arithmetic."""

    code = "state_model_mismatch"


class InvalidApiKey(GruServeError):
    """The request has no key, or one that is not known."""

    code = "invalid_api_key"


class Forbidden(GruServeError):
    """The caller may not do this."""

    code = "forbidden"


class TooManyStreams(GruServeError):
    """The caller has as many streams open as one may have."""

    code = "too_many_streams"


class Overloaded(GruServeError):
    """Every place is taken and the queue is full."""

    code = "overloaded"


class EngineFailed(GruServeError):
    """The engine's thread has died, is stuck in a step or is being ended: nothing will be computed by it."""

    code = "engine_failed"


class NotReady(GruServeError):
    """The service is starting, draining or lacks a part that it needs."""

    code = "not_ready"


class Draining(GruServeError):
    """The process is going away and does this no more, or not to its end; another one can."""

    code = "draining"
