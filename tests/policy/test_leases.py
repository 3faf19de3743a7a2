# SPDX-License-Identifier: Apache-2.0
"""Parts of limits never add up to more than the whole, whatever words are late or lost, and go where the work is."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenpool.policy.leases import Claim, Lease, LeaseBook

pytestmark = pytest.mark.cpu

SERVERS = ("a", "b", "c")


class Server:
    """Keeps to what it was given, and says so."""

    def __init__(self, name: str, book: LeaseBook) -> None:
        self.name, self.book = name, book
        self.lease = Lease()
        self.demand = 0.0
        self.fill = 1.0

    def beat(self, *, is_heard: bool = True, is_settled: bool = True) -> None:
        """Claim, and keep to the answer if it comes."""
        claim = Claim(self.lease.share, self.lease.slots, self.demand, self.fill)
        answer = self.book.answer(self.name, {"t": claim}, is_settled=is_settled)
        if is_heard:
            self.lease = answer["t"]


def settle(*servers: Server) -> None:
    for _ in range(30):
        for server in servers:
            server.beat()


def test_a_lone_server_has_all_at_once():
    book = LeaseBook({"t": 7})
    server = Server("a", book)
    server.beat()
    assert server.lease == Lease(1.0, 7, 1.0)


def test_a_part_goes_to_a_new_server_once_the_other_has_let_it_go():
    """In the first beat it gets nothing, as the other one still has it all; then its part, as full as the other's."""
    book = LeaseBook({"t": 7})
    first, second = Server("a", book), Server("b", book)
    first.beat()
    first.fill = 0.25
    second.beat()
    assert second.lease[:2] == (0.0, 0)
    first.beat()
    second.beat()
    assert second.lease[:2] == (0.0, 0), "the other one has not said yet that it keeps to less"
    first.beat()
    second.beat()
    assert second.lease == Lease(0.5, 3, 0.25)
    assert first.lease[:2] == (0.5, 4)


def test_parts_follow_the_work():
    """Nobody gets less than an equal part of a fifth."""
    book = LeaseBook({"t": 10})
    busy, idle = Server("a", book), Server("b", book)
    busy.demand = 50.0
    settle(busy, idle)
    assert (busy.lease.share, idle.lease.share) == (pytest.approx(0.9), pytest.approx(0.1))
    assert (busy.lease.slots, idle.lease.slots) == (9, 1)
    busy.demand, idle.demand = 0.0, 50.0
    settle(busy, idle)
    assert (busy.lease.slots, idle.lease.slots) == (1, 9)


def test_what_a_dead_server_had_is_given_to_the_others():
    book = LeaseBook({"t": 4})
    one, other = Server("a", book), Server("b", book)
    settle(one, other)
    book.forget("b")
    one.beat()
    assert one.lease[:2] == (1.0, 4)


def test_a_new_book_leaves_all_as_it_is_until_it_has_heard_everybody():
    """It does not know yet what others keep to."""
    old, book = LeaseBook({"t": 4}), LeaseBook({"t": 4})
    one, other = Server("a", old), Server("b", old)
    settle(one, other)
    before = [one.lease, other.lease]
    one.book = other.book = book
    one.beat(is_settled=False)
    other.beat(is_settled=False)
    assert [one.lease[:2], other.lease[:2]] == [lease[:2] for lease in before]
    settle(one, other)
    assert one.lease.share + other.lease.share == pytest.approx(1.0)


def test_tenants_that_nobody_knows_have_no_part():
    assert LeaseBook({}).answer("a", {"t": Claim(0.0, 0, 1.0, 1.0)}) == {}


STEP = st.tuples(st.sampled_from(SERVERS), st.booleans(), st.floats(0, 100), st.sampled_from(("beat",) * 9 + ("die",)))


@example(steps=[(name, False, demand, "beat") for demand in (1.0, 0.0) for name in SERVERS[:2]], slots=0)
@example(steps=[("a", False, 3.0, "beat"), ("b", False, 2.0, "beat"), ("a", False, 1.0, "beat")] * 2, slots=1)
@given(steps=st.lists(STEP, max_size=80), slots=st.integers(0, 9))
def test_all_parts_together_are_never_more_than_the_whole(steps, slots):
    """Beats in any order, answers that are lost, servers that die and come back."""
    book = LeaseBook({"t": slots})
    servers = {name: Server(name, book) for name in SERVERS}
    for name, is_heard, demand, what in steps:
        if what == "die":
            book.forget(name)
            servers[name] = Server(name, book)
        else:
            servers[name].demand = demand
            servers[name].beat(is_heard=is_heard)
        leases = [server.lease for server in servers.values()]
        assert sum(lease.share for lease in leases) <= 1 + 1e-9
        assert sum(lease.slots for lease in leases) <= slots
        assert all(0 <= lease.fill <= 1 for lease in leases)
    for _ in range(30):
        for server in servers.values():
            server.beat()
    assert sum(server.lease.share for server in servers.values()) == pytest.approx(1.0, abs=0.01)
    assert sum(server.lease.slots for server in servers.values()) == slots
