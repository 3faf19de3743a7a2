# SPDX-License-Identifier: Apache-2.0
"""A cluster in simulated time: requests arrive, a router gives each to a device, devices serve them."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenpool.config import SLO
from tokenpool.policy.turns import TurnPolicy
from tokenpool.sim.device import DeviceSpec, SimDevice
from tokenpool.sim.result import SimResult
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, Workload

_INF = math.inf


class Router(Protocol):
    """Chooses devices; it sees them as they are at the time of the call."""

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice | None:
        """The device for a new request; None = it is refused, and fails."""


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
        router: Router | HandOverRouter,
        costs: Callable[[str], ModelCosts],
        slo: SLO,
        *,
        give_up_s: float = _INF,
    ) -> None:
        self.router = router
        self.slo = slo
        self.give_up_s = give_up_s
        """Age at which a request without a token fails; looked at only when a request arrives."""
        self.done = self.num_events = 0
        self._heap: list[tuple[float, int, SimDevice, int | Timeline]] = []
        self._sequence = 0
        self._result = SimResult(slo)
        self.devices = [
            SimDevice(i, spec, make_policy(), costs, slo, self._at, self._done, self._hand_over)
            for i, spec in enumerate(specs)
        ]
        self.entries = [device for device in self.devices if device.spec.role != "decode"]
        """Devices for new requests."""
        self.decoders = [device for device in self.devices if device.spec.role == "decode"]
        if self.decoders and not hasattr(router, "hand_over"):
            raise ValueError(f"{type(router).__name__} cannot hand requests over: give all devices the role mixed")

    def run(self, workload: Workload, *, drain_s: float = 600.0) -> SimResult:
        """Serve a workload; what has not ended `drain_s` after the last arrival counts as failed."""
        started = time.perf_counter()
        heap, requests = self._heap, workload.requests
        count, position = len(requests), 0
        end_s = (requests[-1].arrival_s if requests else 0.0) + drain_s
        next_s = requests[0].arrival_s if requests else _INF
        open_requests = self._result.open
        while True:
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
                request = Timeline(requests[position], self.slo)
                position += 1
                self.num_events += 1
                open_requests.add(request)
                if self.give_up_s < _INF:
                    for device in self.entries:
                        device.give_up(request.arrival_s - self.give_up_s)
                device = self.router.route(request, request.arrival_s, self.entries)
                if device is None:
                    request.failed = True
                    self._done(request)
                else:
                    device.arrive(request, request.arrival_s)
                next_s = requests[position].arrival_s if position < count else _INF
            else:
                break
        self._result.close(self.devices, self.num_events, time.perf_counter() - started)
        return self._result

    def _at(self, time_s: float, device: SimDevice, what: int | Timeline) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time_s, self._sequence, device, what))

    def _done(self, request: Timeline) -> None:
        self._result.add(request)

    def _hand_over(self, request: Timeline, now_s: float, copy_s: float) -> None:
        device = self.router.hand_over(request, now_s, self.decoders)
        self._at(now_s + copy_s, device, request)
