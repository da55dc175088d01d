"""What clients share, and the client of a thread."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import given

from service.shares import SharedBudget, SharedCapacity, current_client, work_for
from tests.harness.wait import wait_until


def takes(capacity: SharedCapacity, client: str, num_places: int = 1) -> bool:
    """Take places if there is room, and return whether there was."""
    if not capacity.has_room(client, num_places):
        return False
    capacity.take(client, num_places)
    return True


def test_shared_capacity__a_client_that_is_alone_has_all_but_the_reserve() -> None:
    places = SharedCapacity(8, reserve=4)
    assert takes(places, "a", 5)
    assert not takes(places, "a", 4)  # all or none
    assert takes(places, "a", 3)
    assert not takes(places, "a")
    assert (places.num_taken, places.held_by("a"), places.num_clients) == (8, 8, 1)


def test_shared_capacity__a_newcomer_finds_half_of_the_free_ones_open() -> None:
    places = SharedCapacity(8, reserve=8)
    assert takes(places, "a", 8)
    for client, share in (("b", 4), ("c", 2), ("d", 1)):
        assert not takes(places, client, share + 1)
        assert takes(places, client, share)
        assert not takes(places, client)
    assert not takes(places, "e")  # one place is free, and none would be left
    places.give_back("a", 2)
    assert not takes(places, "a")
    assert takes(places, "e")


def test_shared_capacity__without_a_reserve_go_to_the_first() -> None:
    places = SharedCapacity(2, reserve=0)
    assert takes(places, "a", 2)
    assert not takes(places, "b")
    places.take("b")  # what was admitted already
    assert places.num_taken == 3
    places.give_back("b")
    places.give_back("a", 2)
    assert (places.num_taken, places.num_clients) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9), st.booleans()), max_size=60))
def test_shared_capacity__never_exceed_their_number_and_forget_clients(steps: list[tuple[str, int, bool]]) -> None:
    places, held = SharedCapacity(10, reserve=6), Counter[str]()
    for client, count, wants in steps:
        if not wants:
            places.give_back(client, held.pop(client, 0))
        elif takes(places, client, count):
            held[client] += count
        assert places.num_taken == held.total() <= 16
        assert places.num_clients == len(held)
    for client, count in held.items():
        places.give_back(client, count)
    assert places.num_clients == 0


@pytest.mark.parametrize("amount", [7, 8])
def test_shared_budget__a_client_has_half_and_leaves_room_for_others(amount: int) -> None:
    budget = SharedBudget(amount)
    assert not budget.take("a", budget.max_per_client + 1)
    assert budget.take("a", budget.max_per_client)
    assert not budget.take("a", 1)
    assert budget.take("b", 2)
    assert budget.take("a", 100, regardless=True)
    assert not budget.take("b", 1)
    budget.give_back("a", 100)
    budget.give_back("b", 2)
    assert not budget.take("a", 1)
    assert budget.take("b", 2)
    assert budget.num_taken == budget.max_per_client + 2


def test_shared_budget__is_exact_with_many_threads() -> None:
    budget, start = SharedBudget(50), threading.Barrier(8)

    def use(seed: int) -> None:
        rng, client = random.Random(seed), f"client {seed % 4}"
        start.wait()
        for _ in range(500):
            amount = rng.randrange(40)
            if budget.take(client, amount):
                assert budget.num_taken <= 50
                budget.give_back(client, amount)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert budget.num_taken == 0


def test_client__is_that_of_the_thread() -> None:
    seen, before = list[str](), current_client()

    def serve(client: str) -> None:
        work_for(client)
        seen.append(current_client())

    for client in ("a", "b"):
        thread = threading.Thread(target=serve, args=(client,))
        thread.start()
        thread.join()
    assert seen == ["a", "b"]
    assert current_client() == before


def test_shared_budget__is_waited_for_until_others_give_back() -> None:
    budget = SharedBudget(20)
    assert budget.take("a", 10)
    assert not budget.take("a", 1, wait_s=0.01)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(budget.take, client, 6, wait_s=20) for client in "aab"]
        assert budget.take("b", 2)  # others need not wait for those that do
        budget.give_back("b", 2)
        budget.give_back("a", 10)
        assert [future.result(60) for future in waiting[2:]] == [True]
        budget.give_back("b", 6)
        wait_until(lambda: any(future.done() for future in waiting[:2]))
        assert not all(future.done() for future in waiting[:2])
        budget.give_back("a", 6)
        assert [future.result(60) for future in waiting] == [True] * 3
    assert budget.num_taken == 6
