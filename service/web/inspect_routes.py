"""POST /v1/inspect: the numbers that the network holds while it reads."""

from __future__ import annotations

import base64

import numpy as np
from flask import Response
from flask_openapi import APIBlueprint, Tag
from numpy.typing import NDArray
from pydantic_core import to_json

from service.errors import InvalidValue
from service.generation.inspector import InspectionRequest, InspectionResult, Inspector
from service.web import inspect_schemas as schemas
from service.web.access import current_owner
from service.web.admission import AdmissionLimit
from service.web.completion_answer import logprobs_of
from service.web.schemas import ERRORS, ErrorAnswer

_AT_ONCE = 4  # answers have tens of megabytes each while they are made


def inspect_blueprint(inspector: Inspector, default_model: str, admission: AdmissionLimit) -> APIBlueprint:
    """The resource, over these models and sessions."""
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}
    blueprint = APIBlueprint("inspect", __name__, abp_tags=[Tag(name="inspect")], abp_responses=errors)
    large = AdmissionLimit(_AT_ONCE)

    @blueprint.post("/v1/inspect", summary="Look into the network", responses={"200": schemas.InspectAnswer})
    def inspect(body: schemas.InspectBody) -> Response:
        """Read a text, or part of a session's, and answer the state after each character. Nothing is changed.

        At most 2,048 characters a call (fewer of a model with more than 4,096 units in all its layers).
        """
        asked = _asked(body, default_model)
        with admission, large:
            return _answer(inspector.inspect(current_owner(), asked))

    return blueprint


def _asked(body: schemas.InspectBody, default_model: str) -> InspectionRequest:
    if (body.text is None) == (body.session is None):
        raise InvalidValue("text: give a text or a session, one of the two", param="text")
    if body.session is not None and body.model is not None:
        raise InvalidValue("model: not with a session, which has one of its own", param="model")
    if body.session is not None and body.state is not None:
        raise InvalidValue("state: only with a text", param="state")
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


def _answer(found: InspectionResult) -> Response:
    characters, following = found.model.charset.characters, found.next
    scores = logprobs_of(found.text, found.scores, found.model.charset, found.start)
    # Without the schema's objects: they would copy what is large.
    answer = {
        "object": "inspection",
        "model": found.model.version.ref,
        "from": found.start,
        "to": found.start + len(found.text),
        "text": found.text,
        "dtype": "float16",
        "byte_order": "little",
        "order": schemas.InspectAnswer.model_fields["order"].default,
        "before": _numbers(found.before),
        "states": _numbers(found.states),
        "gates": None,
        "embedding": _numbers(found.embedding) if found.embedding is not None else None,
        "logprobs": scores.model_dump() if scores is not None else None,
        "next": None,
        "state": found.state,
    }
    if found.gates is not None:
        answer["gates"] = dict(zip(("reset", "update", "candidate"), map(_numbers, found.gates), strict=True))
    if following is not None:
        pairs = zip(following.ids.tolist(), following.logprobs.tolist(), strict=True)
        answer["next"] = [{"char": characters[at], "logprob": logprob} for at, logprob in pairs]
    return Response(to_json(answer), mimetype="application/json")


def _numbers(array: NDArray[np.float16]) -> dict[str, object]:
    return {"shape": list(array.shape), "data": base64.b64encode(array.astype("<f2", copy=False).tobytes()).decode()}
