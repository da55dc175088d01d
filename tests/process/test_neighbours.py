"""Two owners of one server: no answer and no count of one tells anything of the other's texts."""

from __future__ import annotations

import json
from typing import Any

from service.api_keys import new_key
from service.store.model_store import ModelStore
from tests.harness.server import SERVE, Server, serving

(ALICE, ALICE_ENTRY), (BOB, BOB_ENTRY) = new_key("alice"), new_key("bob")
SECRET = "the lady of the house is not at home"
DIFFERENT = ("id", "created", "created_at", "expires_at")


def ask(server: Server, key: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = server.connect()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if data else None


def cached(server: Server, key: str, prompt: str, **changes: object) -> int:
    body = {"prompt": prompt, "max_tokens": 3, "seed": 1} | changes
    answer = ask(server, key, "POST", "/v1/completions", body)[1]
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def without_times(answer: Any) -> Any:
    """The answer without the fields that differ between two runs anyway."""
    if isinstance(answer, dict):
        return {name: without_times(value) for name, value in answer.items() if name not in DIFFERENT}
    return [without_times(part) for part in answer] if isinstance(answer, (list, tuple)) else answer


def everything_that(server: Server, key: str) -> list[Any]:
    """What this key gets for a fixed list of requests that could show what is stored for others."""
    seen: list[Any] = []

    def note(*request: Any) -> None:
        seen.append(without_times(ask(server, key, *request)))

    for prompt in (SECRET, SECRET[:10], SECRET + " today", "unrelated", [SECRET, SECRET]):
        for changes in ({}, {"n": 2}, {"logprobs": 2, "echo": True}, {"cache_salt": "pepper"}):
            note("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 5, "seed": 3} | changes)
    note("PUT", "/v1/sessions/mine", {"text": SECRET, "seed": 1})
    note("GET", "/v1/sessions")
    note("GET", "/v1/sessions/mine/text")
    note("POST", "/v1/sessions/mine/feed", {"text": " now", "logprobs": 1, "num_next": 3})
    note("POST", "/v1/sessions/mine/generate", {"max_tokens": 10})
    for other in ("theirs", "mine2"):
        note("GET", f"/v1/sessions/{other}")
        note("POST", f"/v1/sessions/{other}/fork", {})
        note("DELETE", f"/v1/sessions/{other}")
    note("DELETE", "/v1/sessions/mine")
    return seen


def test_owner__gets_the_same_with_and_without_another(tiny_store: ModelStore) -> None:
    environment = {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}
    environment |= {"GRU_SERVE_API_KEYS": f"{ALICE_ENTRY},{BOB_ENTRY}"}
    with serving(SERVE, environment) as server:
        alone = everything_that(server, BOB)
        assert "'cached_tokens': 36" in str(alone)  # of what he has sent himself
    with serving(SERVE, environment) as server:
        for _ in range(2):
            everything_that(server, ALICE)
        ask(server, ALICE, "PUT", "/v1/sessions/theirs", {"text": SECRET})
        assert cached(server, ALICE, SECRET) == len(SECRET)
        assert everything_that(server, BOB) == alone
        assert ask(server, ALICE, "GET", "/v1/sessions/theirs")[0] == 200

        salted = {"cache_salt": "a"}
        assert cached(server, ALICE, SECRET, **salted) == 0  # what she has sent without a salt
        assert cached(server, ALICE, SECRET, **salted) == len(SECRET)
        assert cached(server, ALICE, SECRET, cache_salt="b") == 0
        for bad in ("", "x" * 257, 5):
            status, answer = ask(server, BOB, "POST", "/v1/completions", {"prompt": "a", "cache_salt": bad})
            assert (status, answer["error"]["param"]) == (400, "cache_salt")
