# SPDX-License-Identifier: Apache-2.0
"""A simulated cluster whose models are on some hosts only, with a controller that moves them, and hosts that fail.

    pool = LivePool(specs, make_policy, costs, slo, LiveCapacity())
    result = pool.run(workload)
    pool.decisions      # what was decided, and when

The weights of a seat that is coming take the time of their bytes on the host's way from disk or from other machines,
one after the other. Requests of a model without a seat that serves wait until there is one. What a lost host had is
served elsewhere from the start, with the tokens that were delivered as a longer prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tokenpool.config import SLO
from tokenpool.policy.capacity import (
    LOAD_BYTES_PER_S,
    Action,
    CapacityDecision,
    CapacityHost,
    CapacityPolicy,
    CapacitySeat,
    CapacityView,
    HostState,
    Role,
)
from tokenpool.policy.turns import Residency, TurnPolicy, load_turn_policy
from tokenpool.sim.cluster import Call, Cluster, Receiver
from tokenpool.sim.device import SimDevice
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.first_seats import first_seats
from tokenpool.sim.live_measures import WINDOWS, Punctuality, Traffic, num_late
from tokenpool.sim.result import MostMissed, SimResult
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, Workload

_INF = float("inf")
POOL_POLICIES = ("slack", "request_level", "round_robin")
"""Turn policies of a pool in which every device does everything; others come with a placement of their own."""


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """Of the hosts and the controller."""

    period_s: float = 5.0
    """Between two looks of the controller."""
    host_bytes: int = 256 << 30
    """Of host memory for weights, per host."""
    load_bytes_per_s: float = LOAD_BYTES_PER_S
    """At which a host gets weights that it does not have."""
    hosts_per_node: int = 8
    min_replicas: int = 1
    is_everywhere: bool = False
    """Whether each model begins on every host, which must have the memory for it."""
    forecast_s: float = 60.0
    """The first seats are those for the traffic of so many seconds from the begin on."""


@dataclass(slots=True)
class _Seat:
    """One model on one host."""

    is_coming: bool = True
    is_leaving: bool = False


class _Parking:
    """Takes the place of a device that is yet to be found: for requests without a seat, and while KV is on its way."""

    def __init__(self, arrive: Callable[[Timeline, float], None]) -> None:
        self.arrive = arrive


class LivePool(Cluster):
    """See the module; `capacity` None = the first seats stay for ever. `failures` are (seconds, host index)."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        make_policy: Callable[[], TurnPolicy],
        costs: Mapping[str, ModelCosts],
        slo: SLO,
        capacity: CapacityPolicy | None,
        settings: LiveSettings | None = None,
        failures: Sequence[tuple[float, int]] = (),
    ) -> None:
        self.decisions: list[tuple[float, CapacityDecision]] = []
        """With the time of each; the first seats are not in it."""
        self.first: dict[str, tuple[int, ...]] = {}
        """Hosts that each model began on."""
        self._settings, self._capacity, self._failures = settings or LiveSettings(), capacity, failures
        self._model_costs, self._frontend = costs, FrontendRouter()
        count = len(specs)
        self._seats: list[dict[str, _Seat]] = [{} for _ in range(count)]
        self._hosts_of: dict[str, list[int]] = {model: [] for model in costs}
        self._is_lost, self._loads_until_s = [False] * count, [0.0] * count
        self._since_role_s, self._moved_s = [-_INF] * count, [0.0] * count
        self._model_moved_s = dict.fromkeys(costs, 0.0)
        self._traffic = {model: Traffic() for model in costs}
        self._punctuality = [Punctuality() for _ in range(count)]
        self._device_of: dict[Timeline, int] = {}
        self._waiting: list[tuple[Timeline, bool]] = []
        self._courier = _Parking(lambda request, now_s: self._send(request, now_s, decodes=True))
        self._gate = _Parking(lambda request, now_s: self._send(request, now_s))
        # Hosts have copies of their own: what is in a node's memory follows from seats.
        own = [replace(spec, node_bytes=_INF) for spec in specs]
        super().__init__(own, make_policy, self, costs.__getitem__, slo)

    @classmethod
    def of(cls, specs: Sequence[DeviceSpec], policy: str, *others: Any) -> LivePool:
        """With the name of a turn policy in place of `make_policy`."""
        return cls(specs, lambda: load_turn_policy(policy), *others)

    def moves_to_json(self) -> dict[str, Any]:
        """What was decided, as plain values: `moves`, and the bytes that were copied for them."""
        moves = [
            {
                "at_s": at_s,
                "action": str(d.action),
                "model": d.model,
                "from": d.from_host,
                "to": d.to_host,
                "why": d.reason,
            }
            for at_s, d in self.decisions
        ]
        return {"moves": moves, "moved_bytes": sum([d.copy_bytes for _, d in self.decisions])}

    # -- the run -----------------------------------------------------------------------------------------

    def run(
        self,
        workload: Workload,
        *,
        drain_s: float = 600.0,
        window_s: tuple[float, float] = (0.0, _INF),
        most_missed: MostMissed | None = None,
    ) -> SimResult:
        """See `Cluster.run`."""
        requests, settings = workload.requests, self._settings
        self._last_arrival_s = requests[-1].arrival_s if requests else 0.0
        everywhere = dict.fromkeys(self._model_costs, tuple(range(len(self.devices))))
        view = self._view(0.0)
        first = everywhere if settings.is_everywhere else first_seats(view, workload, settings.forecast_s, self.slo)
        for model, hosts in first.items():
            self.first[model] = hosts
            for h in hosts:
                self._seats[h][model] = _Seat(is_coming=False)
                self._hosts_of[model].append(h)
        self._at(settings.period_s, Call(self._tick), 0)
        for time_s, h in self._failures:
            self._at(time_s, Call(partial(self._lose, h)), 0)
        self._look_from(self._frontend, 0.0)
        self._result.placement = self.first
        self._count_host_bytes()
        return super().run(workload, drain_s=drain_s, window_s=window_s, most_missed=most_missed)

    def _count_host_bytes(self) -> None:
        """Keep the most that a node has held."""
        held = [sum([self._model_costs[model].weight_bytes for model in seats]) for seats in self._seats]
        size = self._settings.hosts_per_node
        for device, nbytes in zip(self.devices, held, strict=True):
            device.prefixes.resize(max(0.0, self._settings.host_bytes - nbytes))
        most = max([sum(held[i : i + size]) for i in range(0, len(held), size)])
        self._result.host_bytes_per_node = max(self._result.host_bytes_per_node, most)

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> Receiver:
        """See `Router`."""
        self._traffic[request.spec.model].arrive(request)
        return self._gate

    def hand_over(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """Not used: `_hand_over` looks for the device when the KV has been copied."""
        raise NotImplementedError

    def _send(self, request: Timeline, now_s: float, *, decodes: bool = False, has_kv: bool = True) -> None:
        """To the best of the hosts that serve its model in that role, or into the line for the next that does."""
        model, bad = request.spec.model, Role.PREFILL if decodes else Role.DECODE
        able = [h for h in self._hosts_of[model] if self.devices[h].spec.role != bad]
        serving = [h for h in able if not self._seats[h][model].is_coming]
        found = [h for h in serving if not self._seats[h][model].is_leaving] or serving
        if not found:
            self._waiting.append((request, decodes and has_kv))
            return
        device = self.devices[found[0]]
        if len(found) > 1:
            device = self._frontend.route(request, now_s, [self.devices[h] for h in found])
        self._device_of[request] = device.index
        device.arrive(request, now_s, has_kv=has_kv)

    def _hand_over(self, request: Timeline, now_s: float, copy_s: float) -> None:
        self._punctuality[self._device_of.pop(request)].end(request)
        self._at(now_s + copy_s, self._courier, request)

    def _done(self, request: Timeline) -> None:
        h = self._device_of.pop(request, None)
        if h is not None:
            self._punctuality[h].end(request)
        if not request.failed:
            self._traffic[request.spec.model].end(request)
        super()._done(request)

    # -- the controller ------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> None:
        here: list[list[Timeline]] = [[] for _ in self.devices]
        for request, h in self._device_of.items():
            here[h].append(request)
        for device, book, requests in zip(self.devices, self._punctuality, here, strict=True):
            book.tick(now_s, device.busy_s, requests)
        for h, seats in enumerate(self._seats):
            for model in [model for model, seat in seats.items() if seat.is_leaving]:
                self._try_unload(h, model)
        if self._capacity is not None:
            made = self._capacity.decide(self._view(now_s))
            for decision in made:
                self.decisions.append((now_s, decision))
                self._carry_out(decision, now_s)
            if made:
                self._count_host_bytes()
        if (most := self._most_missed) is not None:
            if most.counts_overdue:
                self._result.stop_overdue(most, self._late(here, now_s))
            if most.is_unwanted is not None and most.is_unwanted():
                self._result.is_stopped = True
        if now_s < self._last_arrival_s or self._result.open:
            self._at(now_s + self._settings.period_s, Call(self._tick), 0)

    def _late(self, here: Sequence[Sequence[Timeline]], now_s: float) -> dict[str, int]:
        """Tokens by model that are late for certain, of requests on their way; `here` are those of each device."""
        late: dict[str, int] = {}
        (from_s, until_s), waiting = self._result.window_s, [request for request, _ in self._waiting]
        known_s = [device.accounted_s(now_s) for device in self.devices]
        for requests, upto_s in zip([*here, waiting], [*known_s, now_s], strict=True):
            for request in requests:
                if from_s <= request.arrival_s < until_s and (count := num_late(request, upto_s)):
                    late[request.spec.model] = late.get(request.spec.model, 0) + count
        return late

    def _view(self, now_s: float) -> CapacityView:
        models = [
            self._traffic[model].seen(
                model,
                costs,
                now_s,
                slo=self.slo,
                min_replicas=self._settings.min_replicas,
                since_move_s=now_s - self._model_moved_s[model],
            )
            for model, costs in self._model_costs.items()
        ]
        hosts = [self._host(h, now_s) for h in range(len(self.devices))]
        return CapacityView(now_s, hosts, models, WINDOWS)

    def _host(self, h: int, now_s: float) -> CapacityHost:
        device, book, settings = self.devices[h], self._punctuality[h], self._settings
        state = HostState.LOST if self._is_lost[h] else HostState.UP
        seats = []
        for model, seat in self._seats[h].items():
            tokens_per_s, on_time_frac = book.of(model)
            at = device.seats.get(model)
            seats.append(
                CapacitySeat(
                    model,
                    Residency.ON_DISK if seat.is_coming else at.residency if at else Residency.IN_HOST,
                    seat.is_coming,
                    seat.is_leaving,
                    at.num_decoding if at else 0,
                    len(at.waiting) if at else 0,
                    tokens_per_s,
                    on_time_frac,
                )
            )
        held = sum([self._model_costs[model].weight_bytes for model in self._seats[h]])
        return CapacityHost(
            f"h{h}",
            f"n{h // settings.hosts_per_node}",
            device.spec.memory_bytes,
            settings.host_bytes - held,
            device.spec.role,
            state,
            seats,
            book.busy_frac() if now_s else 0.0,
            link_bytes_per_s=device.spec.link_bytes_per_s,
            load_bytes_per_s=settings.load_bytes_per_s,
            num_copies=sum([seat.is_coming for seat in self._seats[h].values()]),
            since_role_s=now_s - self._since_role_s[h],
            since_move_s=now_s - self._moved_s[h],
        )

    def _carry_out(self, decision: CapacityDecision, now_s: float) -> None:
        action, model = decision.action, decision.model
        target, source = (int(name[1:]) if name else None for name in (decision.to_host, decision.from_host))
        if action is Action.ROLE:
            assert target is not None, "a role is given to a host"
            device = self.devices[target]
            device.spec = replace(device.spec, role=decision.role or Role.MIXED)
            self._since_role_s[target] = now_s
            self._send_waiting(now_s)
            return
        assert model is not None, "a seat is of a model"
        if target is not None:
            self._seats[target][model] = _Seat()
            self._hosts_of[model].append(target)
            self._moved_s[target] = now_s
            start_s = max(now_s, self._loads_until_s[target])
            ready_s = self._loads_until_s[target] = start_s + decision.copy_bytes / self._settings.load_bytes_per_s
            self._at(ready_s, Call(partial(self._ready, target, model)), 0)
        if source is not None and action in (Action.MOVE, Action.DROP):
            self._seats[source][model].is_leaving = True
            self._moved_s[source] = now_s
        self._model_moved_s[model] = now_s

    def _ready(self, h: int, model: str, now_s: float) -> None:
        if not self._is_lost[h]:
            self._seats[h][model].is_coming = False
            self._send_waiting(now_s)

    def _try_unload(self, h: int, model: str) -> None:
        """A seat that is leaving goes when its requests have ended and another one serves."""
        others = [g for g in self._hosts_of[model] if g != h and not self._seats[g][model].is_coming]
        at = self.devices[h].seats.get(model)
        if others and not self._seats[h][model].is_coming and (at is None or not at.has_work):
            if at is not None:
                self.devices[h].memory.forget(at)
            del self._seats[h][model]
            self._hosts_of[model].remove(h)

    def _lose(self, h: int, now_s: float) -> None:
        self._is_lost[h] = True
        for model in self._seats[h]:
            self._hosts_of[model].remove(h)
        if self._capacity is None:
            self._seats[h].clear()
        for request in self.devices[h].fail():
            self._device_of.pop(request, None)
            self._send(request, now_s, has_kv=False)

    def _send_waiting(self, now_s: float) -> None:
        waiting, self._waiting = self._waiting, []
        for request, has_kv in waiting:
            self._send(request, now_s, decodes=has_kv, has_kv=has_kv)
