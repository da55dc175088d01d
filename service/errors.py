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


class Overloaded(GruServeError):
    """Every place is taken and the queue is full."""

    code = "overloaded"


class EngineFailed(GruServeError):
    """The engine's thread has died, is stuck in a step or is being ended: nothing will be computed by it."""

    code = "engine_failed"


class NotReady(GruServeError):
    """The service is starting, draining or lacks a part that it needs."""

    code = "not_ready"
