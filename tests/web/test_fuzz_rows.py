"""Random requests over everything that reaches a row: sampling, biases, positions, states, rebase, records.

`FUZZ_REQUESTS=100000 pytest tests/web/test_fuzz_rows.py` sends more of them.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from service import assembly
from service.engine.sampling_settings import PLAIN
from service.errors import GruServeError
from service.sessions import record
from service.sessions.memory_store import MemoryStore
from service.sessions.portable import StateHeader, StateSealer
from service.sessions.record import Record
from service.sessions.session import SessionKey
from service.settings import Settings
from service.store.model_store import ModelStore
from service.web.app import create_app
from tests.harness.models import loaded_model, publish_tiny

NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1500"))
NUM_THREADS = 4
KEY = "a key for tests alone"
MODELS = ("tiny", "few", "deep")
IDS = ("a", "b", "c", "d")
TEXTS = ("", "a", "ab ab", "ROMEO:", "aé", "zzz", "a" * 300, "\u0301", "…", "\U0001f600", "\ud800", "b" * 5000)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    20,
    21,
    100,
    2**31,
    2**53,
    2**53 - 1,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-300, 1e300, -1.0, 99.9, 100.0, 101.0, 1e-9, float("nan"), float("inf"), "1", None)
SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
FORBIDDEN = {"internal_error", "engine_failed"}  # any of these is a fault of the server


@dataclass
class Served:
    """The application under test, and what the fuzzer needs of its inside."""

    new_client: Callable[[], FlaskClient]
    store: MemoryStore
    identities: dict[str, tuple[str, tuple[int, int]]]  # identity and state shape of each model


@pytest.fixture
def served(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    models = ModelStore(tmp_path)
    publish_tiny(models)
    publish_tiny(models, "few", charset=" ab")
    publish_tiny(models, "deep", num_units=8, num_layers=3)
    identities = {}
    for name in MODELS:
        with loaded_model(models, name) as model:
            identities[name] = model.identity, model.state_shape
    stores: list[MemoryStore] = []

    def noting(*arguments: Any) -> MemoryStore:
        stores.append(MemoryStore(*arguments))
        return stores[0]

    monkeypatch.setattr(assembly, "MemoryStore", noting)
    settings = Settings(
        model_store=tmp_path, model="tiny", state_keys=KEY, max_tokens=200, session_checkpoint_chars=16,
        session_text_chars=1024, log_level="warning",
    )  # fmt: skip
    app = create_app(settings)
    try:
        yield Served(app.test_client, stores[0], identities)
    finally:
        app.extensions["gru_serve"].close()


class Fuzzer:
    """Sends random requests from one thread."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served, self.chance = served, random.Random(seed)
        self.client = served.new_client()
        self.seen: Counter[str] = Counter()  # answers, by status and code

    def run(self, num_requests: int) -> Counter[str]:
        kinds = [self.complete, self.create, self.create_from_state, self.feed, self.generate, self.generate]
        kinds += [self.score, self.suggest]
        kinds += [self.resume, self.rewind, self.fork, self.inspect, self.damage_record]
        for _ in range(num_requests):
            self.chance.choice(kinds)()
        return self.seen

    def send(self, method: str, path: str, body: Any = None) -> None:
        data = None if body is None else json.dumps(body)
        with self.client.open(path, method=method, data=data, content_type="application/json") as response:
            text = response.get_data(as_text=True)
        code = ""
        if response.status_code >= 400:
            code = json.loads(text)["error"]["code"]
        elif "event: error" in text:
            code = json.loads(text.rpartition("event: error\ndata: ")[2].split("\n")[0])["error"]["code"]
        self.seen[f"{response.status_code} {code}".strip()] += 1
        assert code not in FORBIDDEN, (method, path, body, text)

    def number(self) -> Any:
        return self.chance.choice(NUMBERS) if self.chance.random() < 0.5 else self.chance.randrange(400)

    def mostly(self, usual: Any, other: Any) -> Any:
        return usual if self.chance.random() < 0.8 else other

    def sampling(self) -> dict[str, Any]:
        chance, fields = self.chance, {}
        for name in chance.sample(SAMPLING, chance.randrange(3)):
            fields[name] = self.mostly(round(chance.uniform(0.01, 1), 2), chance.choice(FLOATS))
        if chance.random() < 0.2:
            fields["top_k"] = self.number()
        if chance.random() < 0.3:
            chars = chance.sample(["a", "b", " ", "z", "é", "ab", "", "\u0301", "\ud800"], chance.randrange(4))
            fields["logit_bias"] = {
                char: self.mostly(chance.uniform(-100, 100), chance.choice(FLOATS)) for char in chars
            }
        if chance.random() < 0.2:
            fields["stop"] = chance.sample(["a", "b", "ab", "é", "z" * 256, "z" * 257, "", "\u0301" * 100], 2)
        for name, most in (("stop_token_ids", 4), ("allowed_token_ids", 6)):
            if chance.random() < 0.15:
                fields[name] = [self.mostly(chance.randrange(30), self.number()) for _ in range(chance.randrange(most))]
        if chance.random() < 0.2:
            fields |= {
                "min_tokens": self.mostly(chance.randrange(30), self.number()),
                "include_stop_str_in_output": True,
            }
        if chance.random() < 0.3:
            fields["seed"] = self.number()
        fields["max_tokens"] = self.mostly(chance.randrange(1, 40), self.number())
        fields["stream"] = chance.random() < 0.3
        return fields

    def complete(self) -> None:
        chance, body = self.chance, self.sampling()
        body |= {"model": chance.choice(MODELS), "prompt": chance.choice(TEXTS)}
        if chance.random() < 0.2:
            body["prompt"] = chance.choices(TEXTS, k=chance.randrange(1, 4))
        elif chance.random() < 0.2:
            body["prompt"] = [self.mostly(chance.randrange(30), self.number()) for _ in range(chance.randrange(9))]
        if chance.random() < 0.1:
            body |= {"prompt_logprobs": self.mostly(2, self.number()), "return_token_ids": True}
        for name, values in (("n", 4), ("best_of", 4), ("logprobs", 22)):
            if chance.random() < 0.2:
                body[name] = self.mostly(chance.randrange(values), self.number())
        body["echo"] = chance.random() < 0.3
        body["unknown_chars"] = chance.choice(["error", "fold", "drop"])
        self.send("POST", "/v1/completions", body)

    def path(self) -> str:
        return f"/v1/sessions/{self.chance.choice(IDS)}"

    def create(self) -> None:
        path = self.path()
        if self.chance.random() < 0.5:
            self.send("DELETE", path)
        body = {"model": self.chance.choice(MODELS), "text": self.chance.choice(TEXTS), "seed": self.number()}
        self.send("PUT", path, body | {"unknown_chars": self.chance.choice(["error", "fold", "drop"])})

    def create_from_state(self) -> None:
        """States that the server's key has signed: their numbers are what they are."""
        chance, model = self.chance, self.chance.choice(MODELS)
        identity, shape = self.served.identities[model]
        hidden = np.array([chance.uniform(-1, 1) for _ in range(shape[0] * shape[1])], np.float32)
        if chance.random() < 0.3:
            hidden[chance.randrange(hidden.size)] = chance.choice([np.nan, np.inf, -np.inf, 1.5, -1e30, 1.0])
        if chance.random() < 0.1:
            hidden = hidden[: chance.randrange(hidden.size)]
        header = StateHeader.model_construct(
            model=self.mostly(f"{model}@1", chance.choice([f"{name}@1" for name in MODELS])),
            identity=identity,
            position=self.mostly(chance.choice([0, 7, 2**53 - 5, 2**53 - 50]), self.number()),
            seed=self.number(),
            expires_at=None,
        )
        path = self.path()
        self.send("DELETE", path)
        self.send("PUT", path, {"state": StateSealer([KEY]).seal(header, hidden), "text": chance.choice(TEXTS[:4])})

    def position(self) -> dict[str, Any]:
        return {"position": self.number()} if self.chance.random() < 0.2 else {}

    def feed(self) -> None:
        chance = self.chance
        body = {"text": chance.choice(TEXTS), "num_next": self.mostly(3, self.number())} | self.position()
        if chance.random() < 0.3:
            body["rebase"] = chance.choice(MODELS)
        if chance.random() < 0.3:
            body["logprobs"] = self.number()
        body["unknown_chars"] = chance.choice(["error", "fold", "drop"])
        self.send("POST", f"{self.path()}/feed", body)

    def generate(self) -> None:
        self.send("POST", f"{self.path()}/generate", self.sampling() | self.position())

    def resume(self) -> None:
        self.send("GET", f"{self.path()}/generate" + self.mostly("", f"?after={self.number()}"))

    def rewind(self) -> None:
        self.send("POST", f"{self.path()}/rewind", {"position": self.number()})

    def fork(self) -> None:
        self.send(
            "POST", f"{self.path()}/fork", {"id": self.chance.choice(IDS), "seed": self.number()} | self.position()
        )

    def inspect(self) -> None:
        chance = self.chance
        body: dict[str, Any] = {"gates": chance.random() < 0.5, "portable": chance.random() < 0.5}
        body |= {"text": chance.choice(TEXTS), "model": chance.choice(MODELS)} if chance.random() < 0.5 else {
            "session": chance.choice(IDS)
        }  # fmt: skip
        for name in ("from", "to", "logprobs"):
            if chance.random() < 0.3:
                body[name] = self.number()
        self.send("POST", "/v1/inspect", body)

    def score(self) -> None:
        chance = self.chance
        body: dict[str, Any] = {"candidates": chance.choices(TEXTS[1:], k=chance.randrange(1, 6))}
        body |= {"prompt": self.mostly("", chance.choice(TEXTS)), "unknown_chars": chance.choice(["fold", "fold_drop"])}
        body["normalize"] = chance.choice(["none", "length", "candidates"])
        if chance.random() < 0.5:
            self.send("POST", "/v1/score", body | {"model": chance.choice(MODELS)})
        else:
            self.send("POST", f"{self.path()}/score", body | self.position())

    def suggest(self) -> None:
        chance = self.chance
        body = {"n": self.mostly(3, self.number()), "max_chars": self.mostly(2, chance.choice([6, self.number()]))}
        body |= {"prompt": self.mostly("", chance.choice(TEXTS)), "unknown_chars": chance.choice(["fold", "fold_drop"])}
        form = chance.choice([{}, {}, {"until": chance.choice(["", " ", "é", "ab"])}, {"guided_regex": "[ab]+|z"}])
        if chance.random() < 0.7:
            self.send("POST", f"{self.path()}/suggest", body | form | self.position())
        else:
            body = {
                "prompt": chance.choice(TEXTS),
                "beam": self.mostly(3, self.number()),
                "model": chance.choice(MODELS),
            }
            body |= {"max_tokens": self.mostly(2, chance.choice([6, self.number()])), "unknown_chars": "fold_drop"}
            self.send("POST", "/v1/completions", body | {"stop": self.mostly(None, ["a", "ab"])})

    def damage_record(self) -> None:
        """Put a session into the store as a damaged record of Redis would bring it."""
        chance, key = self.chance, SessionKey("", self.chance.choice(IDS))
        try:
            session = self.served.store.load(key)
        except GruServeError:
            return
        encoded = record.encode(session, 16)
        version, length = struct.unpack_from("<BI", encoded.data)
        header = json.loads(encoded.data[5 : 5 + length])
        body = bytearray(encoded.data[5 + length :])
        place: Any = header
        if header["run"] and chance.random() < 0.6:
            header["run"]["finish_reason"] = header["run"]["end"] = None
            header["run"]["sampling"] = asdict(PLAIN) | header["run"]["sampling"]  # a record leaves out defaults
            place = header["run"] if chance.random() < 0.5 else header["run"]["sampling"]
        name = chance.choice([*place])
        if name == "allowed":
            place[name] = [self.number() for _ in range(chance.randrange(3))]
        elif name == "logit_bias":
            place[name] = [[self.number(), self.chance.uniform(-150, 150)]]
        elif name not in ("sampling", "model", "identity"):
            place[name] = chance.choice([self.number(), chance.choice(FLOATS), "x", ["a", ""], [self.number()] * 2])
        if chance.random() < 0.3 and body:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        head = json.dumps(header).encode()
        data = struct.pack("<BI", version, len(head)) + head + bytes(body)
        segments = {segment.hash: record.content_of(segment.segments) for segment in encoded.segments}
        try:
            found = record.decode(
                Record(data, encoded.settled),
                lambda names: [segments[digest] for digest, _ in names],
                key,
                1,
                0.0,
            )
        except (GruServeError, KeyError):  # KeyError: a hash that Redis doesn't have
            self.seen["record refused"] += 1
            return
        self.seen["record accepted"] += 1
        self.send("DELETE", f"/v1/sessions/{key.id}")
        try:
            self.served.store.create(replace(found, expires_at=0.0))
        except GruServeError:
            return
        self.chance.choice([self.feed, self.generate, self.resume, self.inspect])()


@pytest.mark.timeout(300 + NUM_REQUESTS / 20)
def test_requests__of_any_kind_leave_all_engines_alive(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        fuzzers = [Fuzzer(served, seed) for seed in range(NUM_THREADS)]
        seen: Counter[str] = sum(pool.map(lambda fuzzer: fuzzer.run(NUM_REQUESTS // NUM_THREADS), fuzzers), Counter())
    log = capsys.readouterr().err
    for fault in ("the engine failed", "texts can't be computed", "unforeseen error"):
        assert fault not in log
    client = served.new_client()
    for name in MODELS:
        answer = client.post("/v1/completions", json={"model": name, "prompt": "ab", "max_tokens": 20})
        assert answer.status_code == 200
    assert client.get("/readyz").status_code == 200
    with capsys.disabled():
        if NUM_REQUESTS > 5000:
            print("\n", json.dumps(dict(seen.most_common())))  # noqa: T201 - the result of a long run
    assert seen["200"] > NUM_REQUESTS / 20
    assert seen["record accepted"] > 0
    assert seen["record refused"] > 0
