# SPDX-License-Identifier: Apache-2.0
"""The allocator against plain sets: who holds and uses which slab, and what each model is promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenpool.errors import CapacityError
from tokenpool.memory.arena import KVArena
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.slab_allocator import SlabAllocator

pytestmark = pytest.mark.cpu

PAGE = 64 << 10
NAMES = ["a", "b", "c"]
FLOORS = st.integers(0, 5)


class SlabHolder:
    """The least a model is: idle slabs, busy slabs, and a mark in each busy one."""

    def __init__(self, name: str, allocator: SlabAllocator) -> None:
        self.name = name
        self.allocator = allocator
        self.idle: list[int] = []
        self.busy: list[int] = []

    @property
    def held(self) -> int:
        return len(self.idle) + len(self.busy)

    def give_up_idle_slab(self) -> int:
        return self.idle.pop(0)

    def use(self, slab: int) -> None:
        self.idle.remove(slab)
        self.busy.append(slab)
        self.allocator.set_busy(self.name, len(self.busy))

    def release(self, slab: int) -> None:
        self.busy.remove(slab)
        self.idle.append(slab)
        self.allocator.set_busy(self.name, len(self.busy))

    def grow(self) -> bool:
        slab = self.allocator.grant(self.name)
        if slab is not None:
            self.idle.append(slab)
        return slab is not None


def make_allocator(num_pages: int) -> SlabAllocator:
    ledger = PageLedger(num_pages, PAGE)
    return SlabAllocator(ledger, KVArena(CpuDevice(keeps_bytes=True), ledger, poison=True))


def add(allocator: SlabAllocator, name: str, floor: int, *, idle: int = 0, busy: int = 0) -> SlabHolder:
    holder = SlabHolder(name, allocator)
    allocator.register(name, holder, floor)
    assert all(holder.grow() for _ in range(idle + busy))
    for _ in range(busy):
        holder.use(holder.idle[0])
    return holder


def bytes_of(arena: KVArena, slab: int) -> torch.Tensor:
    return arena.device.tensor(arena.base + arena.null_bytes + slab * PAGE, PAGE)


class AllocatorMachine(RuleBasedStateMachine):
    """Three models, weights and null blocks compete for at most ten pages."""

    @initialize(num_pages=st.integers(1, 10))
    def start(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.allocator = make_allocator(num_pages)
        self.arena, self.ledger = self.allocator.arena, self.allocator.ledger
        self.holders: dict[str, SlabHolder] = {}
        self.floors: dict[str, int] = {}
        self.away: dict[str, bool] = {}  # model -> whether its floor is kept for it
        self.weights: list[int] = []
        self.views = 0

    # -- what the books must say ---------------------------------------------------------------------

    @property
    def kv_pages(self) -> int:
        return self.num_pages - len(self.weights) - len(self.arena._null_pages)

    def promised(self, name: str) -> int:
        return self.floors[name] if self.away.get(name, True) else 0

    def committed(self, *, but: str | None = None) -> int:
        return sum(max(len(h.busy), self.promised(n)) for n, h in self.holders.items() if n != but)

    def grantable(self, name: str) -> int:
        if name in self.away:
            return 0
        return max(0, self.kv_pages - self.committed(but=name) - self.holders[name].held)

    def some(self, data: st.DataObject) -> SlabHolder:
        return self.holders[data.draw(st.sampled_from(sorted(self.holders)))]

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()

    # -- models --------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.holders) < len(NAMES))
    @rule(floor=FLOORS)
    def register(self, floor: int) -> None:
        name = next(n for n in NAMES if n not in self.holders)
        holder = SlabHolder(name, self.allocator)
        if self.committed() + floor > self.kv_pages:
            with pytest.raises(CapacityError, match=f"{name!r} cannot be promised {floor} .*lower kv_floor_pages"):
                self.allocator.register(name, holder, floor)
            return
        self.allocator.register(name, holder, floor)
        self.holders[name], self.floors[name] = holder, floor

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        holder = self.some(data)
        if holder.busy:
            with pytest.raises(AssertionError, match="still uses"):
                self.allocator.unregister(holder.name)
            return
        self.allocator.unregister(holder.name)
        assert not holder.idle
        del self.holders[holder.name], self.floors[holder.name]
        self.away.pop(holder.name, None)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), floor=FLOORS)
    def set_floor(self, data: st.DataObject, floor: int) -> None:
        holder = self.some(data)
        version = self.allocator.version
        self.allocator.set_floor(holder.name, floor)
        self.floors[holder.name] = floor
        assert self.allocator.version > version

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.allocator.touch(self.some(data).name)

    # -- slabs ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 4))
    def grant(self, data: st.DataObject, count: int) -> None:
        holder = self.some(data)
        for _ in range(count):
            expected = self.grantable(holder.name)
            without_reclaim = self.allocator.num_free_for(holder.name)
            reclaims = self.allocator.num_reclaims
            assert expected == self.allocator.num_grantable(holder.name)
            assert (expected > 0) == holder.grow()
            if not expected:
                break
            slab = holder.idle[-1]
            assert (without_reclaim == 0) == (self.allocator.num_reclaims > reclaims)
            assert not bytes_of(self.arena, slab).any()
            bytes_of(self.arena, slab).fill_(-1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def grant_all(self, data: st.DataObject) -> None:
        """As many grants succeed one after another as num_grantable says, and not one more."""
        holder = self.some(data)
        expected = self.allocator.num_grantable(holder.name)
        granted = 0
        while holder.grow():
            granted += 1
        assert expected == granted

    @precondition(lambda self: any(h.idle for h in self.holders.values()))
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(s for h in self.holders.values() for s in h.idle)))
        holder = next(h for h in self.holders.values() if slab in h.idle)
        before = self.committed()
        holder.use(slab)
        # What idle slabs turn into is never at the expense of a promise.
        assert self.committed() <= max(before, self.kv_pages)
        bytes_of(self.arena, slab).fill_(slab + 1)

    @precondition(lambda self: any(h.busy for h in self.holders.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(s for h in self.holders.values() for s in h.busy)))
        version = self.allocator.version
        next(h for h in self.holders.values() if slab in h.busy).release(slab)
        assert self.allocator.version > version

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(0, 4))
    def reclaim(self, data: st.DataObject, count: int) -> None:
        holder = self.some(data)
        left = holder.held - min(count, len(holder.idle))
        assert holder.held - left == self.allocator.reclaim(holder.name, count)
        assert left == holder.held

    # -- away and back -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.away) < len(self.holders))
    @rule(data=st.data(), keep_floor=st.booleans())
    def detach(self, data: st.DataObject, keep_floor: bool) -> None:
        holder = self.holders[data.draw(st.sampled_from(sorted(self.holders.keys() - self.away.keys())))]
        version = self.allocator.version
        slabs, holder.idle, holder.busy = holder.idle + holder.busy, [], []
        self.allocator.detach(holder.name, slabs, keep_floor=keep_floor)
        self.away[holder.name] = keep_floor
        assert self.allocator.version > version
        assert 0 == self.allocator.num_grantable(holder.name)
        assert self.allocator.grant(holder.name) is None

    @precondition(lambda self: self.away)
    @rule(data=st.data(), count=st.integers(0, 8))
    def attach(self, data: st.DataObject, count: int) -> None:
        """All that was asked for can be granted, or the model stays away and nothing moved."""
        holder = self.holders[data.draw(st.sampled_from(sorted(self.away)))]
        can = max(0, self.kv_pages - self.committed(but=holder.name))
        if count > can:
            before = (self.ledger.snapshot(), self.allocator.num_reclaims)
            with pytest.raises(CapacityError, match=f"needs {count} KV pages to come back, it may have {can} now"):
                self.allocator.attach(holder.name, count)
            assert before == (self.ledger.snapshot(), self.allocator.num_reclaims)
            return
        self.allocator.attach(holder.name, count)
        del self.away[holder.name]
        assert all(holder.grow() for _ in range(count))
        for slab in list(holder.idle):
            bytes_of(self.arena, slab).fill_(slab + 1)
            holder.use(slab)

    # -- other uses of pages -------------------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def take_weights(self, count: int) -> None:
        can = self.kv_pages - self.committed()
        if count > can:
            with pytest.raises(CapacityError, match=f"{count} pages are needed, {max(0, can)} can .*raise device_mem"):
                self.allocator.free_pages(count)
            return
        self.allocator.free_pages(count)
        self.weights += self.ledger.take("w", PageUse.WEIGHTS, count)

    @precondition(lambda self: self.weights)
    @rule()
    def give_weights(self) -> None:
        self.ledger.give("w", PageUse.WEIGHTS, [self.weights.pop()])

    @precondition(lambda self: self.views < 3)
    @rule()
    def open_view(self) -> None:
        can = self.kv_pages - self.committed()
        if can < 1:
            with pytest.raises(CapacityError, match="1 pages are needed, 0 can be freed"):
                self.arena.open_view(f"view{self.views}", PAGE)
            return
        self.arena.open_view(f"view{self.views}", PAGE)
        self.views += 1

    # -- laws ----------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check()
        slabs = [slab for h in self.holders.values() for slab in h.idle + h.busy]
        assert len(slabs) == len(set(slabs)), "a slab has two owners"
        assert self.num_pages == self.ledger.num_free + len(slabs) + len(self.weights) + len(self.arena._null_pages)
        assert set(slabs) == self.arena._mapped
        for name, holder in self.holders.items():
            assert holder.held == self.allocator.held(name)
            assert all(self.ledger.holder(s) == (name, PageUse.KV) for s in holder.idle + holder.busy)
            assert self.allocator.is_away(name) == (name in self.away)

    @invariant()
    def busy_slabs_keep_their_bytes(self) -> None:
        for holder in self.holders.values():
            for slab in holder.busy:
                assert bool((bytes_of(self.arena, slab) == slab + 1).all())

    @invariant()
    def floors_are_reachable(self) -> None:
        over = self.committed() > self.kv_pages
        for name, holder in self.holders.items():
            if name in self.away:
                assert not self.allocator.is_over(name)
                continue
            reach = holder.held + self.allocator.num_grantable(name)
            if not over:
                assert reach >= self.floors[name], "a promise that fitted cannot be kept"
                assert not self.allocator.is_over(name)
            elif len(holder.busy) > self.floors[name]:
                assert self.allocator.is_over(name), "it gets more although others are below their floors"
        if over:
            assert all(h.held <= max(len(h.busy), self.promised(n)) for n, h in self.holders.items())


class TestAllocator(AllocatorMachine.TestCase):
    """Any history keeps the books, the bytes of busy slabs and the promises."""

    settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)


def test_a_model_under_its_floor_always_grows_to_it():
    """Two models that filled the memory and then use again all they cached leave a third its floor."""
    allocator = make_allocator(10)
    a, c, b = add(allocator, "a", 0), add(allocator, "c", 0), add(allocator, "b", 3)
    while a.held < 5 and a.grow():
        pass
    while c.grow():
        pass
    for holder in (a, c):
        for slab in list(holder.idle):
            holder.use(slab)
    assert [True] * 3 == [b.grow() for _ in range(3)]
    allocator.check()


def test_a_new_floor_takes_idle_slabs_at_once():
    """A promise made after the memory filled is kept: nobody can use again what it was promised."""
    allocator = make_allocator(8)
    a = add(allocator, "a", 0, idle=8)
    b = add(allocator, "b", 3)
    assert 5 == a.held
    for slab in list(a.idle):
        a.use(slab)
    assert [True, True, True, False] == [b.grow() for _ in range(4)]


def test_a_raised_floor_is_met_as_others_finish():
    """Each slab that a model over its share stops using goes to the promise and is not used by it again."""
    allocator = make_allocator(8)
    a, b = add(allocator, "a", 1, busy=8), add(allocator, "b", 0)
    allocator.set_floor("b", 4)
    for left in (7, 6, 5, 4):
        assert allocator.is_over("a")
        a.release(a.busy[0])
        assert left == a.held
    assert not allocator.is_over("a")
    assert [True] * 4 + [False] == [b.grow() for _ in range(5)]


def test_idle_slabs_of_the_least_recently_used_model_go_first():
    """Reclaim asks the model whose turn is longest ago, and never the one that grows."""
    allocator = make_allocator(6)
    a, b, c = (add(allocator, name, 0, idle=2) for name in "abc")
    allocator.touch("a")
    assert c.grow()
    assert (2, 1, 3) == (a.held, b.held, c.held)


def test_null_pages_come_from_idle_slabs():
    """A model can be added while prefix caches fill the memory, but not at the expense of a floor."""
    allocator = make_allocator(4)
    a = add(allocator, "a", 3, idle=4)
    allocator.arena.open_view("b", 4096)
    assert 3 == a.held
    allocator.arena.open_view("c", 32 << 10)  # beside b's null block: no further page
    with pytest.raises(CapacityError, match="1 pages are needed, 0 can be freed"):
        allocator.arena.open_view("d", 30 << 10)
    allocator.check()


def test_a_floor_lends_its_pages_while_its_model_is_away():
    """Others use what was promised to a model that is away, unless it was kept for it."""
    allocator = make_allocator(6)
    a, b = add(allocator, "a", 3, busy=3), add(allocator, "b", 0)
    allocator.detach("a", a.busy, keep_floor=True)
    assert (3, 3) == (allocator.num_grantable("b"), allocator.most_for("b"))
    allocator.attach("a", 3)
    allocator.detach("a", [])
    assert (6, 3) == (allocator.num_grantable("b"), allocator.most_for("b"))
    for _ in range(4):
        assert b.grow()
        b.use(b.idle[0])
    with pytest.raises(CapacityError, match="'a' needs 3 KV pages to come back, it may have 2 now: let others"):
        allocator.attach("a", 3)
    allocator.attach("a", 2)
    assert allocator.is_over("b")
    allocator.check()


def test_a_returning_model_takes_idle_slabs_of_others():
    """Prefix caches of others give way to requests that come back."""
    allocator = make_allocator(5)
    a = add(allocator, "a", 0, busy=4)
    allocator.detach("a", a.busy)
    a.busy = []
    b = add(allocator, "b", 0, idle=4, busy=1)
    allocator.attach("a", 4)
    assert [True] * 4 + [False] == [a.grow() for _ in range(5)]
    assert (0, 1) == (len(b.idle), len(b.busy))


def test_a_model_leaves_and_returns_once():
    """Leaving twice, coming back twice, or using slabs while away would be bugs of ours."""
    allocator = make_allocator(4)
    add(allocator, "a", 1)
    with pytest.raises(AssertionError, match="'a' is not away"):
        allocator.attach("a", 0)
    allocator.detach("a", [])
    with pytest.raises(AssertionError, match="gives 0 slabs, holds 0, away: True"):
        allocator.detach("a", [])
    with pytest.raises(AssertionError, match="is away and cannot use 1 slabs"):
        allocator.set_busy("a", 1)
    allocator.unregister("a")
    allocator.check()


def test_errors_carry_the_numbers():
    """A refused promise says who holds what, in pages."""
    allocator = make_allocator(6)
    add(allocator, "a", 2, busy=4)
    with pytest.raises(CapacityError) as caught:
        add(allocator, "b", 3)
    error = caught.value
    assert (3, 2, {"a": 4}) == (error.needed_pages, error.free_pages, error.holders)
    assert "4 of 6 are used or promised; raise device_memory or lower kv_floor_pages" in str(error)


def test_a_name_is_registered_once():
    """Two accounts of one name would be a bug of ours."""
    allocator = make_allocator(2)
    add(allocator, "a", 0)
    with pytest.raises(AssertionError, match="'a' is registered already"):
        add(allocator, "a", 0)
