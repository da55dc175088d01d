"""The base class of the resources: registers the routes that a class declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from http import HTTPStatus
from inspect import signature
from typing import Any, ClassVar

from flask import Response, request
from flask_openapi import APIBlueprint, OpenAPI, Tag

from service.errors import InvalidValue
from service.web.api.openapi import error_responses
from service.web.api.schemas import Body
from service.web.gate.error_responses import error_response
from service.web.gate.rate_limit import count_cost
from service.web.gate.route import Route, route_of

_OF_AZURE = "api-version"  # a parameter that the client of OpenAI for Azure sends with each request; it changes nothing


class Resource:
    """The routes of one subject. A subclass has a method for each, with a `Route` as its decorator.

    A method gets the validated `path`, `query` and `body`, whichever it has parameters for. Their annotations are the
    schemas. If the route is not part of the API description, the method gets the variables of the path instead.
    """

    name: ClassVar[str]  # of the blueprint; in the API description, of the tag
    errors: ClassVar[
        Mapping[str | int | HTTPStatus, Any]
    ] = {}  # further ones, by status, of all routes of the resource

    def register(self, app: OpenAPI) -> None:
        """Add the routes to an application."""
        blueprint = APIBlueprint(self.name, __name__, abp_tags=[Tag(name=self.name)])
        for route, view in self._views():
            if route.summary is None:
                blueprint.add_url_rule(route.path, view_func=view, methods=[route.method])
            else:
                add = getattr(blueprint, route.method.lower())
                responses = error_responses(route) | dict(self.errors) | dict(route.responses or {})
                add(
                    route.path, summary=route.summary, operation_id=f"{self.name}_{view.__name__}", responses=responses
                )(view)
        blueprint.before_request(self.before_view)
        app.register_api(blueprint)
        for rule in app.url_map.iter_rules():
            declared = route_of(app.view_functions.get(rule.endpoint))
            if declared is not None and declared.streams and rule.methods is not None:
                # Flask would handle HEAD as GET, which takes a run from the connection that streams it.
                rule.methods.discard("HEAD")

    def before_view(self) -> None:
        """Refuse a request, by raising an error, before any view of the resource is called. Refuses none by default."""

    def _views(self) -> Iterator[tuple[Route, Callable[..., Response]]]:
        """Yield the declared routes in their order, and a function for each: flask_openapi stores fields in it."""
        for name, member in vars(type(self)).items():
            route = route_of(member)
            if route is not None:
                yield route, _function(route, getattr(self, name))


@contextmanager
def blaming(param: str | None) -> Iterator[None]:
    """Name `param` as the cause of an InvalidValue that is raised inside the block and names none."""
    try:
        yield
    except InvalidValue as error:
        if error.param is None:
            error.param = param
        raise


def _function(route: Route, method: Callable[..., Response]) -> Callable[..., Response]:
    takes_query = "query" in signature(method).parameters or route.summary is None or route.is_check

    @wraps(method)
    def view(**arguments: Any) -> Response:
        if not takes_query and (unknown := [name for name in request.args if name != _OF_AZURE]):
            name = unknown[0][:80]
            where = "send the field in the body" if route.takes_body else "leave it out"
            return error_response(f"{name}: this route has no query parameters: {where}", "unknown_field", name)
        if isinstance(body := arguments.get("body"), Body):
            count_cost(body.num_chars)
        return method(**arguments)

    return view
