"""Where in a session's text a caller thinks to be."""

from __future__ import annotations

from service.errors import PositionConflict
from service.sessions.session import Session


def check_position(session: Session, position: int | None) -> None:
    """Raises PositionConflict unless the session is as long as the caller thinks."""
    if position is not None and position != session.position:
        raise PositionConflict(f"the text is {session.position} characters long, not {position}", session.position)


def check_within(session: Session, position: int, param: str = "position") -> None:
    """Raises PositionConflict if a place lies behind the end."""
    if position > session.position:
        raise PositionConflict(
            f"the text is {session.position} characters long, not {position}", session.position, param=param
        )
