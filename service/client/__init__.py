"""A Python client for the sessions of a server. It needs only the standard library and imports nothing of the service.

    client = Client("http://127.0.0.1:8000")
    session = client.create("ROMEO:", seed=7)
    for piece in session.generate(max_tokens=200):
        print(piece, end="")

The client repeats a call that failed because a connection broke or a server was restarted. This is safe, because every
call names the position in the text that it applies to: the server applies it once. Such a failure costs a pause, but no
character is lost or doubled.
"""

from service.client.client import Client, FeedResult, Session
from service.client.inspection import Inspection
from service.client.transport import ServerError

__all__ = ["Client", "FeedResult", "Inspection", "ServerError", "Session"]
