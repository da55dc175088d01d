"""POST /v1/inspect: the hidden states of the network while it reads a text."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
from flask import Response
from flask_openapi import APIBlueprint, Tag
from numpy.typing import NDArray
from pydantic_core import to_json

from service.errors import InvalidValue
from service.generation.inspector import InspectionRequest, InspectionResult, Inspector
from service.web.api import inspect_schemas as schemas
from service.web.api.completion_answer import logprobs_of
from service.web.api.schemas import ERRORS, ErrorAnswer
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit

# At the same time: each needs tens of megabytes while its answer is built. One client may have two of them.
_MAX_INSPECTIONS, _RESERVED_INSPECTIONS = 2, 3
_ENCODED_BYTES = 3 * 2**17  # of numbers, encoded at a time: half a millisecond in which no other thread can run


def inspect_blueprint(inspector: Inspector, default_model: str, admission: AdmissionLimit) -> APIBlueprint:
    """The route of inspections."""
    errors = ERRORS | {"409": ErrorAnswer, "410": ErrorAnswer}
    blueprint = APIBlueprint("inspect", __name__, abp_tags=[Tag(name="inspect")], abp_responses=errors)
    inspections = AdmissionLimit(_MAX_INSPECTIONS, num_reserved=_RESERVED_INSPECTIONS)

    @blueprint.post(
        "/v1/inspect", summary="Inspect the states of the network", responses={"200": schemas.InspectAnswer}
    )
    def inspect(body: schemas.InspectBody) -> Response:
        """Read a text, or part of a session's text, and return the hidden state after each character.

        The session is not changed. One call covers at most 2,048 characters, and fewer if the model has more than 4,096
        units in all its layers.
        """
        inspection_request = _inspection_request(body, default_model)
        with admission, inspections:
            return _answer(inspector.inspect(current_owner(), inspection_request))

    return blueprint


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
    answer: dict[str, object] = {
        "object": "inspection",
        "model": result.model.version.ref,
        "from": result.start,
        "to": result.start + len(result.text),
        "text": result.text,
        "dtype": "float16",
        "byte_order": "little",
        "order": schemas.InspectAnswer.model_fields["order"].default,
        "before": result.before,
        "states": result.states,
        "gates": None,
        "embedding": result.embedding,
        "logprobs": scores.model_dump() if scores is not None else None,
        "next": None,
        "state": result.state,
    }
    if result.gates is not None:
        answer["gates"] = dict(zip(("reset", "update", "candidate"), result.gates, strict=True))
    if next_characters is not None:
        pairs = zip(next_characters.ids.tolist(), next_characters.logprobs.tolist(), strict=True)
        answer["next"] = [{"char": characters[char_id], "logprob": logprob} for char_id, logprob in pairs]
    parts = list(_json_parts(answer))
    response = Response(parts, mimetype="application/json")
    response.content_length = sum(map(len, parts))
    return response


def _json_parts(value: object) -> Iterator[bytes]:
    """Yield JSON in pieces that are made quickly: one call for all of it would stop every other thread for long."""
    if isinstance(value, dict) and value:
        for place, (name, part) in enumerate(value.items()):
            yield (b"," if place else b"{") + to_json(name) + b":"
            yield from _json_parts(part)
        yield b"}"
    elif isinstance(value, np.ndarray):
        yield from _numbers(value)
    else:
        yield to_json(value)


def _numbers(array: NDArray[np.float16]) -> Iterator[bytes]:
    yield b'{"shape":' + to_json(list(array.shape)) + b',"data":"'
    data = memoryview(array.astype("<f2", copy=False).tobytes())
    for start in range(0, len(data), _ENCODED_BYTES):
        yield base64.b64encode(data[start : start + _ENCODED_BYTES])
    yield b'"}'
