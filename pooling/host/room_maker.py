# SPDX-License-Identifier: Apache-2.0
"""Frees pages of the device at the expense of models that can do without them for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from tokenpool.errors import CapacityError, PoolError
from tokenpool.host.host_room import HostRoom
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.kv_swap import KVMove, KVSwapper
from tokenpool.host.switch_counters import SwitchCounters
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.slab_allocator import SlabAllocator
from tokenpool.memory.states import WeightState
from tokenpool.memory.weights import WeightStore
from tokenpool.policy.cost_model import CopyKind, CopyModel, CostModel
from tokenpool.policy.eviction import Candidate, EvictionKind, ReuseEstimator, choose_evictions
from tokenpool.policy.switch_plan import SwitchPlan, Victim, plan_switch
from tokenpool.wire.trace import TraceLog

logger = logging.getLogger(__name__)


class RoomMaker:
    """Chooses victims and takes them out; called on the host loop's thread only."""

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        allocator: SlabAllocator,
        weights: WeightStore,
        swapper: KVSwapper,
        host: HostLedger,
        copies: CopyModel,
        trace: TraceLog,
    ) -> None:
        self.counters = SwitchCounters()
        self.reuse = ReuseEstimator()
        self.current: str | None = None
        """Whose turn it is: its weights are not lent to KV."""
        self.host = HostRoom(models, weights, swapper, host, copies, self.counters, self.evict)
        """Shares host memory."""
        self._models = models
        self._allocator = allocator
        self._weights = weights
        self._swapper = swapper
        self._copies = copies
        self._cost = CostModel(copies=copies)
        self._trace = trace
        self._lendable = 0
        self._lendable_is_stale = True
        weights.make_room = self._free_pages
        swapper.on_moved = self._note_move
        allocator.lender = self

    @property
    def version(self) -> int:
        """Grows whenever pages may have come free."""
        return self._allocator.version

    def changed(self) -> None:
        """A model got work, or has none any more, or moved: what can be lent to KV is another number."""
        self._lendable_is_stale = True

    def most_slabs_for(self, name: str) -> int:
        """Slabs that a model could have if all others gave up what they can."""
        if name not in self._weights:
            return self._allocator.most_for(name)
        ledger = self._allocator.ledger
        stays = ledger.total(PageUse.NULL) + self._weights.fixed.num_pages
        views = self._weights.snapshot()
        kept = sum(view.pages for other, view in views.items() if other != name and view.keep == "device")
        return ledger.num_usable - stays - kept - views[name].pages

    def evict(self, name: str) -> None:
        """Take a model's weights off the device; a copy in flight is cancelled."""
        self._weights.evict(name)
        self._allocator.version += 1
        self.changed()

    def leave(self, hosted: HostedModel) -> None:
        """Take one model off the device, with the KV of its requests, and wait; raises PoolError if it cannot go."""
        name = hosted.name
        hosted.core.drain_batches()
        if self._swapper.is_out(name):
            self._swapper.settle(name)
        else:
            self._swapper.out(hosted)
        if name in self._weights and self._allocator.ledger.held(name, PageUse.WEIGHTS):
            self.evict(name)

    # -- making room on the device -------------------------------------------------------------------

    def keep_promises(self, name: str) -> None:
        """Take other models out until what is promised to all, `name`'s raised floor included, is there."""
        try:
            self._evict_until(-self._allocator.num_unpromised, name)
        except PoolError as error:  # the promise is kept when others finish
            logger.debug("no room model=%s reason=%s", name, error)

    def lendable(self) -> int:
        """Pages of weights of models without work: KV may have them (the allocator's `Lender`)."""
        if self._lendable_is_stale:
            self._lendable_is_stale = False
            before = self._lendable
            self._lendable = sum(self._weights.pages_of(h.name) for h in self._models.values() if self._is_idle(h))
            if self._lendable > before:
                self._allocator.version += 1
        return self._lendable

    def lend(self, pages: int) -> None:
        """Evict weights of models without work until `pages` more pages are free."""
        self._evict_until(pages, None, keep=self._busy_names())
        self._allocator.free_pages(pages)

    def take_out(self, pages: int) -> None:
        """Take models off the device until `pages` more pages are nobody's promise (the allocator's `Lender`)."""
        self._evict_until(pages, None)

    def _busy_names(self) -> frozenset[str]:
        return frozenset(name for name, h in self._models.items() if h.core.scheduler.requests)

    def _is_idle(self, hosted: HostedModel) -> bool:
        name = hosted.name
        return (
            name != self.current
            and not hosted.stays_on_device
            and name in self._weights
            and self._weights.state(name) is WeightState.ON_DEVICE
            and not hosted.core.scheduler.requests  # not has_unfinished_requests: it is False while steps are drained
        )

    def make_room(
        self, hosted: HostedModel, *, keep: frozenset[str] = frozenset(), spare: str | None = None, wait: bool = True
    ) -> SwitchPlan:
        """Free what `hosted` needs to step, pages of its weights and slabs of its KV; returns the plan of the switch.

        Of the plan the victims' part is done. Models in `keep` stay; `spare` goes before other busy ones. Raises
        CapacityError when too little can be freed; what went out meanwhile is out. It is raised too if KV must leave
        first and nobody is to `wait` for that; `version` has grown when it has left.
        """
        name, allocator = hosted.name, self._allocator
        missing_bytes = pages = 0
        if name in self._weights and self._weights.state(name) is WeightState.IN_HOST:
            missing_bytes, pages = self._weights.bytes_of(name), self._weights.pages_of(name)
        slabs = kv_bytes = 0
        if self._swapper.is_out(name):
            slabs = max(self._swapper.slabs_needed(hosted), allocator.floor(name))
            kv_bytes = self._swapper.bytes_out(hosted)
        victims = self._evict_until(pages + slabs - allocator.num_unpromised, name, keep=keep, spare=spare, wait=wait)
        if pages:
            allocator.free_pages(pages)
        return plan_switch(
            name,
            weights_bytes_missing=missing_bytes,
            kv_bytes_out_at_host=kv_bytes,
            victims=victims,
            cost=self._cost,
            page_size=allocator.ledger.page_size,
        )

    def _free_pages(self, pages: int) -> None:
        self._evict_until(pages - self._allocator.num_unpromised, None)
        self._allocator.free_pages(pages)

    def _evict_until(
        self,
        pages: int,
        target: str | None,
        *,
        keep: frozenset[str] = frozenset(),
        spare: str | None = None,
        wait: bool = True,
    ) -> list[Victim]:
        """Take victims out until `pages` more pages are nobody's promise; returns them.

        A victim that cannot leave, for want of host memory, is spared and others are chosen. If these are too few and
        somebody is to `wait`, requests of spared models are preempted: their KV is given up and computed again later.
        Raises CapacityError if all that is too little, or still leaving and nobody is to `wait`.
        """
        allocator = self._allocator
        goal = allocator.num_unpromised + pages
        spared: set[str] = set()
        gone: list[Victim] = []
        while (missing := goal - allocator.num_unpromised) > 0:
            leaving = self._swapper.leaving()
            missing -= sum(map(allocator.committed, leaving))
            if missing <= 0 and wait:
                self._swapper.settle(leaving[0])
                continue
            if missing <= 0:
                raise CapacityError(f"KV of {', '.join(leaving)} is being copied to the host", needed_pages=pages)
            chosen = choose_evictions(self._candidates(target, keep, spare, spared), missing)
            if chosen is None and wait and target is not None and self._preempt_one(spared):
                continue
            if chosen is None:
                raise CapacityError(
                    f"{missing} more pages are needed{f' for model {target!r}' if target else ''} and all that may "
                    "leave the device is out: raise device_memory",
                    needed_pages=missing,
                    free_pages=allocator.ledger.num_free,
                )
            for candidate in chosen:
                gone += self._take_out(candidate, spared)
        return gone

    def _take_out(self, candidate: Candidate, spared: set[str]) -> list[Victim]:
        """Take one candidate out, a model's unused KV with its weights; an empty list if it cannot leave.

        Used KV is then on its way: `KVSwapper.leaving` names it.
        """
        name, kind = candidate.owner, candidate.kind
        hosted, gone = self._models[name], []
        hosted.core.drain_batches()
        if self._is_gone(candidate):
            return []
        if kind is not EvictionKind.WEIGHTS or (name not in spared and self._can_leave_for_free(hosted)):
            promised, nbytes = self._allocator.committed(name), self._swapper.bytes_out(hosted)
            try:
                self._swapper.begin_out(hosted)
                if not nbytes:
                    self._swapper.settle(name)
            except PoolError as error:  # the host tier is full, or a copy fails: keep this KV, look for others
                logger.warning("KV stays on the device model=%s reason=%s", name, error)
                self.counters.failures += 1
                spared.add(name)
                return []
            self.counters.kv_evictions += bool(nbytes)
            kv_kind = EvictionKind.PAUSED_KV if nbytes else EvictionKind.IDLE_KV
            gone.append(Victim(name, kv_kind, promised, nbytes))
        if kind is EvictionKind.WEIGHTS:
            start = time.time()
            self.evict(name)
            self.counters.weight_evictions += 1
            self._trace.record("weights_out", name, start, time.time())
            gone.append(Victim(name, kind, self._weights.pages_of(name)))
        return gone

    def _is_gone(self, candidate: Candidate) -> bool:
        """Whether it went with another since it was chosen: a drained step may end requests, and their KV was idle."""
        if candidate.kind is EvictionKind.WEIGHTS:
            return self._weights.state(candidate.owner) not in (WeightState.ON_DEVICE, WeightState.COPYING)
        return self._swapper.is_out(candidate.owner)

    def _preempt_one(self, spared: set[str]) -> bool:
        """Preempt all requests of a model whose KV cannot leave, which is then forgotten; False if there is none."""
        for name in sorted(spared):
            core = self._models[name].core
            if not self.host.may_give_up_kv(name):
                continue
            core.drain_batches()
            if core.preempt_all():
                logger.warning("KV is given up, host memory is full and another model waits model=%s", name)
                self.host.gave_up_kv(name)
                spared.discard(name)
                return True
        return False

    def _can_leave_for_free(self, hosted: HostedModel) -> bool:
        """Whether the model's KV is in and no request uses a block: it leaves without a copy."""
        pool = hosted.build.pool
        return pool is not None and not self._swapper.is_out(hosted.name) and pool.num_slabs == pool.num_idle_slabs

    def _note_move(self, move: KVMove) -> None:
        if move.nbytes:
            self._copies.observe(CopyKind.TO_DEVICE if move.to_device else CopyKind.TO_HOST, move.nbytes, move.seconds)
            name, end = "kv_in" if move.to_device else "kv_out", move.start_s + move.seconds
            self._trace.record(name, move.model, move.start_s, end, bytes=move.nbytes)

    def _candidates(
        self, target: str | None, keep: frozenset[str], spare: str | None, spared: set[str]
    ) -> list[Candidate]:
        """All that may leave: for each other model its weights, with what KV goes for free, and its used KV."""
        found = []
        for name, hosted in self._models.items():
            if name == target or name in keep:
                continue
            pool, is_out = hosted.build.pool, self._swapper.is_out(name)
            promised = 0 if pool is None or is_out or name in spared else self._allocator.committed(name)
            used = promised > 0 and pool is not None and pool.num_slabs > pool.num_idle_slabs
            has_work = hosted.core.scheduler.has_unfinished_requests()
            p_reuse = self.reuse.need(name, time.time(), has_work=has_work, is_spare=name == spare)
            is_here = name in self._weights and self._weights.state(name) in (
                WeightState.ON_DEVICE,
                WeightState.COPYING,
            )
            if is_here and not hosted.stays_on_device:
                pages = self._weights.pages_of(name) + (0 if used else promised)
                cost_s = self._copies.predict(CopyKind.TO_DEVICE, self._weights.bytes_of(name))
                found.append(Candidate(EvictionKind.WEIGHTS, name, pages, cost_s, p_reuse))
            elif promised and not used and name in self._weights:
                found.append(Candidate(EvictionKind.IDLE_KV, name, promised, 0.0, p_reuse))
            if used:
                nbytes = self._swapper.bytes_out(hosted)
                cost_s = sum(self._copies.predict(kind, nbytes) for kind in (CopyKind.TO_HOST, CopyKind.TO_DEVICE))
                found.append(Candidate(EvictionKind.PAUSED_KV, name, promised, cost_s, p_reuse))
        return found
