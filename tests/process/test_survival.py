"""A few rounds of attacks on a deployment of real processes; `python -m benchmarks.survival` runs many."""

from __future__ import annotations

import os

from benchmarks import survival
from benchmarks.survival import deployed
from service.client import Client

ROUNDS = int(os.environ.get("SURVIVAL_ROUNDS", "2"))


def test_killed_replica__costs_no_character() -> None:
    assert survival.kills(2 * ROUNDS)["wrong"] == 0


def test_killed_store__takes_nothing_back_silently() -> None:
    outcomes = survival.redis_kills(ROUNDS)["outcomes"]
    assert "TEXT LOST" not in outcomes
    assert outcomes["whole"] > 0


def test_lease_holder_that_wakes_up__overwrites_nothing() -> None:
    assert survival.paused(1, 6)["outcomes"] == {"not overwritten": 1}


def test_replicas__draw_the_same_characters() -> None:
    """One seed gives one text on each replica, after a fork, and from a state that another replica saved."""
    with deployed(3, GRU_SERVE_STATE_KEYS="a key that all replicas have") as deployment:
        clients = [Client(f"http://127.0.0.1:{replica.port}") for replica in deployment.replicas]
        answers = [client.complete("ROMEO:", max_tokens=400, seed=7) for client in clients]
        assert len({answer.text for answer in answers}) == 1
        assert len({answer.fingerprint for answer in answers}) == 1

        beginning = clients[0].create("ROMEO:", seed=7, id="whole")
        whole = "".join(beginning.generate(600))
        # The same text in three parts, each on another replica: from the session, from a fork, and from a saved state.
        parts = clients[0].create("ROMEO:", seed=7, id="parts")
        text = "".join(parts.generate(200))
        text += "".join(clients[1].open("parts").generate(200))
        assert text == whole[:400]
        forked = clients[2].open("parts").fork(id="forked")
        state = clients[1].open("parts").save()
        carried = clients[2].load(state)
        assert text + "".join(clients[0].open(forked.id).generate(200)) == whole
        assert text + "".join(carried.generate(200)) == whole
        assert text + "".join(clients[1].open("parts").generate(200)) == whole
        for client in clients:
            client.close()
