"""POST /v1/inspect: the hidden states of the network while it reads a text."""

from __future__ import annotations

import base64

import numpy as np
from flask import Response
from numpy.typing import NDArray
from pydantic_core import to_json

from service.errors import InvalidValue
from service.generation.inspector import InspectionRequest, InspectionResult, Inspector
from service.web.api.completions.answer import logprobs_of
from service.web.api.inspect import schemas
from service.web.api.resource import Resource
from service.web.api.schemas import ERRORS, ErrorAnswer
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.route import Route

_MAX_INSPECTIONS = 4  # at the same time: each needs tens of megabytes while its answer is built


class InspectRoutes(Resource):
    """The route of inspections."""

    name = "inspect"
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}

    def __init__(self, inspector: Inspector, default_model: str, admission: AdmissionLimit) -> None:
        self._inspector, self._default_model, self._admission = inspector, default_model, admission
        self._inspections = AdmissionLimit(_MAX_INSPECTIONS)

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
        with self._admission.admit(), self._inspections.admit():
            return _answer(self._inspector.inspect(current_owner(), inspection_request))


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
        session=body.session,
        state=body.state,
        start=body.start,
        end=body.end,
        gates=body.gates,
        embedding=body.embedding,
        num_logprobs=body.logprobs,
        seal=body.portable,
    )


def _answer(result: InspectionResult) -> Response:
    characters, next_characters = result.model.charset.characters, result.next
    scores = logprobs_of(result.text, result.scores, result.model.charset, result.start)
    # A plain dict and not the schema's objects, which would copy the large arrays.
    answer = {
        "object": "inspection",
        "model": result.model.version.ref,
        "from": result.start,
        "to": result.start + len(result.text),
        "text": result.text,
        "dtype": "float16",
        "byte_order": "little",
        "order": schemas.InspectAnswer.model_fields["order"].default,
        "before": _numbers(result.before),
        "states": _numbers(result.states),
        "gates": None,
        "embedding": _numbers(result.embedding) if result.embedding is not None else None,
        "logprobs": scores.model_dump() if scores is not None else None,
        "next": None,
        "state": result.state,
    }
    if result.gates is not None:
        answer["gates"] = dict(zip(("reset", "update", "candidate"), map(_numbers, result.gates), strict=True))
    if next_characters is not None:
        pairs = zip(next_characters.ids.tolist(), next_characters.logprobs.tolist(), strict=True)
        answer["next"] = [{"char": characters[char_id], "logprob": logprob} for char_id, logprob in pairs]
    return Response(to_json(answer), mimetype="application/json")


def _numbers(array: NDArray[np.float16]) -> dict[str, object]:
    return {"shape": list(array.shape), "data": base64.b64encode(array.astype("<f2", copy=False).tobytes()).decode()}
