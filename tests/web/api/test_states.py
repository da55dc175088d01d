"""`state` and `return_state` of a completion: a client keeps its own context, and it is that of a session."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.sessions.portable import StateHeader, StateSealer
from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok, refused
from tests.harness.models import publish_tiny
from tests.harness.portable_states import changed

PROMPT = "ROMEO:"


def choices(client: FlaskClient, **body: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ok(client.post("/v1/completions", json=body))["choices"]
    return found


def choice(client: FlaskClient, **body: Any) -> dict[str, Any]:
    (one,) = choices(client, return_state=True, **body)
    return one


def events(data: bytes) -> list[dict[str, Any]]:
    """The choices in the events of a stream."""
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def session(client: FlaskClient, **body: Any) -> str:
    return f"/v1/sessions/{ok(client.post('/v1/sessions', json=body), 201)['id']}"


def generated(client: FlaskClient, path: str, **body: Any) -> str:
    text: str = ok(client.post(f"{path}/generate", json=body))["text"]
    return text


def exported(client: FlaskClient, path: str) -> str:
    state: str = ok(client.get(f"{path}/state"))["state"]
    return state


@pytest.mark.parametrize("seed", [7, -(2**63), 2**63 - 1])
def test_state__of_a_completion_is_that_of_a_session_with_the_same_text(client: FlaskClient, seed: int) -> None:
    there = session(client, text=PROMPT, seed=seed)
    read = choice(client, prompt=PROMPT, seed=seed, max_tokens=0)
    assert (read["text"], read["state"]) == ("", exported(client, there))
    text = generated(client, there, max_tokens=40)
    one = choice(client, prompt=PROMPT, seed=seed, max_tokens=40)
    assert (one["text"], one["state"]) == (text, exported(client, there))
    ok(client.post(f"{there}/feed", json={"text": "\nJULIET: O"}))
    text = generated(client, there, max_tokens=20, temperature=0.7)
    two = choice(client, state=one["state"], prompt="\nJULIET: O", max_tokens=20, temperature=0.7)
    assert (two["text"], two["state"]) == (text, exported(client, there))


def test_state__joins_two_calls_into_one(client: FlaskClient) -> None:
    whole = choice(client, prompt=PROMPT, seed=5, max_tokens=300)
    for cut in (0, 1, 17, 299, 300):
        first = choice(client, prompt=PROMPT, seed=5, max_tokens=cut)
        rest = choice(client, state=first["state"], prompt="", max_tokens=300 - cut)
        assert first["text"] + rest["text"] == whole["text"]
        assert rest["state"] == whole["state"]
    # Text that was generated may as well be read, and read in parts.
    text = PROMPT + whole["text"]
    parts = choice(client, prompt=text[:100], seed=5, max_tokens=0)
    parts = choice(client, state=parts["state"], prompt=text[100:], max_tokens=0)
    assert parts["state"] == whole["state"]


def test_state__goes_from_a_completion_to_a_session_and_back(client: FlaskClient) -> None:
    one = choice(client, prompt=PROMPT, seed=9, max_tokens=10)
    whole = choice(client, prompt=PROMPT, seed=9, max_tokens=60)["text"]
    there = session(client, state=one["state"])
    text = generated(client, there, max_tokens=20)
    back = choice(client, state=exported(client, there), prompt="", max_tokens=30)
    assert one["text"] + text + back["text"] == whole
    # Another seed is that of the text from then on, as it is when a session is created with it.
    there = session(client, state=one["state"], seed=1)
    other = choice(client, state=one["state"], prompt="", seed=1, max_tokens=20)
    assert generated(client, there, max_tokens=20) == other["text"] != text
    assert exported(client, there) == other["state"]


def test_state__belongs_to_each_choice(client: FlaskClient) -> None:
    prompts = [PROMPT, "A"]
    some = choices(client, prompt=prompts, n=3, seed=3, max_tokens=10, return_state=True)
    whole = choices(client, prompt=prompts, n=3, seed=3, max_tokens=30)
    assert len({one["state"] for one in some}) == 6
    for one, other in zip(some, whole, strict=True):
        rest = choice(client, state=one["state"], prompt="", max_tokens=20)
        assert one["text"] + rest["text"] == other["text"]
    # Each prompt continues the same state, as if it had been sent alone.
    both = choices(client, prompt=prompts, state=some[0]["state"], max_tokens=10, return_state=True)
    assert [one["state"] for one in both] == [
        choice(client, prompt=prompt, state=some[0]["state"], max_tokens=10)["state"] for prompt in prompts
    ]
    body = {"prompt": "B", "state": some[0]["state"], "max_tokens": 10, "return_state": True}
    alone = {one["text"]: one["state"] for one in choices(client, n=4, **body)}
    for best in choices(client, n=2, best_of=4, **body):
        assert alone[best["text"]] == best["state"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("includes", [False, True])
def test_state__is_the_one_after_the_returned_text(client: FlaskClient, stream: bool, includes: bool) -> None:
    """The engine has read a stop string that the text does not have."""
    whole = choice(client, prompt=PROMPT, seed=2, max_tokens=500)["text"]
    for start in (0, 3, 255, 256, 300, 490):
        stop = next(whole[start:end] for end in range(start + 1, 500) if whole.find(whole[start:end]) == start)
        body = {"prompt": PROMPT, "seed": 2, "max_tokens": 500, "stop": stop, "include_stop_str_in_output": includes}
        if stream:
            answer = client.post("/v1/completions", json=body | {"return_state": True, "stream": True})
            parts = events(answer.data)
            text, states = "".join(part["text"] for part in parts), [part.get("state") for part in parts]
            assert states[:-1] == [None] * (len(states) - 1)
            assert parts[-1]["finish_reason"] == "stop"
            found = (text, states[-1])
        else:
            one = choice(client, **body)
            found = (one["text"], one["state"])
        text = whole[: start + (len(stop) if includes else 0)]
        read = choice(client, prompt=PROMPT + text, seed=2, max_tokens=0)
        assert found == (text, read["state"])


def test_state__predicts_the_first_character_of_the_prompt(client: FlaskClient) -> None:
    first = choice(client, prompt=PROMPT, seed=1, max_tokens=0)
    there = session(client, text=PROMPT)
    fed = ok(client.post(f"{there}/feed", json={"text": "what", "logprobs": 2}))["logprobs"]
    echoed = choice(client, state=first["state"], prompt="what", max_tokens=0, echo=True, logprobs=2)
    assert echoed["text"] == "what"
    assert echoed["logprobs"]["token_logprobs"] == fed["token_logprobs"]
    assert None not in echoed["logprobs"]["token_logprobs"]
    beside = choice(client, state=first["state"], prompt="what", max_tokens=1, prompt_logprobs=0)
    assert None not in beside["prompt_logprobs"]


def test_state__leaves_the_prefix_cache_alone(client: FlaskClient) -> None:
    """The cache finds states by the whole text before them, which nobody knows after a portable state."""
    state = choice(client, prompt="JULIET: ", seed=1, max_tokens=0)["state"]
    before = choice(client, prompt="Mercutio", seed=1, max_tokens=20, cache_salt="a")["text"]
    after = [choice(client, prompt="Mercutio", seed=1, max_tokens=20, state=state, best_of=n)["text"] for n in (1, 2)]
    assert before not in after
    answers = [choice(client, prompt="Mercutio", seed=1, max_tokens=20, best_of=n) for n in (1, 1)]
    assert [answer["text"] for answer in answers] == [before] * 2


def test_state__that_is_not_this_servers_is_refused(client: FlaskClient) -> None:
    good = choice(client, prompt=PROMPT, max_tokens=0)["state"]
    chance = random.Random(1)
    for _ in range(40):
        bad = changed(good, chance)
        if bad != good:
            refused(client.post("/v1/completions", json={"prompt": "a", "state": bad}), 400, "invalid_state", "state")
    refused(client.post("/v1/completions", json={"prompt": "a", "state": 1}), 400, "wrong_type", "state")
    long = {"prompt": "a", "state": "a" * 60_000}
    refused(client.post("/v1/completions", json=long), 400, "invalid_state", "state")


def test_state__of_another_model_or_time_is_refused(tmp_path: Any) -> None:
    store = ModelStore(tmp_path)
    publish_tiny(store)
    publish_tiny(store, "other", seed=1)
    settings = {"model_store": tmp_path, "model": "tiny", "state_keys": "a key for this test alone"}
    with client_of(Settings(**settings)) as client:
        state = choice(client, prompt=PROMPT, seed=1, max_tokens=0, model="other")["state"]
        assert choice(client, prompt="a", state=state, max_tokens=1)["text"]  # with the model of the state
        wrong = {"prompt": "a", "state": state, "model": "tiny"}
        refused(client.post("/v1/completions", json=wrong), 400, "state_model_mismatch", "state")
        message = client.post("/v1/completions", json=wrong).get_json()["error"]["message"]
        assert "the state is of other@1, and tiny@1 has other weights" in message
        assert "leave model out" in message
        there = session(client, text=PROMPT)
        expiring = ok(client.get(f"{there}/state?ttl_s=0.001"))["state"]
        time.sleep(0.01)
        refused(client.post("/v1/completions", json={"prompt": "a", "state": expiring}), 400, "state_expired", "state")
        sealer, opened = (
            StateSealer(["a key for this test alone"]),
            StateSealer(["a key for this test alone"]).open(state),
        )
        fields = opened.header.model_dump()
        hidden = opened.hidden(opened.header.identity, (1, 16), "tiny@1")
        far = sealer.seal(StateHeader(**(fields | {"position": 2**53})), hidden)
        response = client.post("/v1/completions", json={"prompt": "a", "state": far})
        assert (response.status_code, response.get_json()["error"]["code"]) == (400, "out_of_range")
        gone = sealer.seal(StateHeader(**(fields | {"model": "gone@1", "identity": "0" * 64})), hidden)
        response = client.post("/v1/completions", json={"prompt": "a", "state": gone})
        assert (response.status_code, response.get_json()["error"]["code"]) == (404, "model_not_found")
