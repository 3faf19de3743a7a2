# SPDX-License-Identifier: Apache-2.0
"""Who may have how many slabs: grants from the free pages, then from idle slabs of other models.

A slab is busy while a request uses one of its blocks and idle otherwise (free or only prefix-cached blocks). Idle
slabs may be taken by any model that needs them; busy ones never are. Each model has a floor: pages that the others
together always leave for it. With T pages for KV, model h may hold up to

    T - sum over the other models o of max(busy_o, floor_o)

so a model under its floor can always grow to it, and a model over it takes only what nobody uses or is promised.
An idle slab can become busy again without a grant (a prefix hit), so what a model holds counts as used here: the sum
of max(held, floor) stays within T, and idle slabs over a floor are taken back as soon as it would not.

A model can be away: its requests are paused, their blocks lie in host memory, and it holds no slab. Its floor then
counts as 0, so the others may use those pages too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from tokenpool.errors import CapacityError
from tokenpool.memory.arena import KVArena
from tokenpool.memory.ledger import PageLedger, PageUse


class Lender(Protocol):
    """Who else holds pages that KV may have for the asking, such as weights that nobody needs now."""

    def lendable(self) -> int:
        """Pages that `lend` can free at most."""

    def lend(self, pages: int) -> None:
        """Free `pages` pages of the ledger, or more; raises CapacityError if it cannot."""

    def take_out(self, pages: int) -> None:
        """Take models off the device, busy ones too, until `pages` more are unpromised; raises CapacityError."""


class SlabHolder(Protocol):
    """A model's block pool as the allocator sees it."""

    def give_up_idle_slab(self) -> int:
        """Forget one idle slab, its cached blocks and their hashes, and return its id."""


@dataclass(slots=True)
class _Account:
    holder: SlabHolder
    floor: int
    held: int = 0
    busy: int = 0
    away: bool = False
    keeps_floor: bool = False

    @property
    def promised(self) -> int:
        return 0 if self.away and not self.keeps_floor else self.floor

    @property
    def committed(self) -> int:
        return max(self.busy, self.promised)

    @property
    def reserved(self) -> int:
        return max(self.held, self.promised)


class SlabAllocator:
    """Grants and reclaims slabs of one arena; called on the host loop's thread only."""

    def __init__(self, ledger: PageLedger, arena: KVArena) -> None:
        self.ledger = ledger
        self.arena = arena
        self._accounts: dict[str, _Account] = {}  # least recently used model first
        self._committed = 0
        self._held = 0
        self.lender: Lender | None = None
        arena.make_room = self.free_pages
        self.version = 0
        """Grows whenever a model may be able to get a slab that it could not get before."""
        self.num_grants = 0
        self.num_reclaims = 0

    # -- models --------------------------------------------------------------------------------------

    def register(self, name: str, holder: SlabHolder, floor: int) -> None:
        """Open an account; raises CapacityError when the floors of all models no longer fit."""
        if name in self._accounts:
            raise AssertionError(f"{name!r} is registered already")
        self._make_room(name, floor)
        self._accounts[name] = _Account(holder, floor)
        self._committed += floor
        self._trim()

    def unregister(self, name: str) -> None:
        """Take every slab back from `name`, none of which may be busy, and close its account."""
        account = self._accounts[name]
        assert account.busy == 0, f"{name!r} still uses {account.busy} slabs"
        while account.held:
            self._reclaim_from(name, account)
        self._committed -= account.committed
        del self._accounts[name]
        self.version += 1

    def set_floor(self, name: str, floor: int) -> None:
        """Change a model's floor; others keep what they use but get nothing more until it is met."""
        account = self._accounts[name]
        self._committed -= account.committed
        account.floor = floor
        self._committed += account.committed
        self.version += 1
        self._trim()

    def touch(self, name: str) -> None:
        """Mark `name` as the most recently used model: its idle slabs are reclaimed last."""
        self._accounts[name] = self._accounts.pop(name)

    def set_busy(self, name: str, busy: int) -> None:
        """Tell how many of `name`'s slabs are in use; called when that number changes."""
        account = self._accounts[name]
        if account.away:
            raise AssertionError(f"{name!r} is away and cannot use {busy} slabs")
        fewer = busy < account.busy
        self._committed -= account.committed
        account.busy = busy
        self._committed += account.committed
        if fewer:
            self.version += 1
            self._trim()

    # -- slabs ---------------------------------------------------------------------------------------

    @property
    def num_kv_pages(self) -> int:
        """Pages that KV may use: the free ones, those held as slabs, and those that can be borrowed."""
        lendable = self.lender.lendable() if self.lender is not None else 0
        return self._num_own_pages + lendable

    @property
    def _num_own_pages(self) -> int:
        return self.ledger.num_free + self._held

    @property
    def num_unpromised(self) -> int:
        """Pages that `free_pages` could free now without the lender; negative while more is promised than there is."""
        return self._num_own_pages - self._committed

    def committed(self, name: str) -> int:
        """Slabs that `name` uses or is promised."""
        return self._accounts[name].committed

    def floor(self, name: str) -> int:
        """Slabs that `name` is promised when it is not away."""
        return self._accounts[name].floor

    def capacity(self, name: str) -> int:
        """Slabs that `name` could hold now, what it has included."""
        account = self._accounts[name]
        return self.num_kv_pages - (self._committed - account.committed)

    def most_for(self, name: str) -> int:
        """Slabs that `name` could hold if no other model, away or not, used more than its floor."""
        return self.num_kv_pages - sum(a.floor for other, a in self._accounts.items() if other != name)

    def num_grantable(self, name: str) -> int:
        """Slabs that `grant` would give to `name` one after another; 0 while it is away."""
        account = self._accounts[name]
        return 0 if account.away else max(0, self.capacity(name) - account.held)

    def num_free_for(self, name: str) -> int:
        """Slabs that `grant` would give to `name` without taking one from another model."""
        account = self._accounts[name]
        mine = max(0, self._spare()) + max(0, account.floor - account.held)
        return min(self.num_grantable(name), self.ledger.num_free, mine)

    def is_over(self, name: str) -> bool:
        """Whether `name` uses slabs that are promised to another model by now: it gets nothing more meanwhile."""
        account = self._accounts[name]
        return account.held > max(account.floor, self.capacity(name))

    def grant(self, name: str) -> int | None:
        """Give `name` one zeroed slab, from another model's idle ones if none is to spare; None if it may not."""
        account = self._accounts[name]
        if self.num_grantable(name) == 0:
            return None
        if self._spare() < 1 and (account.held >= account.floor or not self.ledger.num_free):
            self._reclaim_or_borrow(name)
        slab = self.ledger.take(name, PageUse.KV)[0]
        try:
            self.arena.map_slab(slab)
        except BaseException:
            self.ledger.give(name, PageUse.KV, [slab])
            raise
        account.held += 1
        self._held += 1
        self.num_grants += 1
        return slab

    def reclaim(self, name: str, count: int) -> int:
        """Take up to `count` idle slabs back from `name`, under its floor too; returns how many it had."""
        account = self._accounts[name]
        taken = min(count, account.held - account.busy)
        for _ in range(taken):
            self._reclaim_from(name, account)
        if taken:
            self.version += 1
        return taken

    def detach(self, name: str, slabs: list[int], *, keep_floor: bool = False) -> None:
        """Take all of `name`'s slabs back, busy ones included: it is away until `attach`.

        `slabs` are all that it holds; whoever calls has saved what is in them. With `keep_floor` its floor stays
        promised to it meanwhile.
        """
        account = self._accounts[name]
        if account.away or len(slabs) != account.held:
            raise AssertionError(f"{name!r} gives {len(slabs)} slabs, holds {account.held}, away: {account.away}")
        for slab in slabs:
            self.arena.unmap_slab(slab)
        self.ledger.give(name, PageUse.KV, slabs)
        self._held -= account.held
        self._committed -= account.committed
        account.held = account.busy = 0
        account.away, account.keeps_floor = True, keep_floor
        self._committed += account.committed
        self.version += 1

    def attach(self, name: str, count: int) -> None:
        """Let `name` come back: its floor counts again, and the next `count` grants succeed.

        Raises CapacityError and changes nothing if it may not have `count` slabs now.
        """
        account = self._accounts[name]
        if not account.away:
            raise AssertionError(f"{name!r} is not away")
        if count > max(0, self.capacity(name)):
            raise CapacityError(
                f"model {name!r} needs {count} KV pages to come back, it may have {max(0, self.capacity(name))} now: "
                "let others finish or move them out first",
                needed_pages=count,
                free_pages=self.ledger.num_free,
                holders={n: a.held for n, a in self._accounts.items()},
            )
        self._committed -= account.committed
        account.away = account.keeps_floor = False
        self._committed += account.committed
        self.version += 1
        self._trim()

    def is_away(self, name: str) -> bool:
        """Whether `name` is between `detach` and `attach`."""
        return self._accounts[name].away

    def free_pages(self, count: int) -> None:
        """Make `count` pages free for another use, at the expense of idle slabs; raises CapacityError if it cannot."""
        if count > self.num_unpromised:
            raise CapacityError(
                f"{count} pages are needed, {max(0, self.num_unpromised)} can be freed: "
                "raise device_memory or remove a model",
                needed_pages=count,
                free_pages=self.ledger.num_free,
                holders={n: a.held for n, a in self._accounts.items()},
            )
        self._trim(count)

    def _make_room(self, name: str, floor: int) -> None:
        missing = floor - self.num_unpromised
        if self.lender is not None and missing > 0:
            with suppress(CapacityError):  # said below in terms of the new model
                self.lender.take_out(missing)
        if floor > self.num_unpromised:
            raise CapacityError(
                f"model {name!r} cannot be promised {floor} KV pages: {self._committed} of "
                f"{self._num_own_pages} are used or promised; raise device_memory or lower kv_floor_pages",
                needed_pages=floor,
                free_pages=self.ledger.num_free,
                holders={n: a.committed for n, a in self._accounts.items()},
            )

    def _spare(self) -> int:
        """Pages that nobody holds or is promised; negative while more is promised than there is."""
        return self._num_own_pages - sum(a.reserved for a in self._accounts.values())

    def _trim(self, spare: int = 0) -> None:
        """Take idle slabs over the floors until `spare` pages are to spare or no such slab is left."""
        while self._spare() < spare and self._try_reclaim(None):
            pass

    def _reclaim_or_borrow(self, for_whom: str) -> None:
        if self._try_reclaim(for_whom):
            return
        if self.lender is None or not self.lender.lendable():
            raise AssertionError("no idle slab although the books say there is one")
        self.lender.lend(1)

    def _try_reclaim(self, for_whom: str | None) -> bool:
        for name, account in self._accounts.items():
            if name != for_whom and account.held > account.committed:
                self._reclaim_from(name, account)
                return True
        return False

    def _reclaim_from(self, name: str, account: _Account) -> None:
        slab = account.holder.give_up_idle_slab()
        self.arena.unmap_slab(slab)
        self.ledger.give(name, PageUse.KV, [slab])
        account.held -= 1
        self._held -= 1
        self.num_reclaims += 1

    def held(self, name: str) -> int:
        """Slabs that `name` holds."""
        return self._accounts[name].held

    def check(self) -> None:
        """Raise AssertionError unless books, ledger and arena agree."""
        self.ledger.check()
        self.arena.check()
        for name, account in self._accounts.items():
            assert 0 <= account.busy <= account.held, f"{name!r}: busy {account.busy}, held {account.held}"
            held = self.ledger.held(name, PageUse.KV)
            assert held == account.held, f"{name!r}: {account.held} slabs in the books, {held} in the ledger"
            assert not (account.away and held), f"{name!r} is away and holds {held} slabs"
        assert self._held == sum(a.held for a in self._accounts.values()), "held slabs drifted"
        assert self._committed == sum(a.committed for a in self._accounts.values()), "committed pages drifted"
        if self._committed <= self._num_own_pages:
            assert self._spare() >= 0, f"idle slabs stand on {-self._spare()} pages promised to others"
