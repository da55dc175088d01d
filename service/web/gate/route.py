"""What a route is. It is declared once, where the route is defined; gate and telemetry read it from the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeVar

from flask import Request, current_app, request

View = TypeVar("View", bound=Callable[..., Any])

_ATTRIBUTE = "route"  # of a view, and of a request: the declaration
_WITH_BODY = ("POST", "PUT", "PATCH")


@dataclass(frozen=True)
class Route:
    """A route, and what the service does with its requests before and after the view.

    As a decorator, it makes a function or a method the view of the route.
    """

    method: str
    path: str  # in Flask's notation, such as /v1/models/<id>
    summary: str | None = None  # in the API description; None leaves the route out of it
    responses: Mapping[str, Any] | None = None  # schemas by status, for the API description
    _: KW_ONLY
    open: bool = False  # callers without an API key may use it, although the server has keys
    starts_work: bool = False  # computes or changes something, so it is refused while the process drains
    counts_as_start: bool = False  # counts against the rate limit, and a stream of it has a time to first token
    streams: bool = False  # may answer with a stream of events; has no HEAD, which would begin one
    # Called several times a second, with any Host: so it answers to all names, and a success is logged at level debug.
    is_check: bool = False

    def __call__(self, view: View) -> View:
        """Attach this declaration to a view."""
        setattr(view, _ATTRIBUTE, self)
        return view

    @property
    def takes_body(self) -> bool:
        """Whether its requests have a body, which has to be JSON."""
        return self.method in _WITH_BODY


# Where no route was found. It needs a key, so that nobody can find out without one which routes exist.
NO_ROUTE = Route("", "")


def route_of(view: Callable[..., Any] | None) -> Route | None:
    """Return the declaration of a view, or None if it has none."""
    declared: Route | None = getattr(view, _ATTRIBUTE, None)
    return declared


def current_route() -> Route:
    """Return the declaration of the route that the current request has reached.

    Flask itself answers OPTIONS for every path: such a request needs a key where the route does, and starts nothing.
    """
    # The request itself, because each access through Flask's proxy costs 1 us, and each request is asked several times.
    current: Any = request._get_current_object()  # type: ignore[attr-defined]
    found: Route | None = current.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = _route_of_request(current)
        setattr(current, _ATTRIBUTE, found)
    return found


def _route_of_request(current: Request) -> Route:
    declared = route_of(current_app.view_functions.get(current.endpoint)) if current.endpoint is not None else None
    if declared is None:
        return NO_ROUTE
    if current.method == "OPTIONS":
        return replace(declared, method="OPTIONS", starts_work=False, counts_as_start=False, streams=False)
    return declared
