# SPDX-License-Identifier: Apache-2.0
"""Lends memory of the device, and of the host, to whoever is outside the pool, and takes it back.

    ledger    | null | weights a | KV a | KV b | free | free | lent | lent | lent |
                                                 ◄── grow ── │ ── shrink ──►

Pages that are lent are held in the ledger like any others, so every count of free pages knows of them, and slab k
stays backed by page k. Room for them is made as for a model that comes in: idle pages first, then what is cheapest to
miss of weights and paused KV, which goes to host memory. KV is never given up for it: where it cannot leave, it stays
and the budget is refused. Below the least budget it is refused as well, so one request of full length of each model
still fits, whichever runs. 0 parks the pool: nothing is stepped until the budget has grown, and requests wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from tokenpool.errors import CapacityError, ModelUnavailableError
from tokenpool.host.host_room import check_host_memory
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.pressure import PressureRelief
from tokenpool.memory.fixed_bytes import FIXED_OWNER
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.memory.ledger import LENT_OWNER, PageUse
from tokenpool.memory.slab_allocator import SlabAllocator
from tokenpool.memory.weights import WeightStore
from tokenpool.policy.cost_model import CopyModel
from tokenpool.units import format_bytes
from tokenpool.wire.budget import BudgetOrder, BudgetState

logger = logging.getLogger(__name__)

_RETRY_S = 5.0


class Budget:
    """What the pool may use at present; called on the host loop's thread only."""

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        allocator: SlabAllocator,
        weights: WeightStore,
        relief: PressureRelief,
        copies: CopyModel,
        is_building: Callable[[], bool],
    ) -> None:
        self.is_parked = False
        """Whether no model may come onto the device."""
        self._models = models
        self._allocator = allocator
        self._ledger = allocator.ledger
        self._weights = weights
        self._host: HostLedger = weights.host
        self._relief = relief
        self._copies = copies
        self._is_building = is_building
        self._lent: list[int] = []

    def begin_with(self, device_memory: int | None) -> None:
        """Lend what a host before this one had lent, before there are models; None = it had lent nothing."""
        if device_memory is not None:
            self.is_parked = device_memory == 0
            self._lend(self._ledger.num_usable - self._pages_of(device_memory))

    @property
    def obstacle(self) -> str:
        """Why no model comes onto the device; empty unless the pool is parked."""
        return "the pool is parked (device_memory 0): grow it first" if self.is_parked else ""

    def refuse_parked(self, name: str) -> None:
        """Raise CapacityError if the pool is parked, in which no model can be loaded."""
        if self.is_parked:
            raise CapacityError(f"model {name!r} cannot be loaded: {self.obstacle}")

    def set(self, order: BudgetOrder) -> BudgetState:
        """Make this the budget; raises PoolError, with the budget as it was, when it cannot be.

        Models that have left the device for it come back by themselves.
        """
        if not order.is_question and self._is_building():
            raise ModelUnavailableError(
                "a model is being built, and the budget stays meanwhile", retry_after_s=_RETRY_S
            )
        before = self._host.budget_bytes
        wanted = before if order.host_memory is None else order.host_memory
        if wanted < before:
            check_host_memory(self._weights.snapshot(), wanted, self._copies)
        self._host.budget_bytes = max(before, wanted)  # KV may need it that leaves the device
        try:
            if order.device_memory is not None:
                self._set_device(order.device_memory, then=lambda: self._shrink_host(wanted))
            else:
                self._shrink_host(wanted)
        except BaseException:  # KV that went where the new budget had room stays counted
            self._host.budget_bytes = max(before, self._host.budget_bytes - self._host.free_bytes)
            raise
        if self._host.node is not None and not order.is_question:
            self._host.node.set_budget(self._host.budget_bytes)
        state = self.state()
        if not order.is_question:
            logger.info("budget changed device_memory=%d host_memory=%d", state.device_memory, state.host_memory)
        return state

    # -- device --------------------------------------------------------------------------------------

    def _set_device(self, nbytes: int, then: Callable[[], None]) -> None:
        ledger, stays = self._ledger, self._pages_that_stay()
        if nbytes > (most := ledger.num_pages * ledger.page_size):
            raise CapacityError(
                f"device_memory cannot be {format_bytes(nbytes)}: addresses are reserved for {format_bytes(most)}, "
                "what the pool file says; write more there and start the pool anew"
            )
        if nbytes == 0:
            self._refuse_fixed_weights()
        elif self._pages_of(nbytes) < self._least_pages():
            raise CapacityError(
                f"device_memory cannot be {format_bytes(nbytes)}: for one request of full length of each model "
                f"{format_bytes(self._least_pages() * ledger.page_size)} are needed; 0 parks the pool"
            )
        change = ledger.num_usable - (self._pages_of(nbytes) if nbytes else stays)
        if change > 0:
            self._make_room(change, nbytes)
        then()
        if change > 0:
            self._lend(change)
            self._allocator.arena.device.release_unused()
        else:
            self._take_back(-change)
        self.is_parked = nbytes == 0
        for hosted in self._models.values():
            hosted.core.settle_calls()

    def _make_room(self, pages: int, nbytes: int) -> None:
        try:
            self._weights.make_room(pages)
        except CapacityError as error:
            page = self._ledger.page_size
            least = self._ledger.num_usable - max(0, self._allocator.num_unpromised)
            possible = format_bytes(max(least, self._least_pages()) * page)
            raise CapacityError(
                f"device_memory cannot be {format_bytes(nbytes)} now: {self._holders()}; "
                f"{possible} is possible, or more host_memory for KV to go to",
                needed_pages=pages,
                free_pages=self._ledger.num_free,
                holders=error.holders,
            ) from error

    def _refuse_fixed_weights(self) -> None:
        held = self._ledger.snapshot().held.get(PageUse.WEIGHTS, {})
        fixed = {name: pages for name, pages in held.items() if name != FIXED_OWNER and name not in self._weights}
        if fixed:
            nbytes = sum(fixed.values()) * self._ledger.page_size
            raise CapacityError(
                f"the pool cannot be parked: the weights of {', '.join(fixed)} ({format_bytes(nbytes)}) stay on the "
                f"device with weights: fixed; {format_bytes(self._least_pages() * self._ledger.page_size)} is possible",
                holders=fixed,
            )

    def _lend(self, pages: int) -> None:
        if pages > 0:
            self._lent += self._ledger.take(LENT_OWNER, PageUse.LENT, pages)

    def _take_back(self, pages: int) -> None:
        if pages:
            back, self._lent = self._lent[-pages:], self._lent[:-pages]
            self._ledger.give(LENT_OWNER, PageUse.LENT, back)
            self._allocator.version += 1  # models that found no memory look again

    def _pages_of(self, nbytes: int) -> int:
        return nbytes // self._ledger.page_size

    def _pages_that_stay(self) -> int:
        """Pages that nothing takes off the device: null blocks, and tensors that do not move."""
        return self._ledger.total(PageUse.NULL) + self._weights.fixed.num_pages

    def _least_pages(self) -> int:
        """The smallest budget with which each model can finish any request; all pages where they are too few."""
        spare = self._relief.spare_pages()
        least = self._pages_that_stay() + 1 if spare is None else self._ledger.num_usable - spare
        return min(least, self._ledger.num_pages)

    def _holders(self) -> str:
        page, held = self._ledger.page_size, self._ledger.snapshot().held
        told = [
            f"{format_bytes(pages * page)} of {use} of {owner}"
            for use, owners in held.items()
            for owner, pages in owners.items()
            if use != PageUse.LENT
        ]
        return f"{', '.join(told) or 'nothing'} cannot all leave the device"

    # -- host memory ---------------------------------------------------------------------------------

    def _shrink_host(self, nbytes: int) -> None:
        ledger = self._host
        used = ledger.budget_bytes - ledger.free_bytes
        if used > nbytes:
            ledger.make_room(used - nbytes)
        used = ledger.budget_bytes - ledger.free_bytes
        if used > nbytes:
            held = [f"{format_bytes(n)} of {use} of {owner}" for use, owners in ledger.snapshot().items()
                    for owner, n in owners.items()]  # fmt: skip
            raise CapacityError(
                f"host_memory cannot be {format_bytes(nbytes)} now: {', '.join(held)} are there; "
                f"{format_bytes(used)} is possible"
            )
        ledger.budget_bytes = nbytes

    # -- state ---------------------------------------------------------------------------------------

    def state(self) -> BudgetState:
        """The present budget."""
        ledger, page = self._ledger, self._ledger.page_size
        held = {use: owners for use, owners in ledger.snapshot().held.items() if use != PageUse.LENT}
        return BudgetState(
            device_memory=0 if self.is_parked else ledger.num_usable * page,
            host_memory=self._host.budget_bytes,
            device_memory_least=self._least_pages() * page,
            device_memory_most=ledger.num_pages * page,
            device_held={use: {o: n * page for o, n in owners.items()} for use, owners in held.items()},
            host_held=self._host.snapshot(),
            node=self._host.node.book if self._host.node is not None else {},
            asleep={name: hosted.asleep for name, hosted in self._models.items() if hosted.asleep is not None},
        )

    def check(self) -> None:
        """Raise AssertionError unless the ledger has the pages that are lent."""
        held = self._ledger.held(LENT_OWNER, PageUse.LENT)
        assert held == len(self._lent), f"{len(self._lent)} pages are lent, {held} in the ledger"
        if self.is_parked:
            assert self._ledger.total(PageUse.KV) == 0, "the pool is parked and KV is on the device"
