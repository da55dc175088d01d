"""Text that is fed to a session."""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.engine.scores import Distribution, Scores
from service.errors import GruServeError, ModelNotFound, PositionConflict
from service.generation.positions import check_position
from service.generation.reading import read
from service.generation.runs import RunRegistry, finished
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.outcome import repeatable
from service.sessions.session import Session
from service.sessions.session_store import SessionStore
from service.sessions.transcript import Retention, Transcript


@dataclass(frozen=True)
class FeedRequest:
    """Text for a session. position: where it belongs; None is the end. num_logprobs: report log-probabilities of its
    characters, and of so many likeliest ones; None: not. rebase: a model that the session goes over to first.
    """

    text: str
    position: int | None = None
    num_logprobs: int | None = None
    num_next: int = 0
    unknown_chars: UnknownChars = "error"
    rebase: str | None = None


@dataclass(frozen=True)
class FeedResult:
    """text: as the session has it now. position: after it. next: the num_next likeliest characters that may follow.
    scores: of the text's characters, if they were asked for.
    """

    model: LoadedModel
    text: str
    position: int
    next: Distribution | None
    scores: Scores | None


class SessionFeeder:
    """Feeds sessions. Safe for any number of threads."""

    def __init__(self, models: LoadedModels, store: SessionStore, runs: RunRegistry, retention: Retention) -> None:
        self._models, self._store, self._runs, self._retention = models, store, runs, retention

    def feed(self, owner: str, session_id: str, feed: FeedRequest) -> FeedResult:
        """Step the network over more text. Text that is there already, at its position, is not stepped again.

        Raises PositionConflict, PositionGone, UnknownCharacters, ModelNotFound (of rebase).
        """
        fed = self._feed_at_once(owner, session_id, feed)
        if fed is not None:
            return fed
        with self._runs.leased(owner, session_id, feed.position) as lease:
            session = lease.session
            if feed.rebase is not None:
                session = self._rebased(session, feed)
            if feed.position is not None and feed.position != session.position:
                return self._fed_before(session, feed)
            fed, session = self._fed(session, feed)
            if fed.text or feed.rebase is not None:
                with repeatable(feed.position is not None):
                    self._store.save(lease, session, release=True)
        return fed

    def _feed_at_once(self, owner: str, session_id: str, feed: FeedRequest) -> FeedResult | None:
        """With one question to the store, if the session stands as it was seen last. None: go the long way."""
        session = self._runs.cached_copy(owner, session_id, feed.position)
        if session is None or feed.rebase is not None:
            return None
        try:
            fed, changed = self._fed(session, feed)
        except GruServeError:
            return None  # of a session that others may have changed
        if not fed.text:
            return None
        with repeatable(feed.position is not None):
            return fed if self._store.compare_and_save(session, changed, release=True) is not None else None

    def _fed(self, session: Session, feed: FeedRequest) -> tuple[FeedResult, Session]:
        """The answer to a feed at the end of a session, and the session after it."""
        model = self._models.for_state(session.model, session.identity)
        ids = model.charset.encode(feed.text, feed.unknown_chars)
        text = model.charset.decode(ids)
        start = session.position
        checkpoint_positions = self._retention.checkpoint_positions(start, start + len(ids))
        end, scores = read(model, ids, session.hidden, start, checkpoint_positions, feed.num_logprobs, feed.num_next)
        transcript = session.transcript.extended(text, end.checkpoints, self._retention)
        run = finished(session) if text else session.run
        fed = FeedResult(model, text, end.position, end.next, scores)
        return fed, replace(session, hidden=end.hidden, transcript=transcript, run=run)

    def _rebased(self, session: Session, feed: FeedRequest) -> Session:
        """The session with its retained text read into another model; its positions stay what they are."""
        try:
            model = self._models.get(feed.rebase or "")
        except ModelNotFound as error:
            error.param = "rebase"
            raise
        if model.identity == session.identity:
            return session  # it went over already
        check_position(session, feed.position)
        start = session.transcript.start
        text = session.transcript.text(start, session.position)
        checkpoint_positions = self._retention.checkpoint_positions(start, session.position)
        end, _ = read(model, model.charset.exact(text), None, start, checkpoint_positions)
        transcript = Transcript(start).extended(text, end.checkpoints, self._retention)
        return replace(
            session,
            model=model.version.ref,
            identity=model.identity,
            hidden=end.hidden,
            transcript=transcript,
            run=finished(session),
        )

    def _fed_before(self, session: Session, feed: FeedRequest) -> FeedResult:
        """The answer to a feed that the session has in its text already."""
        model = self._models.for_state(session.model, session.identity)
        text = model.charset.decode(model.charset.encode(feed.text, feed.unknown_chars))
        start = feed.position or 0
        end = start + len(text)
        if end > session.position or session.transcript.text(start, end) != text:
            raise PositionConflict(
                f"the text is {session.position} characters long, not {start}, and goes on otherwise", session.position
            )
        num_logprobs = feed.num_logprobs if text else None
        begin, hidden = session.transcript.nearest_checkpoint(start if num_logprobs is not None else end)
        ids = model.charset.exact(session.transcript.text(begin, end))
        there, scores = read(model, ids, hidden, begin, num_logprobs=num_logprobs, num_next=feed.num_next)
        return FeedResult(
            model, text, end, there.next, scores.slice(start - begin, None) if scores is not None else None
        )
