# SPDX-License-Identifier: Apache-2.0
"""A cluster in simulated time: requests arrive, a router gives each to a device, devices serve them."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from tokenpool.config import SLO
from tokenpool.policy.capacity import Role
from tokenpool.policy.turns import TurnPolicy
from tokenpool.sim.device import SimDevice
from tokenpool.sim.device_memory import Node
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.result import MostMissed, SimResult
from tokenpool.sim.seat import Seat
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, Workload

_INF = math.inf


class Waked(Protocol):
    """Takes calls at times that were asked for: a device, or what takes the place of one."""

    def wake(self, now_s: float, version: int, /) -> None:
        """The time has come."""


class Receiver(Protocol):
    """Takes requests: a device, or what takes the place of one."""

    def arrive(self, request: Timeline, now_s: float, /) -> None:
        """A request comes in."""


class Router(Protocol):
    """Chooses devices; it sees them as they are at the time of the call."""

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> Receiver | None:
        """The device for a new request; None = it is refused, and fails."""


@runtime_checkable
class LookingRouter(Router, Protocol):
    """Is told of the devices from time to time, and of nothing that happens between."""

    period_s: float
    """Between two looks."""

    def look(self, now_s: float, devices: Sequence[SimDevice]) -> None:
        """See all devices as they are now."""


class Call:
    """A call at a time that was asked for, in the cluster's heap of events."""

    def __init__(self, call: Callable[[float], None]) -> None:
        self._call = call

    def wake(self, now_s: float, _: int) -> None:
        """The time has come."""
        self._call(now_s)


@runtime_checkable
class HandOverRouter(Router, Protocol):
    """Also chooses where a request decodes that another device has prefilled."""

    def hand_over(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """The decode device for a request that was prefilled; `devices` are those of that role."""


class Cluster:
    """Devices under one router. A run is a function of its arguments: nothing is drawn, no clock is read."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        make_policy: Callable[[], TurnPolicy],
        router: Router,
        costs: Callable[[str], ModelCosts],
        slo: SLO,
        *,
        give_up_s: float = _INF,
        slos: Mapping[str, SLO | None] | None = None,
        priorities: Mapping[str, int] | None = None,
    ) -> None:
        """`slo` is that of the models that `slos` does not name; those without a priority have 0."""
        self.router = router
        self.slo = slo
        self._costs_of, self._slos, self._priorities = costs, slos or {}, priorities or {}
        self.give_up_s = give_up_s
        """Age at which a request without a token fails; looked at only when a request arrives."""
        self.done = self.num_events = 0
        self._last_arrival_s = 0.0
        self._heap: list[tuple[float, int, Any, int | Timeline]] = []  # a Waked with an int, a Receiver with a request
        self._sequence = 0
        self._result = SimResult()
        self._most_missed: MostMissed | None = None
        nodes = _nodes(specs)
        self.devices = [
            SimDevice(i, spec, make_policy(), self._seat, self._at, self._done, self._hand_over, nodes[i])
            for i, spec in enumerate(specs)
        ]
        self.entries = [device for device in self.devices if device.spec.role is not Role.DECODE]
        """Devices for new requests."""
        self.decoders = [device for device in self.devices if device.spec.role is Role.DECODE]
        self._hand_overs = router if isinstance(router, HandOverRouter) else None
        if self.decoders and self._hand_overs is None:
            raise ValueError(f"{type(router).__name__} cannot hand requests over: give all devices the role mixed")

    def run(
        self,
        workload: Workload,
        *,
        drain_s: float = 600.0,
        window_s: tuple[float, float] = (0.0, _INF),
        most_missed: MostMissed | None = None,
    ) -> SimResult:
        """Serve a workload; what has not ended `drain_s` after the last arrival counts as failed.

        All requests are served; those that arrive in `window_s`, from and up to, are measured. The run ends early when
        requests that have ended missed more tokens than `most_missed` says.
        """
        self._result.window_s, self._most_missed = window_s, most_missed
        started = time.perf_counter()
        heap, requests = self._heap, workload.requests
        count, position = len(requests), 0
        self._last_arrival_s = requests[-1].arrival_s if requests else 0.0
        end_s = self._last_arrival_s + drain_s
        next_s = requests[0].arrival_s if requests else _INF
        open_requests = self._result.open
        if isinstance(self.router, LookingRouter):
            self._look_from(self.router, 0.0)
        while not self._result.is_stopped:
            if heap and heap[0][0] <= next_s:
                time_s, _, device, what = heapq.heappop(heap)
                if time_s > end_s:
                    break
                self.num_events += 1
                if type(what) is int:
                    device.wake(time_s, what)
                else:
                    device.arrive(what, time_s)
            elif position < count:
                spec = requests[position]
                request = Timeline(spec, self._slo_of(spec.model))
                position += 1
                self.num_events += 1
                open_requests.add(request)
                if self.give_up_s < _INF:
                    for device in self.entries:
                        device.give_up(request.arrival_s - self.give_up_s)
                chosen = self.router.route(request, request.arrival_s, self.entries)
                if chosen is None:
                    request.failed = True
                    self._done(request)
                else:
                    chosen.arrive(request, request.arrival_s)
                next_s = requests[position].arrival_s if position < count else _INF
            else:
                break
        self._result.close(self.devices, self.num_events, time.perf_counter() - started)
        return self._result

    def _look_from(self, router: LookingRouter, now_s: float) -> None:
        """Have the router look at the devices now and again."""
        router.look(now_s, self.devices)
        if now_s < self._last_arrival_s:
            self._at(now_s + router.period_s, Call(partial(self._look_from, router)), 0)

    def _slo_of(self, model: str) -> SLO | None:
        return self._slos.get(model, self.slo)

    def _seat(self, model: str, index: int) -> Seat:
        return Seat(model, index, self._costs_of(model), self._slo_of(model), self._priorities.get(model, 0))

    def _at(self, time_s: float, target: Waked | Receiver, what: int | Timeline) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time_s, self._sequence, target, what))

    def _done(self, request: Timeline) -> None:
        self._result.add(request)
        if self._most_missed is not None:
            self._result.stop_beyond(self._most_missed, request)

    def _hand_over(self, request: Timeline, now_s: float, copy_s: float) -> None:
        assert self._hand_overs is not None
        device = self._hand_overs.hand_over(request, now_s, self.decoders)
        self._at(now_s + copy_s, device, request)


def _nodes(specs: Sequence[DeviceSpec]) -> list[Node]:
    """The node of each device: neighbours are on one, as many as it has."""
    nodes: list[Node] = []
    for i, spec in enumerate(specs):
        nodes.append(Node(spec) if i % spec.devices_per_node == 0 else nodes[-1])
    return nodes
