"""POST /v1/inspect: the engine's own numbers for texts, sessions and states, and errors that name the bad field."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flask.testing import FlaskClient
from numpy.typing import NDArray
from pydantic import SecretStr

from service.api_keys import new_key
from service.engine.gates import Gates, gate_scales
from service.engine.request import Request
from service.generation import inspector
from service.model.gru import GRUCharModel
from service.model.quantize import STATE_SCALE, quantize
from service.registry.loaded_models import LoadedModel
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.application import client_of, described, ok, refused
from tests.harness.models import TINY_CHARSET, loaded_model, publish_tiny, random_tensors, tiny_config

TEXT = "ROMEO: what light is it, Juliet?\nTell me of all that was and will be. " * 4  # longer than a segment
DEEP: dict[str, Any] = {"num_layers": 3, "num_units": 24}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Models: `tiny`; `deep`, of 3 layers; `accents`, which knows é."""
    store = ModelStore(tmp_path_factory.mktemp("inspect"))
    publish_tiny(store)
    publish_tiny(store, "deep", **DEEP)
    publish_tiny(store, "accents", charset=TINY_CHARSET + "\u00e9")
    return store


@pytest.fixture(scope="module")
def client(store: ModelStore) -> Iterator[FlaskClient]:
    settings = Settings(
        model_store=store.root, model="tiny", precision="int8", session_checkpoint_chars=32, session_text_chars=2100
    )
    with client_of(settings) as client:
        for model in ("tiny", "deep"):
            client.post("/v1/completions", json={"model": model, "prompt": "z", "max_tokens": 1})
        yield client


def inspect(client: FlaskClient, **body: Any) -> dict[str, Any]:
    """The answer to an inspection."""
    answer: dict[str, Any] = ok(client.post("/v1/inspect", json=body))
    return answer


def array(answer: dict[str, Any]) -> NDArray[np.float16]:
    """The array in a part of an answer."""
    return np.frombuffer(base64.b64decode(answer["data"]), "<f2").reshape(answer["shape"])


def states_of(model: LoadedModel, text: str) -> NDArray[np.float32]:
    """(n + 1, L, H) from the engine, stepped over the whole text: the state before it and after each character."""
    positions = tuple(range(1, len(text) + 1))
    handle = model.engine.submit([Request(model.charset.encode(text), 0, 0, checkpoint_positions=positions)])[0]
    checkpoints = handle.wait().checkpoints
    return np.stack([model.engine.initial_hidden(), *(checkpoints[position] for position in positions)])


@pytest.mark.parametrize("name", ["tiny", "deep"])
def test_states__equal_the_engines_bit_for_bit(client: FlaskClient, store: ModelStore, name: str) -> None:
    answer = inspect(client, model=name, text=TEXT)
    with loaded_model(store, name, precision="int8") as model:
        states = states_of(model, TEXT)
    assert array(answer["states"]).tobytes() == states[1:].astype("<f2").tobytes()
    assert not array(answer["before"]).any()
    assert answer["states"]["shape"] == [len(TEXT), *states.shape[1:]]
    assert (answer["from"], answer["to"], answer["text"], answer["model"]) == (0, len(TEXT), TEXT, f"{name}@1")
    assert (answer["dtype"], answer["byte_order"], answer["gates"]) == ("float16", "little", None)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_states__are_the_same_for_every_kernel(store: ModelStore, kernel: str, client: FlaskClient) -> None:
    from service.engine.native.native_stepper import variants

    if kernel == "native" and not variants():
        pytest.skip("the kernel was not compiled here")
    settings = Settings(model_store=store.root, model="deep", precision="int8", kernel=kernel)
    app = create_app(settings)
    try:
        other = inspect(app.test_client(), text=TEXT, gates=True)
    finally:
        app.extensions["gru_serve"].close()
    assert other == inspect(client, model="deep", text=TEXT, gates=True)


def test_range__is_a_part_of_the_whole_answer(client: FlaskClient) -> None:
    whole = inspect(client, text=TEXT, gates=True, logprobs=3, embedding=True)
    states, update = array(whole["states"]), array(whole["gates"]["update"])
    for start, end in ((0, len(TEXT)), (0, 1), (5, 9), (100, 270), (len(TEXT), len(TEXT)), (7, 7)):
        part = inspect(client, text=TEXT, gates=True, logprobs=3, embedding=True, **{"from": start, "to": end})
        assert (part["from"], part["to"], part["text"]) == (start, end, TEXT[start:end])
        assert array(part["states"]).tobytes() == states[start:end].tobytes()
        assert array(part["gates"]["update"]).tobytes() == update[start:end].tobytes()
        if start:
            assert array(part["before"]).tobytes() == states[start - 1].tobytes()
        if start < end:
            assert part["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][start:end]
            assert part["logprobs"]["text_offset"] == list(range(start, end))
        else:
            assert part["logprobs"] is None


@pytest.mark.parametrize("name", ["tiny", "deep"])
def test_gates__give_the_states_and_match_the_reference_model(client: FlaskClient, name: str) -> None:
    answer = inspect(client, model=name, text=TEXT, gates=True)
    gates = {kind: array(values).astype(np.float64) for kind, values in answer["gates"].items()}
    after = array(answer["states"]).astype(np.float64)
    before = np.concatenate([array(answer["before"])[None].astype(np.float64), after[:-1]])
    made = (1 - gates["update"]) * gates["candidate"] + gates["update"] * before
    assert np.abs(made - after).max() < 0.003  # float16
    config = tiny_config(**(DEEP if name == "deep" else {}))
    reference = GRUCharModel.from_tensors(config, random_tensors(config)).double()
    with torch.no_grad():
        inputs = reference.embedding(torch.from_numpy(_ids(TEXT)))
        for layer in range(config.num_layers):
            expected = _gates(reference, layer, inputs, torch.from_numpy(before[:, layer].copy()))
            for kind, values in expected.items():
                assert np.abs(values - gates[kind][:, layer]).max() < 0.02, (layer, kind)  # 8-bit weights and states
                assert values.std() > 0.01
            inputs = torch.from_numpy(after[:, layer].copy())


def test_gates__equal_those_that_the_engine_used(store: ModelStore) -> None:
    """Bit for bit in float32: the last lines of the engine's step, applied to these gates, give its next states."""
    for name in ("tiny", "deep"):
        for precision in ("int8", "int4"):
            with loaded_model(store, name, precision=precision) as model:
                states = states_of(model, TEXT)
                before, after = states[:-1], states[1:]
                _, update, candidate = model.gates(model.charset.encode(TEXT), before, after)
            assert (((before - candidate) * update + candidate) == after).all()


def test_gate_products__too_large_for_float32_are_exact() -> None:
    from service.engine.gate_values import _Product

    config = tiny_config(num_units=1152, embedding_dim=1)
    tensors = {name: tensor.numpy() for name, tensor in GRUCharModel(config).state_dict().items()}
    tensors["gru.weight_hh_l0"][:] = np.where(np.arange(1152) % 97, 1.0, 0.99)  # all weights at their limit
    linear = quantize(config, tensors, "int8").layers[0].recurrent
    states = np.ones((2, 1152), np.float32)
    states[1, ::3] = 126 / 127
    exact = np.rint(states.astype(np.float64) * STATE_SCALE).astype(np.int64) @ linear.weight.astype(np.int64).T
    assert exact.max() > 2**24
    assert (_Product(linear)(states) == exact).all()


def test_gate_values__equal_those_that_advance_uses() -> None:
    config = tiny_config(num_units=40)
    recurrent = quantize(config, random_tensors(config), "int8").layers[0].recurrent
    random = np.random.default_rng(0)
    products = random.integers(-(10**5), 10**5, (70, 120), dtype=np.int32)
    added = random.standard_normal((70, 120)).astype(np.float32) * gate_scales(40)
    hidden = random.uniform(-1, 1, (70, 40)).astype(np.float32)
    _, update, candidate = Gates(recurrent).values(products, added)
    expected = (hidden - candidate) * update + candidate
    Gates(recurrent).advance(products, added, hidden)
    assert (hidden == expected).all()


def test_session__gives_the_same_answer_as_its_text(client: FlaskClient) -> None:
    path = "/v1/sessions/inspected"
    ok(client.put(path, json={"text": TEXT[:50], "seed": 7}), 201)
    written = ok(client.post(f"{path}/generate", json={"max_tokens": 200}))["text"]
    text = TEXT[:50] + written
    fields = {"gates": True, "logprobs": 2, "embedding": True}
    answer = inspect(client, session="inspected", **fields)
    assert answer == inspect(client, text=text, **fields)
    for start, end in ((0, 10), (33, 71), (249, 250)):
        part = {"from": start, "to": end}
        assert inspect(client, session="inspected", **fields, **part) == inspect(client, text=text, **fields, **part)
    next_characters = ok(client.post(f"{path}/feed", json={"text": "", "num_next": 2}))["next"]
    assert answer["next"] == next_characters
    assert ok(client.get(path))["position"] == 250


def test_logprobs__equal_those_of_a_feed(client: FlaskClient) -> None:
    ok(client.put("/v1/sessions/scored", json={"seed": 7}), 201)
    fed = ok(client.post("/v1/sessions/scored/feed", json={"text": TEXT, "logprobs": 4}))["logprobs"]
    assert inspect(client, text=TEXT, logprobs=4)["logprobs"] == fed
    assert math.isfinite(fed["token_logprobs"][0])


def test_portable_state__continues_where_another_call_ended(client: FlaskClient) -> None:
    """This is how a client follows a stream: each call reads only the new characters."""
    whole = inspect(client, text=TEXT, gates=True, portable=True)
    state, parts = None, []
    for start in range(0, len(TEXT), 60):
        body = {"text": TEXT[start : start + 60], "gates": True, "portable": True}
        answer = inspect(client, **body, **({"state": state} if state else {}))
        assert (answer["from"], answer["to"]) == (start, min(start + 60, len(TEXT)))
        state = answer["state"]
        parts.append(array(answer["states"]))
    assert np.concatenate(parts).tobytes() == array(whole["states"]).tobytes()
    ok(client.put("/v1/sessions/sealed", json={"text": TEXT, "seed": 0}), 201)
    assert inspect(client, session="sealed", portable=True)["state"] == state == whole["state"]
    part = inspect(client, state=state, text="And he", **{"from": len(TEXT) + 2, "to": len(TEXT) + 5})
    assert part["text"] == "d h"
    assert array(part["states"]).tobytes() == array(inspect(client, text=TEXT + "And he")["states"])[-4:-1].tobytes()


def test_embeddings__are_rows_of_the_embedding_table(client: FlaskClient) -> None:
    table = random_tensors(tiny_config())["embedding.weight"].astype(np.float16)
    answer = inspect(client, text="ROMEO:", embedding=True)
    assert array(answer["embedding"]).tobytes() == table[_ids("ROMEO:")].tobytes()


def test_text__is_read_in_its_normal_form(client: FlaskClient) -> None:
    """An e and its accent are read as one character, which only the model `accents` knows."""
    decomposed, composed = "Rome\u0301o", "Rom\u00e9o"
    answer = inspect(client, model="accents", text=decomposed, gates=True)
    assert (answer["text"], answer["to"]) == (composed, 5)
    assert answer["states"]["shape"][0] == 5
    assert answer == inspect(client, model="accents", text=composed, gates=True)
    error = refused(client.post("/v1/inspect", json={"text": decomposed}), 400, "unknown_characters", "text")
    assert "(U+00E9) at 3" in error["message"]


def test_range__up_to_the_limit_is_answered_and_above_it_refused(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = "a" * inspector.MAX_CHARS
    assert inspect(client, text=longest)["states"]["shape"] == [2048, 1, 16]
    refused(client.post("/v1/inspect", json={"text": longest + "a"}), 400, "out_of_range", "text")
    ok(client.put("/v1/sessions/long", json={"text": longest + "bc", "seed": 1}), 201)
    answer = inspect(client, session="long")
    assert (answer["from"], answer["to"]) == (2, 2050)
    refused(client.post("/v1/inspect", json={"session": "long", "from": 1}), 400, "out_of_range", "from")
    # The size of all states together is limited, too: here to 1,700 states of 3 x 24 numbers.
    monkeypatch.setattr(inspector, "_MAX_NUMBERS", 1700 * 3 * 24)
    refused(client.post("/v1/inspect", json={"model": "deep", "text": "a" * 1701}), 400, "out_of_range", "from")
    assert inspect(client, model="deep", text="a" * 1701, **{"from": 1})["states"]["shape"] == [1700, 3, 24]
    assert inspect(client, text=longest)["states"]["shape"] == [2048, 1, 16]


def test_range__before_the_retained_text_is_gone(client: FlaskClient) -> None:
    ok(client.put("/v1/sessions/old", json={"text": "a" * 2000, "seed": 1}), 201)
    for _ in range(3):
        ok(client.post("/v1/sessions/old/feed", json={"text": "b" * 1000}))
    facts = ok(client.get("/v1/sessions/old"))
    assert facts["text_from"] > 0
    refused(client.post("/v1/inspect", json={"session": "old", "from": 10, "to": 20}), 410, "position_gone")
    start = facts["text_from"]
    part = inspect(client, session="old", **{"from": start, "to": start + 3})
    text = "a" * 2000 + "b" * 3000
    state = inspect(client, text=text[:2048], portable=True)["state"]
    whole = inspect(client, text=text[2048 : start + 3], state=state, **{"from": start})
    assert array(part["states"]).tobytes() == array(whole["states"]).tobytes()
    assert (part["from"], part["text"]) == (start, text[start : start + 3])


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "out_of_range", "text"),
        ({"text": "a", "session": "b"}, 400, "out_of_range", "text"),
        ({"session": "nobody"}, 404, "session_not_found", None),
        ({"session": "x", "model": "tiny"}, 400, "out_of_range", "model"),
        ({"session": "x", "state": "y"}, 400, "out_of_range", "state"),
        ({"session": "a b"}, 400, "out_of_range", "session"),
        ({"text": "a", "model": "nobody"}, 404, "model_not_found", "model"),
        ({"text": "aéb€"}, 400, "unknown_characters", "text"),
        ({"text": "a\ud800"}, 400, "unknown_characters", "text"),
        ({"text": "abc", "from": 2, "to": 1}, 400, "out_of_range", "from"),
        ({"text": "abc", "to": 4}, 400, "out_of_range", "to"),
        ({"text": "abc", "from": -1}, 400, "out_of_range", "from"),
        ({"text": "abc", "from": 1.5}, 400, "wrong_type", "from"),
        ({"text": "abc", "start": 1}, 400, "unknown_field", "start"),
        ({"text": "abc", "logprobs": 21}, 400, "out_of_range", "logprobs"),
        ({"text": "abc", "gates": 1}, 400, "wrong_type", "gates"),
        ({"text": "abc", "state": "no.state"}, 400, "invalid_state", "state"),
        ({"text": "abc", "stream": True}, 400, "unknown_field", "stream"),
        ({"text": 5}, 400, "wrong_type", "text"),
    ],
)
def test_bad_request__is_refused_and_names_its_field(
    client: FlaskClient, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    refused(client.post("/v1/inspect", json=body), status, code, param)


def test_portable_state__refuses_another_model_and_a_position_before_it(client: FlaskClient) -> None:
    state = inspect(client, text="ROMEO:", portable=True)["state"]
    wrong = client.post("/v1/inspect", json={"text": "a", "state": state, "model": "deep"})
    refused(wrong, 400, "state_model_mismatch", "state")
    refused(client.post("/v1/inspect", json={"text": "a", "state": state, "from": 3}), 400, "out_of_range", "from")


def test_position__after_the_end_of_a_session_is_a_conflict(client: FlaskClient) -> None:
    ok(client.put("/v1/sessions/short", json={"text": "abc", "seed": 1}), 201)
    error = refused(client.post("/v1/inspect", json={"session": "short", "to": 9}), 409, "position_conflict", "to")
    assert error["position"] == 3


def test_session__of_another_owner_is_not_found(store: ModelStore) -> None:
    (alice, one), (bob, two) = new_key("alice"), new_key("bob")
    settings = Settings(model_store=store.root, model="tiny", api_keys=SecretStr(f"{one},{two}"))
    with client_of(settings) as client:
        hers, his = ({"Authorization": f"Bearer {key}"} for key in (alice, bob))
        ok(client.put("/v1/sessions/hers", json={"text": "abc", "seed": 1}, headers=hers), 201)
        assert ok(client.post("/v1/inspect", json={"session": "hers"}, headers=hers))["text"] == "abc"
        refused(client.post("/v1/inspect", json={"session": "hers"}, headers=his), 404, "session_not_found")
        assert client.post("/v1/inspect", json={"text": "abc"}).status_code == 401


def test_openapi__describes_inspect(client: FlaskClient) -> None:
    description = described(client)
    body = description["components"]["schemas"]["InspectBody"]["properties"]
    assert {"model", "text", "session", "from", "to", "gates", "logprobs"} <= set(body)
    assert {"200", "400", "404", "409", "410", "429"} <= set(description["paths"]["/v1/inspect"]["post"]["responses"])


def _ids(text: str) -> NDArray[np.int64]:
    characters = tiny_config().charset
    return np.array([characters.index(char) for char in text])


def _gates(
    model: GRUCharModel, layer: int, inputs: torch.Tensor, before: torch.Tensor
) -> dict[str, NDArray[np.float64]]:
    """The definition of the gates, in float64, from (n, E or H) inputs and the (n, H) states before each character."""
    weight_ih, weight_hh, bias_ih, bias_hh = model.gru.all_weights[layer]
    (ir, iz, i_n), (hr, hz, hn) = (
        (inputs @ weight_ih.T + bias_ih).chunk(3, 1),
        (before @ weight_hh.T + bias_hh).chunk(3, 1),
    )
    reset = torch.sigmoid(ir + hr)
    return {
        "reset": reset.numpy(),
        "update": torch.sigmoid(iz + hz).numpy(),
        "candidate": torch.tanh(i_n + reset * hn).numpy(),
    }
