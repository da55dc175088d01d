"""POST /v1/score, and the same and suggestions in a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from flask import Response

from service.arrays import Ids
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, plural
from service.generation.branches import state_after
from service.generation.candidates import Normalize, Origin, normalized, score_candidates
from service.generation.n_best import Wanted, affordable_steps, ends_at, least_scores, n_best, words
from service.generation.score_reservation import ScoreReservation
from service.generation.session_service import SessionService
from service.model.charset import UnknownChars
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.sessions.session import Session, SessionKey
from service.shares import SharedBudget
from service.web.api.candidates import schemas
from service.web.api.json_pieces import dumps
from service.web.api.resource import Resource, blaming
from service.web.api.responses import json_response
from service.web.api.schemas import ERRORS, ErrorAnswer, Usage
from service.web.api.sessions.schemas import SessionPath
from service.web.api.sse import client_monitor
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.route import Route

_PIECE_SCORES = 512  # in one piece of an answer: about a millisecond of work


class _Candidates(Resource):
    """What the routes of candidates share."""

    def __init__(self, max_chars: int, admission: AdmissionLimit, score_budget: SharedBudget) -> None:
        """max_chars: of a prompt, and of all candidates of a request together."""
        self._max_chars, self._admission, self._score_budget = max_chars, admission, score_budget

    def _scored(
        self,
        model: LoadedModel,
        origin: Origin,
        candidates: Sequence[Ids],
        num_prompt: int,
        num_cached: int,
        normalize: Normalize,
        reservation: ScoreReservation,
        held: ExitStack,
    ) -> Response:
        logprobs = score_candidates(model, origin, candidates, reservation.require, client_monitor())
        totals, scores = normalized(logprobs, normalize)
        usage = Usage.of(num_prompt + sum(map(len, candidates)), 0, num_cached)
        return json_response(_pieces(model, origin, candidates, totals, scores, usage), held)

    def _check_chars(self, prompt: str, candidates: Sequence[str]) -> None:
        if len(prompt) > self._max_chars:
            raise InvalidValue(
                f"prompt: at most {plural(self._max_chars, 'character')}, not {len(prompt)}", param="prompt"
            )
        num_chars = sum(map(len, candidates))
        if num_chars > self._max_chars:
            raise InvalidValue(
                f"candidates: at most {plural(self._max_chars, 'character')} together, not {num_chars}",
                param="candidates",
            )

    def _encoded(self, model: LoadedModel, text: str, unknown: UnknownChars, param: str) -> Ids:
        """Return the (n,) ids of a text. Raises UnknownCharacters, InvalidValue."""
        try:
            ids = model.charset.encode(text, unknown)
        except InvalidValue as error:
            error.param = param
            raise
        if len(ids) > max(self._max_chars, len(text)):
            raise InvalidValue(f"{param}: at most {plural(self._max_chars, 'character')} after folding", param=param)
        return ids

    def _encoded_candidates(self, model: LoadedModel, body: schemas.ScoreBody | schemas.SessionScoreBody) -> list[Ids]:
        encoded, num_chars = [], 0
        for place, text in enumerate(body.candidates):
            path = f"candidates[{place}]"
            ids = self._encoded(model, text, body.unknown_chars, path)
            num_chars += len(ids)
            if not len(ids):
                raise InvalidValue(f"{path}: there is no character that the model knows", param=path)
            if num_chars > self._max_chars:  # folding can make a text longer
                raise InvalidValue(
                    f"candidates: at most {plural(self._max_chars, 'character')} together after folding",
                    param="candidates",
                )
            encoded.append(ids)
        return encoded

    def _reservation(self, param: str, remedy: str, held: ExitStack) -> ScoreReservation:
        reservation = ScoreReservation(self._score_budget, param, remedy)
        held.callback(reservation.release)
        return reservation


class CandidateRoutes(_Candidates):
    """The route of candidates after a prompt."""

    name = "candidates"
    errors = ERRORS

    def __init__(
        self,
        models: LoadedModels,
        default_model: str,
        max_chars: int,
        admission: AdmissionLimit,
        score_budget: SharedBudget,
    ) -> None:
        super().__init__(max_chars, admission, score_budget)
        self._models, self._default_model = models, default_model

    @Route(
        "POST",
        "/v1/score",
        "Score candidates after a prompt",
        {"200": schemas.ScoreAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def score(self, body: schemas.ScoreBody) -> Response:
        """Return the log-probability of each candidate as what follows the prompt.

        What candidates have in common is computed once. Each gets the same log-probability as alone.
        """
        self._check_chars(body.prompt, body.candidates)
        with ExitStack() as held:
            held.enter_context(self._admission.admit())
            model = self._models.get(body.model or self._default_model)
            prompt = self._encoded(model, body.prompt, body.unknown_chars, "prompt")
            candidates = self._encoded_candidates(model, body)
            reservation = self._reservation("candidates", "send fewer candidates", held)
            scope = CacheScope(current_owner(), body.cache_salt or "")
            hidden, num_cached = state_after(model, scope, prompt, client_monitor())
            origin = Origin(hidden, len(prompt))
            return self._scored(model, origin, candidates, len(prompt), num_cached, body.normalize, reservation, held)


class SessionCandidateRoutes(_Candidates):
    """The routes of candidates and suggestions after a session's text. None of them changes the session."""

    name = "session_candidates"
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer, "504": ErrorAnswer}

    def __init__(
        self, sessions: SessionService, max_chars: int, admission: AdmissionLimit, score_budget: SharedBudget
    ) -> None:
        super().__init__(max_chars, admission, score_budget)
        self._sessions = sessions

    @Route(
        "POST",
        "/v1/sessions/<id>/score",
        "Score candidates after a session's text",
        {"200": schemas.ScoreAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def score(self, path: SessionPath, body: schemas.SessionScoreBody) -> Response:
        """Return the log-probability of each candidate as what follows the session's text, which doesn't change.

        While text is being generated, the candidates follow the session's text as it was before.
        """
        self._check_chars(body.prompt, body.candidates)
        with ExitStack() as held:
            held.enter_context(self._admission.admit())
            model, session = self._sessions.reading(SessionKey(current_owner(), path.id), body.position)
            prompt = self._encoded(model, body.prompt, body.unknown_chars, "prompt")
            candidates = self._encoded_candidates(model, body)
            reservation = self._reservation("candidates", "send fewer candidates", held)
            origin = Origin.after(model, session, prompt, client_monitor())
            return self._scored(model, origin, candidates, len(prompt), 0, body.normalize, reservation, held)

    @Route(
        "POST",
        "/v1/sessions/<id>/suggest",
        "Suggest the likeliest texts to follow a session's text",
        {"200": schemas.SuggestAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def suggest(self, path: SessionPath, body: schemas.SuggestBody) -> Response:
        """Return the n likeliest of all texts that may follow the session's text up to an end, such as whole words.

        The session doesn't change. While text is being generated, the suggestions follow its text as it was before.
        """
        self._check_chars(body.prompt, ())
        with ExitStack() as held:
            held.enter_context(self._admission.admit())
            model, session = self._sessions.reading(SessionKey(current_owner(), path.id), body.position)
            prompt = self._encoded(model, body.prompt, body.unknown_chars, "prompt")
            form = self._form_of(model, session, body, prompt)
            reservation = self._reservation("n", "request shorter suggestions", held)
            steps = affordable_steps(model, body.max_chars, self._score_budget.max_per_client)
            wanted = Wanted(body.n, body.max_chars, form, max_steps=steps)
            reservation.wait_for(least_scores(model, wanted), client_monitor())
            origin = Origin.after(model, session, prompt, client_monitor())
            found = n_best(model, origin, wanted, reservation.require, client_monitor())
            answer = schemas.SuggestAnswer(
                model=model.version.ref,
                position=origin.position,
                exact=found.is_exact,
                data=[
                    schemas.Suggestion(index=index, text=model.charset.decode(one.ids), logprob=round(one.logprob, 7))
                    for index, one in enumerate(found.texts)
                ],
                usage=Usage.of(len(prompt), found.num_stepped),
            )
            return Response(answer.model_dump_json(), mimetype="application/json")

    def _form_of(self, model: LoadedModel, session: Session, body: schemas.SuggestBody, prompt: Ids) -> Automaton:
        """Return which texts are suggested. Raises InvalidValue, UnknownCharacters."""
        charset = model.charset
        if body.form is not None:
            with blaming(body.form_param):
                compiled = compile_form(body.form, charset.characters)
            if compiled.fewest[0] > body.max_chars:
                raise InvalidValue(
                    f"max_chars: a text of this form has at least {plural(int(compiled.fewest[0]), 'character')}",
                    param="max_chars",
                )
            return compiled
        if body.until is None:
            return words(charset, charset.decode(prompt[-1:]) or session.last_character)
        ends = {*self._encoded(model, body.until, body.unknown_chars, "until").tolist()}
        return ends_at(char in ends for char in range(len(charset)))


def _pieces(
    model: LoadedModel,
    origin: Origin,
    candidates: Sequence[Ids],
    totals: Sequence[float],
    scores: Sequence[float],
    usage: Usage,
) -> Iterator[str]:
    """Yield the answer in pieces: it may have 10,000 candidates."""
    head = {"object": "list", "model": model.version.ref, "position": origin.position}
    yield dumps(head)[:-1] + ',"data":['
    for start in range(0, len(candidates), _PIECE_SCORES):
        part = [
            {
                "object": "score",
                "index": index,
                "text": model.charset.decode(candidates[index]),
                "logprob": round(totals[index], 7),
                "score": round(scores[index], 7),
            }
            for index in range(start, min(start + _PIECE_SCORES, len(candidates)))
        ]
        yield ("," if start else "") + dumps(part)[1:-1]
    yield f'],"usage":{usage.model_dump_json()}}}'
