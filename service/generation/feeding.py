"""Feeding: reading more text into a session."""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.engine.scores import Distribution, Scores
from service.errors import GruServeError, ModelNotFound, PositionConflict
from service.generation.reading import read
from service.generation.runs import RunRegistry
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.session import Session
from service.sessions.session_store import SessionStore, safe_to_retry
from service.sessions.transcript import Retention, Transcript


@dataclass(frozen=True)
class FeedRequest:
    """Text to read into a session."""

    text: str
    position: int | None = None  # the position at which the text belongs; None for the end of the session's text
    # Return the log-probability of every character, and of this many likeliest characters at its place. None if no
    # log-probabilities are returned.
    num_logprobs: int | None = None
    num_next: int = 0  # number of likeliest next characters to return
    unknown_chars: UnknownChars = "error"
    rebase: str | None = None  # model into which the retained text is read first; None to stay with the session's model


@dataclass(frozen=True)
class FeedResult:
    """The text as it is in the session now, and what may follow it."""

    model: LoadedModel
    text: str  # as the session has it: `unknown_chars` may have dropped or replaced characters
    position: int  # after the text
    next: Distribution | None  # the `num_next` likeliest next characters
    scores: Scores | None  # of the text's characters; None if there is no text or no log-probabilities are returned


class SessionFeeder:
    """Feeds sessions. Safe for any number of threads."""

    def __init__(self, models: LoadedModels, store: SessionStore, runs: RunRegistry, retention: Retention) -> None:
        self._models, self._store, self._runs, self._retention = models, store, runs, retention

    def feed(self, owner: str, session_id: str, feed: FeedRequest) -> FeedResult:
        """Step the network over more text. Text that the session already has at `feed.position` is not read again.

        Raises PositionConflict, PositionGone, UnknownCharacters, and ModelNotFound if `feed.rebase` doesn't exist.
        """
        fed = self._feed_cached_copy(owner, session_id, feed)
        if fed is not None:
            return fed
        with self._runs.lease(owner, session_id, feed.position) as lease:
            session = lease.session
            if feed.rebase is not None:
                session = self._rebase(session, feed)
            if feed.position is not None and feed.position != session.position:
                return self._repeat(session, feed)
            fed, session = self._append(session, feed)
            if fed.text or feed.rebase is not None:
                with safe_to_retry(feed.position is not None):
                    self._store.save(lease, session, release=True)
        return fed

    def _feed_cached_copy(self, owner: str, session_id: str, feed: FeedRequest) -> FeedResult | None:
        """Feed with a single exchange with the store. None if the cached copy can't be used: use a lease then."""
        session = self._runs.cached_copy(owner, session_id, feed.position)
        if session is None or feed.rebase is not None:
            return None
        try:
            fed, changed = self._append(session, feed)
        except GruServeError:
            return None  # the copy may be stale, and the error with it
        if not fed.text:
            return None
        with safe_to_retry(feed.position is not None):
            return fed if self._store.compare_and_save(session, changed, release=True) is not None else None

    def _append(self, session: Session, feed: FeedRequest) -> tuple[FeedResult, Session]:
        """Read the text at the end of a session. Return the result, and the session after it."""
        model = self._models.for_state(session.model, session.identity)
        ids = model.charset.encode(feed.text, feed.unknown_chars)
        text = model.charset.decode(ids)
        start = session.position
        checkpoint_positions = self._retention.checkpoint_positions(start, start + len(ids))
        end, scores = read(model, ids, session.hidden, start, checkpoint_positions, feed.num_logprobs, feed.num_next)
        transcript = session.transcript.extend(text, end.checkpoints, self._retention)
        run = session.finished_run if text else session.run
        fed = FeedResult(model, text, end.position, end.next, scores)
        return fed, replace(session, hidden=end.hidden, transcript=transcript, run=run)

    def _rebase(self, session: Session, feed: FeedRequest) -> Session:
        """Return the session with its retained text read into another model. Positions don't change."""
        try:
            model = self._models.get(feed.rebase or "")
        except ModelNotFound as error:
            error.param = "rebase"
            raise
        if model.identity == session.identity:
            return session  # the request is a repetition
        session.require_position(feed.position)
        start = session.transcript.start
        text = session.transcript.text(start, session.position)
        checkpoint_positions = self._retention.checkpoint_positions(start, session.position)
        end, _ = read(model, model.charset.exact(text), None, start, checkpoint_positions)
        transcript = Transcript(start).extend(text, end.checkpoints, self._retention)
        return replace(
            session,
            model=model.version.ref,
            identity=model.identity,
            hidden=end.hidden,
            transcript=transcript,
            run=session.finished_run,
        )

    def _repeat(self, session: Session, feed: FeedRequest) -> FeedResult:
        """Return the result of a feed whose text the session already has. Raises PositionConflict if it hasn't."""
        model = self._models.for_state(session.model, session.identity)
        text = model.charset.decode(model.charset.encode(feed.text, feed.unknown_chars))
        start = feed.position or 0
        end = start + len(text)
        if end > session.position or session.transcript.text(start, end) != text:
            raise PositionConflict(
                f"the text has {session.position} characters, not {start}, and continues differently after {start}",
                session.position,
            )
        num_logprobs = feed.num_logprobs if text else None
        begin, hidden = session.transcript.nearest_checkpoint(start if num_logprobs is not None else end)
        ids = model.charset.exact(session.transcript.text(begin, end))
        after, scores = read(model, ids, hidden, begin, num_logprobs=num_logprobs, num_next=feed.num_next)
        scores = scores.slice(start - begin, None) if scores is not None else None
        return FeedResult(model, text, end, after.next, scores)
