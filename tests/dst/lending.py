# SPDX-License-Identifier: Apache-2.0
"""Memory that is lent and models that sleep, in a simulation: what an operator asks for, and what must hold then.

While the pool is parked nothing steps and nothing that can move is on the device; a model that sleeps does not step,
and keeps no other one waiting. A host that takes the place of a dead one has the same budget, and loads no model before
it is unparked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tests.dst import engines
from tests.dst.scenario import PAGE, ModelPlan
from tests.dst.world import Violation
from tokenpool.errors import HostError, PoolError
from tokenpool.memory.fixed_bytes import FIXED_OWNER
from tokenpool.memory.ledger import PageUse
from tokenpool.wire.budget import BudgetOrder, BudgetState

_AGAIN_S = 0.01


class Lending:
    """What is lent now, and who sleeps."""

    EVENTS = frozenset({"budget", "sleep", "wake", "wake_last"})

    def __init__(self, simulation: Any) -> None:
        self.budget: BudgetState | None = None
        """What was agreed last; None = what the host began with."""
        self.num_changed = self.num_parked = self.num_asleep = 0
        self._sim = simulation
        self._asleep: dict[str, tuple[int, int]] = {}  # model -> level, steps that it had computed
        self._awake_for_good: set[str] = set()
        self._wake_last: set[str] = set()
        self._unloaded: list[ModelPlan] = []
        self._steps_at_park = -1
        self._asked: dict[Future[Any], tuple[str, tuple[Any, ...]]] = {}

    # -- what an operator asks -----------------------------------------------------------------------

    def _on_budget(self, share: float, host_share: float | None) -> None:
        host, scenario = self._sim.host, self._sim.scenario
        pages = int(share * host.ledger.num_pages)
        host_memory = None if host_share is None else int(host_share * engines.host_memory_of(scenario))
        order = BudgetOrder(pages * PAGE, host_memory)

        def agreed(state: BudgetState) -> None:
            if state.device_memory != order.device_memory or host_memory not in (None, state.host_memory):
                raise Violation(f"asked for {order}, got {state}")
            if host.ledger.num_usable != pages and pages:
                raise Violation(f"{host.ledger.num_usable} pages are usable, not {pages}")
            self.budget = state
            self.num_changed += 1
            self.num_parked += not pages
            self._steps_at_park = -1 if pages else self._steps()
            if pages:
                self._load()

        def refused(error: PoolError) -> None:
            if share == 1.0 and host_share is None:
                raise Violation(f"what was lent does not come back: {error}")

        self._ask(("budget", (share, host_share)), lambda: host.budget.set(order), agreed, refused)

    def _on_sleep(self, name: str, level: int, mode: str) -> None:
        host, world = self._sim.host, self._sim.world
        if name not in host.models or name in self._awake_for_good:
            return

        def end_requests(*_: object) -> None:  # also where the model cannot leave afterwards
            for stream in self._sim.streams.values():
                stream.aborted |= mode == "abort" and stream.plan.model == name and not stream.is_done

        def agreed(sleeps: bool) -> None:
            end_requests()
            if sleeps:
                self._asleep[name] = level, world.faults.steps[name]
                self.num_asleep += 1
            else:
                self._again(("sleep", (name, level, mode)))

        self._ask(("sleep", (name, level, mode)), lambda: host.sleepers.sleep(name, level, mode), agreed, end_requests)

    def _on_wake(self, name: str, for_good: bool = False) -> None:
        host = self._sim.host
        if for_good:
            self._awake_for_good.add(name)
        if name in host.models:
            self._asleep.pop(name, None)
            self._ask(("wake", (name, for_good)), lambda: host.sleepers.wake(name), lambda _: None)

    def _on_wake_last(self, name: str, for_good: bool) -> None:
        self._wake_last.add(name)

    def _wake_who_is_left(self) -> None:
        """When nobody waits but for models that sleep on."""
        if self._sim._queue or not all(
            s.is_done or s.plan.model in self._wake_last for s in self._sim.streams.values()
        ):
            return
        names, self._wake_last = self._wake_last, set()
        for name in names:
            self._again(("wake", (name, True)))

    def _ask(
        self,
        event: tuple[str, tuple[Any, ...]],
        function: Callable[[], Any],
        agreed: Callable[[Any], None],
        refused: Callable[[PoolError], None] = lambda error: None,
    ) -> None:
        """Call the host; what a host that ends did not do is asked of the next."""

        def unless_gone() -> Any:
            if event[0] != "budget" and event[1][0] not in self._sim.host.models:
                raise PoolError("it was removed")
            return function()

        def answered(future: Future[Any]) -> None:
            error = future.exception()
            self._asked.pop(future, None)
            self._sim.world.log(*event, str(error))
            if error is None:
                agreed(future.result())
            elif isinstance(error, HostError):
                self._again(event)
            elif isinstance(error, PoolError):
                refused(error)
            else:
                raise Violation(f"{event} ends with {type(error).__name__}: {error}") from error

        future = self._sim.host.call(unless_gone)
        self._asked[future] = event
        future.add_done_callback(answered)

    def _again(self, event: tuple[str, tuple[Any, ...]]) -> None:
        self._sim._queue.append((self._sim.world.clock.now_s + _AGAIN_S, *event))
        self._sim._queue.sort(key=lambda event: event[0])

    # -- hosts ---------------------------------------------------------------------------------------

    def loadable(self, plans: list[ModelPlan]) -> list[ModelPlan]:
        """Which of these models a host that has just started loads now."""
        if not self._sim.host.budget.is_parked:
            return plans
        self._unloaded = plans
        return []

    def waits(self, name: str) -> bool:
        """Whether a model is loaded as soon as the pool is not parked any more."""
        return any(plan.name == name for plan in self._unloaded)

    def host_is_back(self) -> None:
        """Another host has the models: those that slept sleep again, and what was not heard is said again."""
        asked, self._asked = list(self._asked.values()), {}
        for event in asked:
            self._again(event)
        asleep, self._asleep = self._asleep, {}
        for name, (level, _) in asleep.items():
            self._on_sleep(name, level, "keep")
        self._steps_at_park = self._steps() if self._sim.host.budget.is_parked else -1

    def _load(self) -> None:
        plans, self._unloaded = self._unloaded, []
        for plan in plans:
            self._sim._try_add(plan)
        if plans:
            self._sim.send_again()

    # -- laws ----------------------------------------------------------------------------------------

    def _steps(self) -> int:
        return sum(self._sim.world.faults.steps.values())

    def check(self, stepped: bool) -> None:
        """Hold what is lent, and who sleeps, to the laws; after each turn."""
        self._wake_who_is_left()
        host, faults = self._sim.host, self._sim.world.faults
        if host.budget.is_parked:
            if stepped or self._steps() != self._steps_at_park:
                raise Violation("the pool is parked and a model steps")
            left = {owner for use in host.ledger.snapshot().held for owner in host.ledger.snapshot().held[use]
                    if use in (PageUse.KV, PageUse.WEIGHTS)}  # fmt: skip
            if left - {FIXED_OWNER}:
                raise Violation(f"the pool is parked and {left} are on the device")
        for name, (level, steps) in self._asleep.items():
            if name not in host.models:
                continue
            if faults.steps[name] != steps:
                raise Violation(f"{name} sleeps and steps")
            if level and any(host.ledger.held(name, use) for use in (PageUse.KV, PageUse.WEIGHTS)):
                raise Violation(f"{name} sleeps on the device")
