"""Texts that arrive over HTTP, in the characters of the model: prompts, feeds, stops, biases, inspected texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from service.settings import Settings
from service.store.model_store import ModelStore
from tests.harness.application import client_of, ok, refused
from tests.harness.models import publish_tiny

COMPOSED, DECOMPOSED = "\u00e9", "e\u0301"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    """An application with a model that writes é as one character, and one that writes it as two."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    publish_tiny(store, "one", charset="\n acf\"'é", seed=3)
    publish_tiny(store, "two", charset="\n aef\u0301", seed=3)
    with client_of(Settings(model_store=store.root, model="one")) as client:
        ok(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}))  # starts the engine's thread
        ok(client.post("/v1/completions", json={"model": "two", "prompt": "a", "max_tokens": 1}))
        yield client


@pytest.fixture
def session(client: FlaskClient) -> Iterator[str]:
    """The path of a session of the model `one`."""
    path = f"/v1/sessions/{ok(client.post('/v1/sessions', json={'text': 'caf', 'seed': 3}), 201)['id']}"
    yield path
    client.delete(path)


def complete(client: FlaskClient, **fields: Any) -> tuple[str, str]:
    """Return the text of a completion and why it ended."""
    choice = ok(client.post("/v1/completions", json={"prompt": "caf", "seed": 3, "max_tokens": 100} | fields))
    return choice["choices"][0]["text"], choice["choices"][0]["finish_reason"]


def test_prompt__of_several_that_has_unknown_characters_is_named(client: FlaskClient) -> None:
    for prompt, param in (("漢", "prompt"), (["a", "漢"], "prompt[1]"), (["漢"], "prompt[0]")):
        refused(client.post("/v1/completions", json={"prompt": prompt}), 400, "unknown_characters", param)
    long = {"prompt": ["a", "a" * 200_000]}
    assert refused(client.post("/v1/completions", json=long), 400, "out_of_range", "prompt[1]")["message"]


@pytest.mark.parametrize("stop", ["→", ["c", "漢"], ["漢", "é→"]])
def test_stop__that_the_model_cannot_write_is_refused(client: FlaskClient, session: str, stop: Any) -> None:
    body = {"stop": stop, "max_tokens": 5}
    for response in (
        client.post("/v1/completions", json=body | {"prompt": "a"}),
        client.post("/v1/completions", json=body | {"prompt": "a", "stream": True}),
        client.post(f"{session}/generate", json=body),
        client.post(f"{session}/generate", json=body | {"stream": True}),
    ):
        param = "stop" if isinstance(stop, str) else f"stop[{[one.isascii() for one in stop].index(False)}]"
        message = refused(response, 400, "unknown_characters", param)["message"]
        assert '"unknown_chars": "drop" leaves them out' in message
        assert "fold" not in message  # nothing that the model knows is like them
    assert ok(client.get(session))["position"] == 3


def test_stop__is_folded_as_a_prompt_is(client: FlaskClient, session: str) -> None:
    for folded, stop in (("'", "’"), ('"', "”"), ("f", "ｆ")):
        expected = complete(client, stop=folded)
        assert expected[1] == "stop"
        assert complete(client, stop=stop, unknown_chars="fold") == expected
        run = {"max_tokens": 100, "stop": stop, "unknown_chars": "fold"}
        assert ok(client.post(f"{session}/generate", json=run))["text"] == expected[0]
        ok(client.post(f"{session}/rewind", json={"position": 3}))


def test_stop__with_unknown_characters_is_left_out_whole_by_drop(client: FlaskClient, session: str) -> None:
    """Without its unknown characters, `<c>` would end the text at every c."""
    expected = complete(client)
    assert "c" in expected[0]
    assert complete(client, stop="<c>", unknown_chars="drop") == expected
    assert complete(client, stop=["<c>", "c"], unknown_chars="drop") == complete(client, stop="c")
    run = {"max_tokens": 100, "stop": "<c>", "unknown_chars": "drop"}
    assert ok(client.post(f"{session}/generate", json=run))["finish_reason"] == "length"


def test_stop__that_folding_empties_or_makes_too_long_is_refused(client: FlaskClient, session: str) -> None:
    for stop, advice in (
        ("\u200b", "leave this stop string out"),
        ("ﬀ" * 200, "with 400 characters, and it may have at most 256"),
    ):
        for path, prompt in (("/v1/completions", {"prompt": "a"}), (f"{session}/generate", {})):
            response = client.post(path, json={"stop": stop, "unknown_chars": "fold"} | prompt)
            assert advice in refused(response, 400, "out_of_range", "stop")["message"]


@pytest.mark.parametrize("model", ["one", "two"])
def test_stop__matches_in_every_unicode_form(client: FlaskClient, model: str) -> None:
    texts = {complete(client, model=model, prompt="a", stop=stop) for stop in (COMPOSED, DECOMPOSED)}
    assert len(texts) == 1
    text, reason = texts.pop()
    assert reason == "stop", "the text of this seed has no é: choose another"
    assert not {COMPOSED, "\u0301"} & set(text)
    for stop in (COMPOSED, DECOMPOSED):
        session = ok(client.post("/v1/sessions", json={"model": model, "text": "a", "seed": 3}), 201)
        path = f"/v1/sessions/{session['id']}"
        run = {"max_tokens": 100, "stop": stop, "position": 1}
        assert ok(client.post(f"{path}/generate", json=run))["text"] == text
        assert ok(client.post(f"{path}/generate", json=run))["text"] == text  # the same run, sent again
        assert ok(client.get(path))["position"] == 1 + len(text)
        client.delete(path)


def test_logit_bias__is_folded_dropped_or_refused_as_a_prompt_is(client: FlaskClient, session: str) -> None:
    banned = dict.fromkeys("’‘'", -100.0)
    response = client.post("/v1/completions", json={"prompt": "a", "logit_bias": banned})
    refused(response, 400, "unknown_characters", "logit_bias")
    assert "'" in complete(client)[0]
    assert "'" not in complete(client, logit_bias=banned, unknown_chars="fold")[0]
    assert "'" not in complete(client, logit_bias={"'": -100, "漢": 5}, unknown_chars="drop")[0]
    run = {"max_tokens": 100, "logit_bias": banned, "unknown_chars": "fold"}
    assert "'" not in ok(client.post(f"{session}/generate", json=run))["text"]
    response = client.post("/v1/completions", json={"prompt": "a", "logit_bias": {COMPOSED: 1, DECOMPOSED: 2}})
    assert "a second spelling" in refused(response, 400, "out_of_range", "logit_bias")["message"]
    assert complete(client, logit_bias={COMPOSED: 9, DECOMPOSED: 9}) == complete(client, logit_bias={COMPOSED: 9})


@pytest.mark.parametrize("prompt", [f"caf{COMPOSED}", f"caf{DECOMPOSED}"])
def test_texts__are_the_same_in_every_unicode_form(client: FlaskClient, session: str, prompt: str) -> None:
    assert complete(client, prompt=prompt) == complete(client, prompt=f"caf{COMPOSED}")
    assert ok(client.post(f"{session}/feed", json={"text": prompt[3:]}))["position"] == 4
    assert ok(client.get(f"{session}/text"))["text"] == f"caf{COMPOSED}"
    assert ok(client.post("/v1/inspect", json={"text": prompt}))["text"] == f"caf{COMPOSED}"


def test_accent__in_a_feed_of_its_own_joins_no_letter_of_the_text_before(client: FlaskClient) -> None:
    """The letter has been read, and its position was acknowledged: it can't become another one."""
    one, two = ok(client.post("/v1/sessions", json={"text": "ca"}), 201), {"model": "two", "text": "fe"}
    path = f"/v1/sessions/{one['id']}"
    for body in ({"text": "\u0301"}, {"text": "\u0301c", "position": 2}):
        error = refused(client.post(f"{path}/feed", json=body), 400, "unknown_characters", "text")
        assert "send a letter and its marks in one text" in error["message"]
    state = ok(client.get(f"{path}/state"))["state"]
    response = client.post("/v1/sessions", json={"state": state, "text": "\u0301"})
    assert "in one text" in refused(response, 400, "unknown_characters", "text")["message"]
    # To a model that writes accents as characters, the two feeds are the text in one.
    path = f"/v1/sessions/{ok(client.post('/v1/sessions', json=two), 201)['id']}"
    assert ok(client.post(f"{path}/feed", json={"text": "\u0301"}))["position"] == 3
    whole = f"/v1/sessions/{ok(client.post('/v1/sessions', json=two | {'text': f'f{COMPOSED}'}), 201)['id']}"
    fed = [ok(client.post(f"{where}/feed", json={"text": "a"})) for where in (path, whole)]
    assert fed[0] == fed[1]


def test_inspect__folds_or_drops_unknown_characters_on_request(client: FlaskClient) -> None:
    error = refused(client.post("/v1/inspect", json={"text": "c’→"}), 400, "unknown_characters", "text")
    for value in ("fold_drop", "drop"):
        assert f'"unknown_chars": "{value}"' in error["message"]
    assert '"fold"' not in error["message"]
    assert ok(client.post("/v1/inspect", json={"text": "c’", "unknown_chars": "fold"}))["text"] == "c'"
    assert ok(client.post("/v1/inspect", json={"text": "c→", "unknown_chars": "drop"}))["text"] == "c"


def test_rebase__to_a_model_that_does_not_know_the_text_says_what_helps(client: FlaskClient, session: str) -> None:
    response = client.post(f"{session}/feed", json={"text": "", "rebase": "two", "unknown_chars": "drop"})
    message = refused(response, 400, "unknown_characters", "rebase")["message"]
    assert "'c' (U+0063) at 0" in message
    assert "start a new session" in message
