"""POST /v1/inspect: the hidden states of the network while it reads a text."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from flask import Response
from numpy.typing import NDArray

from service.errors import InvalidValue
from service.generation.inspector import InspectionRequest, InspectionResult, Inspector
from service.generation.score_reservation import ScoreReservation
from service.shares import SharedBudget
from service.web.api.inspect import schemas
from service.web.api.json_pieces import dumps, logprobs_pieces
from service.web.api.resource import Resource
from service.web.api.responses import json_response
from service.web.api.schemas import ERRORS, ErrorAnswer
from service.web.api.sessions.answer import next_chars
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.route import Route

_PIECE_NUMBERS = 3 * 2**15  # in one piece; divisible by 3, so that base64 needs no padding in between
# At the same time: each needs tens of megabytes while its answer is built. One client may have two of them.
_MAX_INSPECTIONS, _RESERVED_INSPECTIONS = 2, 3


class InspectRoutes(Resource):
    """The route of inspections."""

    name = "inspect"
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}

    def __init__(
        self, inspector: Inspector, default_model: str, admission: AdmissionLimit, score_budget: SharedBudget
    ) -> None:
        self._inspector, self._default_model, self._admission = inspector, default_model, admission
        self._score_budget = score_budget
        self._inspections = AdmissionLimit(_MAX_INSPECTIONS, num_reserved=_RESERVED_INSPECTIONS)

    @Route(
        "POST",
        "/v1/inspect",
        "Inspect the states of the network",
        {"200": schemas.InspectAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def inspect(self, body: schemas.InspectBody) -> Response:
        """Read a text, or part of a session's text, and return the hidden state after each character.

        The session is not changed. One call covers at most 2,048 characters, and fewer if the model has more than 4,096
        units in all its layers.
        """
        inspection_request = _inspection_request(body, self._default_model)
        with ExitStack() as held:
            held.enter_context(self._admission.admit())
            held.enter_context(self._inspections.admit())
            scores = ScoreReservation(self._score_budget)
            held.callback(scores.release)
            result = self._inspector.inspect(current_owner(), inspection_request, scores.require)
            return json_response(_pieces(result), held)


def _inspection_request(body: schemas.InspectBody, default_model: str) -> InspectionRequest:
    if (body.text is None) == (body.session is None):
        raise InvalidValue("text: give either a text or a session", param="text")
    if body.session is not None and body.model is not None:
        raise InvalidValue("model: not allowed with a session, because the session has a model already", param="model")
    if body.session is not None and body.state is not None:
        raise InvalidValue("state: only allowed with a text", param="state")
    return InspectionRequest(
        model=body.model if body.model is not None or body.state is not None else default_model,
        text=body.text,
        unknown_chars=body.unknown_chars,
        session=body.session,
        state=body.state,
        start=body.start,
        end=body.end,
        gates=body.gates,
        embedding=body.embedding,
        num_logprobs=body.logprobs,
        seal=body.portable,
    )


def _pieces(result: InspectionResult) -> Iterator[str]:
    """Yield the answer in pieces: its arrays have tens of megabytes."""
    fields: dict[str, object] = {
        "object": "inspection",
        "model": result.model.version.ref,
        "from": result.start,
        "to": result.start + len(result.text),
        "text": result.text,
        "dtype": "float16",
        "byte_order": "little",
        "order": schemas.InspectAnswer.model_fields["order"].default,
        "next": next_chars(result.model.charset, result.next) if result.next is not None else None,
        "state": result.state,
    }
    yield dumps(fields)[:-1] + ',"before":'
    yield from _numbers(result.before)
    yield ',"states":'
    yield from _numbers(result.states)
    yield ',"embedding":'
    yield from _numbers(result.embedding)
    yield ',"gates":'
    if result.gates is None:
        yield "null"
    else:
        for start, gate in zip(('{"reset":', ',"update":', ',"candidate":'), result.gates, strict=True):
            yield start
            yield from _numbers(gate)
        yield "}"
    yield ',"logprobs":'
    yield from logprobs_pieces(result.text, result.scores, result.model.charset, result.start)
    yield "}"


def _numbers(array: NDArray[np.float16] | None) -> Iterator[str]:
    if array is None:
        yield "null"
        return
    yield f'{{"shape":{dumps(list(array.shape))},"data":"'
    numbers = array.ravel()
    for start in range(0, numbers.size, _PIECE_NUMBERS):
        part = numbers[start : start + _PIECE_NUMBERS].astype("<f2", copy=False)
        yield base64.b64encode(part.tobytes()).decode()
    yield '"}'
