"""A Python client of a server. It needs only the standard library and imports nothing of the service.

    client = Client("http://127.0.0.1:8000")
    print(client.complete("ROMEO:", max_tokens=200, seed=7).text)
    session = client.create("ROMEO:", seed=7)
    for piece in session.generate(max_tokens=200):
        print(piece, end="")

`AsyncClient` has the same calls as coroutines.

The client repeats a call that failed because a connection broke or a server was restarted. This is safe, because every
call on a session names the position in the text that it applies to: the server applies it once. A stream is resumed, or
requested again with its seed, and continues after the last piece. Such a failure costs a pause, but no character is
lost or doubled.
"""

from service.client.answers import (
    CandidateScore,
    CandidateScores,
    Choice,
    Chunk,
    Completion,
    Logprobs,
    Model,
    Score,
    Suggestion,
    Suggestions,
    Usage,
)
from service.client.async_client import AsyncClient, AsyncSession, FeedResult
from service.client.client import Client, Session
from service.client.fields import Message, ResponseFormat, StructuredOutputs
from service.client.inspection import Inspection
from service.client.transport import (
    Conflict,
    Gone,
    InvalidRequest,
    NotFound,
    NotPermitted,
    Overloaded,
    ServerError,
    ServerFailed,
    StreamBroken,
)

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "CandidateScore",
    "CandidateScores",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Conflict",
    "FeedResult",
    "Gone",
    "Inspection",
    "InvalidRequest",
    "Logprobs",
    "Message",
    "Model",
    "NotFound",
    "NotPermitted",
    "Overloaded",
    "ResponseFormat",
    "Score",
    "ServerError",
    "ServerFailed",
    "Session",
    "StreamBroken",
    "StructuredOutputs",
    "Suggestion",
    "Suggestions",
    "Usage",
]
