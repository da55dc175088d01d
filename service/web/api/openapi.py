"""The API description at /openapi.json: what flask_openapi generates from the schemas, and what the routes declare.

The schemas say nothing about errors that the gates find, about keys, streams and headers, or about the limits that this
server is configured with; and they don't show that `null` means the default. A generated client needs all of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from flask_openapi import OpenAPI

from service.web.api.schemas import ErrorAnswer
from service.web.gate.route import Route, route_of

Bounds = Mapping[str, Mapping[str, Mapping[str, int]]]  # schema -> field -> its keywords, such as `maximum`

# Errors that every route may answer, from the reading of the request to its view.
_ALWAYS = ("400", "403", "405", "408", "414", "429", "431", "500", "503")
_OF_BODIES = ("413", "415")
_DESCRIPTIONS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or unknown.",
    "403": "The server may not answer to this host, origin or caller.",
    "404": "What the request names does not exist.",
    "405": "The route does not have this method.",
    "408": "The request did not arrive whole and in time.",
    "409": "The request does not fit the present state of the session.",
    "410": "The session or the position existed, and is gone.",
    "413": "The body is too large.",
    "414": "The path with its query is too long.",
    "415": "The body is not declared as JSON, or is compressed.",
    "429": "Too much work is open; send the request again after `Retry-After` seconds.",
    "431": "The headers are too long.",
    "500": "An unforeseen error.",
    "503": "The server can't serve the request now; send it again after `Retry-After` seconds.",
    "504": "The session store did not answer, so the operation may have been done.",
}
# Without a type: a tool may take the schema for that of the whole text, or of each event, and OpenAPI 3.1 doesn't say
# which.
_STREAM = {
    "schema": {
        "description": "server-sent events, if `stream` is true or the route only streams; the data of each is JSON, "
        "or `[DONE]` at the end of a completion",
    }
}
_REQUEST_ID = {"description": "id of the request, which the server's log has too", "schema": {"type": "string"}}
_RETRY_AFTER = {
    "description": "seconds after which to send the request again; with 409 only if the session is busy",
    "schema": {"type": "integer"},
}

_TYPES = {"maxLength": "string", "maxItems": "array", "maximum": "integer"}  # that a keyword limits


def error_responses(route: Route) -> dict[str, Any]:
    """Return the schemas by status of the errors that a route may answer whatever its view does."""
    statuses = [*_ALWAYS, *(() if route.open else ("401",)), *(_OF_BODIES if route.takes_body else ())]
    return dict.fromkeys(statuses, ErrorAnswer)


class DescribedApi(OpenAPI):
    """An application whose description says what the server does."""

    bounds: Bounds = MappingProxyType({})  # of fields of request bodies, as this server is configured

    def generate_spec_json(self) -> None:
        """Generate the description. It is generated once, when it is first requested."""
        super().generate_spec_json()  # type: ignore[no-untyped-call]
        routes = filter(None, map(route_of, self.view_functions.values()))
        _complete(self.spec_json, [route for route in routes if route.summary is not None], self.bounds)


def _complete(spec: dict[str, Any], routes: Iterable[Route], bounds: Bounds) -> None:
    spec["servers"] = [{"url": "./"}]  # where the description is, also under a prefix
    for route in routes:
        operation = spec["paths"][re.sub(r"<(?:[^<:]+:)?(\w+)>", r"{\1}", route.path)][route.method.lower()]
        operation["description"] = operation["description"].replace("<br/>", "\n")
        if route.open:
            operation["security"] = []
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = _not_null(parameter["schema"])
        responses = operation["responses"] = dict(sorted(operation["responses"].items()))
        for status in responses.keys() & _DESCRIPTIONS.keys():
            responses[status] = {"$ref": f"#/components/responses/Error{status}"}
        if route.streams:
            responses["200"]["content"]["text/event-stream"] = _STREAM
    spec["components"]["responses"] = {f"Error{status}": _error(status) for status in _DESCRIPTIONS}
    schemas = spec["components"]["schemas"]
    for name in _schemas_of_bodies(spec):
        schema = schemas[name]
        for field, property_ in schema.get("properties", {}).items():
            for keyword, value in bounds.get(name, {}).get(field, {}).items():
                _bound(property_, keyword, value)
            if field not in schema.get("required", ()):
                schema["properties"][field] = _optional(_nullable(_enumerated(property_)))


def _error(status: str) -> dict[str, Any]:
    """Return the description of the answers with an error status."""
    headers = {"X-Request-Id": _REQUEST_ID}
    if status in ("409", "429", "503"):
        headers["Retry-After"] = _RETRY_AFTER
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}}
    return {"description": _DESCRIPTIONS[status], "headers": headers, "content": content}


def _schemas_of_bodies(spec: Mapping[str, Any]) -> list[str]:
    """Return the names of the schemas that request bodies consist of."""
    operations = [operation for path in spec["paths"].values() for operation in path.values()]
    waiting = [ref for operation in operations for ref in _refs(operation.get("requestBody", {}))]
    found: list[str] = []
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += _refs(spec["components"]["schemas"][name])
    return found


def _refs(part: object) -> Iterator[str]:
    """Yield the names of the schemas that a part of the description refers to."""
    if isinstance(part, dict):
        if isinstance(ref := part.get("$ref"), str):
            yield ref.rpartition("/")[2]
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from _refs(item)


def _bound(schema: dict[str, Any], keyword: str, value: int) -> None:
    """Limit every type of a field that the keyword can limit."""
    if schema.get("type") == _TYPES[keyword]:
        schema[keyword] = min(value, schema.get(keyword, value))
    for part in [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *([schema["items"]] if "items" in schema else ())]:
        _bound(part, keyword, value)


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter: a path, a query or a header can leave it out, and can't write null."""
    kinds = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    return {name: value for name, value in schema.items() if name != "anyOf"} | kinds[0] if len(kinds) == 1 else schema


def _enumerated(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field with few values as alternatives: generators know enumerations of strings only."""
    if "enum" not in schema or all(isinstance(value, str) for value in schema["enum"]):
        return schema
    about = {name: value for name, value in schema.items() if name not in ("enum", "anyOf")}
    return about | {"anyOf": [_exactly(value) for value in schema["enum"]]}


def _exactly(value: object) -> dict[str, Any]:
    """Return a schema that one JSON value fits."""
    if value is None:
        return {"type": "null"}
    if isinstance(value, dict):
        fields = {name: _exactly(part) for name, part in value.items()}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    if isinstance(value, list) and len(value) <= 1:
        items = _exactly(value[0]) if value else {}
        return {"type": "array", "items": items, "minItems": len(value), "maxItems": len(value)}
    return {"const": value}


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field of a body with its default in words.

    openapi-typescript takes a field with a default for one that is always there, and would have clients send it.
    """
    if "default" not in schema or schema["default"] is None:
        return schema
    default = json.dumps(schema["default"])
    described = {
        "description": f"{schema.get('description', '')}. Default: `{default}`",
        "x-default": schema["default"],
    }
    return {name: value for name, value in schema.items() if name != "default"} | described


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field that may be null, too."""
    kind = schema.get("type")
    if kind == "null" or "null" in (kind if isinstance(kind, list) else ()):
        return schema
    if "anyOf" in schema:
        has_null = any(part.get("type") == "null" for part in schema["anyOf"])
        return schema if has_null else schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if kind is None or "enum" in schema or "const" in schema:
        about = {name: schema[name] for name in ("title", "description", "default") if name in schema}
        inner = {name: value for name, value in schema.items() if name not in about}
        return {"anyOf": [inner, {"type": "null"}]} | about
    return schema | {"type": [kind, "null"]}
