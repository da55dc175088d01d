"""A client of a server's sessions, on nothing but the standard library.

    client = Client("http://127.0.0.1:8000")
    session = client.create("ROMEO:", seed=7)
    for piece in session.generate(max_tokens=200):
        print(piece, end="")

Every call names the position that it applies to, so it may be repeated: a connection that breaks, or a server that
restarts while another takes its place, costs a pause and no character.
"""

from service.client.calls import ServerError
from service.client.client import Client
from service.client.inspection import Inspection
from service.client.session import Fed, Session

__all__ = ["Client", "Fed", "Inspection", "ServerError", "Session"]
