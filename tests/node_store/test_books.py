# SPDX-License-Identifier: Apache-2.0
"""The books of a node: one copy of each content, nothing of a client that is gone, and a budget that is kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tokenpool.node_store.books import CopyState, NodeBooks, NoRoomError

pytestmark = pytest.mark.cpu

BUDGET = 100


@pytest.fixture
def books() -> NodeBooks:
    made = NodeBooks()
    for client in (1, 2):
        made.join(client, BUDGET)
    return made


def filled(books: NodeBooks, client: int, key: str, nbytes: int) -> None:
    assert CopyState.MINE is books.claim(client, key)
    books.allocate(client, key, nbytes)
    books.seal(client, key, key.encode())


def test_a_copy_counts_once_however_many_hold_it(books: NodeBooks) -> None:
    """The first fills, the second is told to wait, then has the same."""
    assert CopyState.MINE is books.claim(1, "a")
    assert CopyState.FILLING is books.claim(2, "a")
    books.allocate(1, "a", 60)
    assert CopyState.FILLING is books.claim(2, "a") is books.claim(1, "a")
    books.seal(1, "a", b"meta")
    assert CopyState.SEALED is books.claim(2, "a")
    assert (60, b"meta", {1: 1, 2: 1}) == (books.used_bytes, books.copies["a"].meta, books.copies["a"].leases)


def test_who_dies_while_it_fills_leaves_the_work_to_the_next(books: NodeBooks) -> None:
    """What it had booked is free."""
    books.claim(1, "a")
    books.allocate(1, "a", 90)
    assert ["a"] == books.leave(1)
    assert 0 == books.used_bytes
    assert CopyState.MINE is books.claim(2, "a")
    books.allocate(2, "a", 90)


def test_a_copy_outlives_who_filled_it(books: NodeBooks) -> None:
    """And is the first to go when room is wanted, the least recently used before others."""
    filled(books, 1, "a", 40)
    filled(books, 1, "b", 40)
    assert [] == books.leave(1)
    assert CopyState.SEALED is books.claim(2, "a")  # it is used later than b
    books.drop(2, "a")
    books.claim(2, "c")
    assert ["b"] == books.allocate(2, "c", 50)
    assert {"a", "c"} == books.copies.keys()


def test_what_is_held_is_never_evicted(books: NodeBooks) -> None:
    """Who is refused has its wish noted, and others hear of it; then it may take what it needs all the same."""
    filled(books, 1, "a", 70)
    with pytest.raises(NoRoomError, match="40 bytes of host memory are wanted, the node holds 70 of 100"):
        books.hold(2, 40)
    assert 0 == books.own_bytes
    assert (10, 0) == (books.wanted_of(1), books.wanted_of(2))
    books.hold(2, 40, force=True)
    assert (10, 10, 110) == (books.over_bytes, books.wanted_of(1), books.used_bytes)
    assert ["a"] == books.drop(1, "a"), "over the budget nothing stays that nobody holds"
    assert (0, 0) == (books.over_bytes, books.wanted_of(1))


def test_a_copy_that_was_kept_is_offered_to_new_books() -> None:
    """A keeper that died left it with a host; a second one of the same content is not taken."""
    books = NodeBooks()
    for client in (1, 2):
        books.join(client, BUDGET)
    assert books.offer(1, "a", 30, b"m")
    assert not books.offer(2, "a", 30, b"m")
    assert CopyState.SEALED is books.claim(2, "a")
    assert (30, b"m") == (books.used_bytes, books.copies["a"].meta)


def test_the_budget_is_the_largest_and_may_shrink(books: NodeBooks) -> None:
    """Without a client it stays as it was, so that copies wait for the next one."""
    filled(books, 1, "a", 80)
    books.drop(1, "a")
    assert [] == books.set_budget(1, 50)
    assert ["a"] == books.set_budget(2, 60)
    filled(books, 1, "b", 30)
    books.leave(1)
    books.leave(2)
    assert (60, 30) == (books.budget_bytes, books.used_bytes)
    books.check()


@pytest.mark.parametrize("call", [
    lambda b: b.seal(1, "a", b""), lambda b: b.allocate(1, "a", 5), lambda b: b.drop(1, "a"), lambda b: b.claim(3, "a"),
    lambda b: b.hold(1, -1), lambda b: b.join(1, 5), lambda b: b.offer(1, "a", 0, b""), lambda b: b.hold(3, 1),
])  # fmt: skip
def test_nonsense_changes_nothing(books: NodeBooks, call) -> None:
    """Whatever a broken client says."""
    before = books.snapshot()
    with pytest.raises(ValueError):
        call(books)
    assert before == books.snapshot()


KEYS, CLIENTS = st.sampled_from("abcd"), st.integers(1, 4)


class Lives(RuleBasedStateMachine):
    """Clients that come, fill, hold, offer and die; the model is a list of who thinks that it has what."""

    def __init__(self) -> None:
        super().__init__()
        self.books = NodeBooks()
        self.budget: dict[int, int] = {}
        self.held: dict[int, Counter[str]] = {}
        self.filling: dict[int, dict[str, int]] = {}
        self.own: dict[int, int] = {}
        self.size: dict[str, int] = {}

    @rule(client=CLIENTS, budget=st.integers(20, 100))
    def come(self, client: int, budget: int) -> None:
        if client not in self.budget:
            self.books.join(client, budget)
            self.budget[client], self.own[client] = budget, 0
            self.held[client], self.filling[client] = Counter(), {}

    @rule(client=CLIENTS)
    def die(self, client: int) -> None:
        before = set(self.books.copies)
        gone, filled = set(self.books.leave(client)), set(self.filling.pop(client, {}))
        for book in (self.budget, self.own, self.held):
            book.pop(client, None)
        assert gone == before - set(self.books.copies)
        assert filled <= gone
        assert not any(held[key] for held in self.held.values() for key in gone - filled)

    @rule(client=CLIENTS, key=KEYS)
    def claim(self, client: int, key: str) -> None:
        if client not in self.budget:
            return
        state = self.books.claim(client, key)
        is_filled = any(key in fills for fills in self.filling.values())
        is_held = any(held[key] for held in self.held.values())
        if is_filled:
            assert CopyState.FILLING is state
        elif state is CopyState.MINE:
            assert not is_held, "a copy that somebody holds is filled again"
            self.filling[client][key] = 0
        else:
            assert CopyState.SEALED is state
            self.held[client][key] += 1

    @rule(client=CLIENTS, key=KEYS, nbytes=st.integers(1, 60), force=st.booleans())
    def allocate(self, client: int, key: str, nbytes: int, force: bool) -> None:
        if self.filling.get(client, {}).get(key) != 0:
            return
        fits = self.needed() + nbytes <= self.books.budget_bytes
        try:
            self.books.allocate(client, key, nbytes, force=force)
        except NoRoomError:
            assert not fits and not force
            return
        assert fits or force
        self.filling[client][key] = nbytes

    @rule(client=CLIENTS, key=KEYS)
    def seal(self, client: int, key: str) -> None:
        if self.filling.get(client, {}).get(key):
            self.books.seal(client, key, b"")
            self.size[key] = self.filling[client].pop(key)
            self.held[client][key] = 1

    @rule(client=CLIENTS, key=KEYS)
    def drop(self, client: int, key: str) -> None:
        if self.filling.get(client, {}).pop(key, None) is not None:
            assert key in self.books.drop(client, key)
        elif self.held.get(client, Counter())[key]:
            self.held[client][key] -= 1
            self.books.drop(client, key)

    @rule(client=CLIENTS, key=KEYS, nbytes=st.integers(1, 60))
    def offer(self, client: int, key: str, nbytes: int) -> None:
        if client in self.budget and self.books.offer(client, key, nbytes, b""):
            assert not any(held[key] for held in self.held.values())
            self.size[key] = nbytes
            self.held[client][key] = 1
            self.books.evict(0)

    @rule(client=CLIENTS, nbytes=st.integers(0, 60), force=st.booleans())
    def hold(self, client: int, nbytes: int, force: bool) -> None:
        if client not in self.budget:
            return
        more = nbytes - self.own[client]
        fits = more <= 0 or self.needed() + more <= self.books.budget_bytes
        try:
            self.books.hold(client, nbytes, force=force)
        except NoRoomError:
            assert not fits and not force
            return
        assert fits or force
        self.own[client] = nbytes

    @rule(client=CLIENTS, budget=st.integers(20, 100))
    def change(self, client: int, budget: int) -> None:
        if client in self.budget:
            self.books.set_budget(client, budget)
            self.budget[client] = budget

    def needed(self) -> int:
        """What nobody can take away."""
        held = {key for counter in self.held.values() for key in +counter}
        fills = sum(nbytes for fills in self.filling.values() for nbytes in fills.values())
        return sum(self.size[key] for key in held) + fills + sum(self.own.values())

    @invariant()
    def books_agree(self) -> None:
        if self.budget:
            assert max(self.budget.values()) == self.books.budget_bytes
        self.books.check()
        assert self.needed() == self.books.used_bytes - self.books.evictable_bytes
        assert max(0, self.needed() - self.books.budget_bytes) == self.books.over_bytes
        for client, held in self.held.items():
            for key in +held:
                assert held[key] == self.books.copies[key].leases[client]


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
