# SPDX-License-Identifier: Apache-2.0
"""Shares of a model follow the weights, a flood waits for itself, and nothing is lost or starves."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy import fairness
from tokenpool.policy.fairness import RECENT_S, FairQueue, FairTurns, Head, SeatShares, token_cost

pytestmark = pytest.mark.cpu


def serve(queue: FairQueue[int], count: int, cost: dict[str, float]) -> list[str]:
    """Take and end `count` items one after the other; returns their tenants."""
    order = []
    for _ in range(count):
        taken = queue.pop()
        assert taken is not None
        tenant, _, charged = taken
        queue.settle(tenant, charged, cost[tenant])
        order.append(tenant)
    return order


def test_a_flood_does_not_go_before_who_comes_later():
    """After a thousand items of a flood, half of them served, the first item of another tenant is next."""
    queue: FairQueue[int] = FairQueue()
    for i in range(1000):
        queue.push("flood", i)
    serve(queue, 500, {"flood": 100.0})
    queue.push("polite", 0)

    assert "polite" in serve(queue, 2, {"flood": 100.0, "polite": 100.0})


def test_a_pause_is_no_credit():
    """A tenant that was away while another was served gets every second item from then on, not all of them."""
    queue: FairQueue[int] = FairQueue()
    cost = {"a": 100.0, "b": 100.0}
    for i in range(400):
        queue.push("a", i)
    serve(queue, 200, cost)
    for i in range(200):
        queue.push("b", i)

    assert abs(Counter(serve(queue, 100, cost))["b"] - 50) <= 3


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.floats(0.5, 8), st.floats(50, 1000)), min_size=2),
    st.integers(1, 4),
)
def test_service_follows_the_weights(tenants, in_flight):
    """Tenants that always wait get service by their weights, whatever their items cost and how many run at once."""
    queue: FairQueue[int] = FairQueue(lambda name: tenants[name][0])
    count = 4000
    for name in tenants:
        for i in range(count):
            queue.push(name, i)
    served, running = Counter(), []
    for _ in range(count):
        name, _, charged = queue.pop()
        running.append((name, charged))
        if len(running) >= in_flight:
            name, charged = running.pop(0)
            queue.settle(name, charged, tenants[name][1])
            served[name] += tenants[name][1]
    by_weight = {name: served[name] / tenants[name][0] for name in tenants}
    # What an item costs, the largest difference that one item makes, for each that runs and one more.
    slack = (in_flight + 3) * max(max(cost, 256.0) / weight for weight, cost in tenants.values())

    assert max(by_weight.values()) - min(by_weight.values()) <= slack


def test_items_of_one_tenant_keep_their_order():
    """First come, first served within a tenant."""
    queue: FairQueue[int] = FairQueue()
    for i in range(10):
        queue.push("a" if i % 2 else "b", i)
    taken = [queue.pop() for _ in range(10)]

    assert [1, 3, 5, 7, 9] == [item for tenant, item, _ in taken if tenant == "a"]
    assert [0, 2, 4, 6, 8] == [item for tenant, item, _ in taken if tenant == "b"]
    assert queue.pop() is None


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.sampled_from("abc")), max_size=60))
def test_each_item_comes_out_once_or_is_discarded(actions):
    """Against a plain list as the model: nothing is lost, doubled or left over."""
    queue: FairQueue[object] = FairQueue()
    held: list[tuple[str, object]] = []
    for action, tenant in actions:
        if action == "push":
            held.append((tenant, object()))
            queue.push(*held[-1])
        elif action == "discard":
            mine = [entry for entry in held if entry[0] == tenant]
            if mine:
                held.remove(mine[-1])
                queue.discard(*mine[-1])
            queue.discard(tenant, object())
        elif (taken := queue.pop()) is not None:
            held.remove(taken[:2])
        else:
            assert [] == held
        assert len(queue) == len(held)
        assert {name for name, _ in held} == set(queue.tenants)
        assert all(queue.num_waiting(name) == sum(entry[0] == name for entry in held) for name in "abc")


def lines_to_discard(count: int) -> int:
    """How many lines run until a tenant's `count` items, which all wait, are discarded, the newest first."""
    queue: FairQueue[object] = FairQueue()
    items = [object() for _ in range(count)]
    for item in items:
        queue.push("a", item)
    num_lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return trace if frame.f_code.co_filename == fairness.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for item in reversed(items):
            queue.discard("a", item)
    finally:
        sys.settrace(before)
    assert not len(queue)
    return num_lines


def test_a_flood_that_is_given_up_costs_the_loop_no_more_than_it_cost_to_come():
    """Four times as many items that wait and go again take four times as long, not sixteen times."""
    assert lines_to_discard(400) <= 5 * lines_to_discard(100)


def test_what_was_never_begun_makes_nothing_cheaper():
    """A tenant that gives up what it has just got is charged for the next ones as before."""
    queue: FairQueue[int] = FairQueue()
    for i in range(4):
        queue.push("a", i)
    serve(queue, 1, {"a": 1000.0})
    serve(queue, 2, {"a": 0.0})
    taken = queue.pop()
    assert taken is not None and taken[2] == 1000.0


def test_a_token_put_out_costs_two():
    """The costs of VTC: 1 per prompt token, 2 per token put out."""
    assert 110.0 == token_cost(10, 50)


def filled(seats: int, weights: dict[str, float], order: list[str], now_s: float = 0.0) -> SeatShares:
    """Each tenant of `order` takes a seat if it may."""
    shares = SeatShares(weights.__getitem__, seats)
    for tenant in order:
        if shares.may_take(tenant, now_s):
            shares.take(tenant, now_s)
    return shares


def test_who_is_alone_may_take_more_than_all_seats():
    assert filled(4, {"a": 1.0}, ["a"] * 100).taken("a") == 100


@given(
    st.integers(4, 64),
    st.dictionaries(st.sampled_from("abc"), st.floats(0.5, 8), min_size=2),
    st.randoms(use_true_random=False),
)
def test_tenants_that_all_flood_get_seats_by_weight(seats, weights, rng):
    """In whatever order they come, once those that had too many have gone."""
    shares = SeatShares(weights.__getitem__, seats)
    order = [rng.choice(sorted(weights)) for _ in range(40 * seats)]
    for tenant in [*order, *weights]:  # however they are drawn, each comes once at least
        if shares.may_take(tenant, 0.0):
            shares.take(tenant, 0.0)
    for _ in range(seats):  # a tenant is kept one seat more than it had: its share is reached in as many rounds
        for tenant in weights:
            while shares.taken(tenant) > 0:
                shares.leave(tenant, 0.0)
        for _ in range(seats):
            for tenant in weights:
                if shares.may_take(tenant, 0.0):
                    shares.take(tenant, 0.0)
    for tenant, weight in weights.items():
        fair = seats * weight / sum(weights.values())
        assert max(1, int(fair) - 1) <= shares.taken(tenant) <= max(1, int(fair + 1e-9))


def test_seats_that_others_do_not_use_are_taken():
    """A tenant with two requests keeps three of sixteen seats from a flood; when it is gone for a while, none."""
    weights = {"flood": 1.0, "polite": 1.0}
    shares = filled(16, weights, ["polite"] * 2 + ["flood"] * 50)
    assert shares.taken("flood") == 13

    shares.leave("polite", 1.0)
    shares.leave("polite", 1.0)
    assert not shares.may_take("flood", RECENT_S - 0.1)
    assert shares.may_take("flood", RECENT_S + 0.1)


def test_who_comes_back_has_a_seat_at_once():
    shares = filled(4, {"flood": 1.0, "polite": 1.0}, ["flood"] * 50)
    assert shares.may_take("polite", 0.0)
    shares.take("polite", 0.0)
    assert not shares.may_take("flood", 0.0)


def test_a_tenant_that_may_not_is_passed_over_and_keeps_its_place():
    queue: FairQueue[int] = FairQueue()
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.head(lambda name: name != "a") == ("b", False)
    assert queue.head(lambda name: False) is None
    taken = queue.pop(Head("b", False))
    assert taken is not None and taken[:2] == ("b", 2)
    assert queue.head() == ("a", False)


def test_single_ones_and_lists_of_a_tenant_take_turns():
    """Each in its order; what may not go is left out."""
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("a", f"list {i}", of_many=True)
    assert queue.pop()[1] == "list 0"
    for i in range(3):
        queue.push("a", f"single {i}")
    assert [queue.pop()[1] for _ in range(3)] == ["single 0", "list 1", "single 1"]
    assert queue.head(may_many=False) == ("a", False)
    queue.pop(Head("a", False))
    assert queue.head(may_many=False) is None
    assert [queue.pop()[1] for _ in range(2)] == ["list 2", "list 3"]
    assert not len(queue)


@given(st.integers(1, 300), st.lists(st.sampled_from(["single", "list", "leave"]), max_size=400))
def test_lists_leave_an_eighth_of_the_seats(seats, actions):
    """One at least, whoever has them; a single seat is for all."""
    shares, there = SeatShares(seats=seats), []
    for action in actions:
        if action == "leave" and there:
            shares.leave("a", 0.0, of_many=there.pop(0))
        elif action == "single" or (action == "list" and shares.may_many()):
            shares.take("a", 0.0, of_many=action == "list")
            there.append(action == "list")
        if seats > 1:
            assert sum(there) <= seats - max(1, seats // 8)
        assert shares.may_many() or sum(there) >= seats - max(1, seats // 8) > 0


def test_turns_go_to_the_one_that_has_had_fewest_for_its_weight() -> None:
    """Two that always want one get them by weight; one that comes late has no credit for the time before."""
    turns = FairTurns({"a": 1.0, "b": 2.0, "late": 1.0}.__getitem__)
    taken = []
    for _ in range(12):
        taken.append(min("ab", key=turns.counter))
        turns.take(taken[-1])
    assert (taken.count("a"), taken.count("b")) == (4, 8)
    for _ in range(4):
        taken.append(min(("a", "b", "late"), key=turns.counter))
        turns.take(taken[-1])
    assert taken[-4:].count("late") == 1
    assert len(turns._had) <= 3
