# SPDX-License-Identifier: Apache-2.0
"""Routers of a pool: placement by load and residency, over all devices or over each model's own few."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from tokenpool.policy.placement import HostView, place
from tokenpool.policy.turns import Residency
from tokenpool.sim.device import SimDevice
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts


class PlacementRouter:
    """`policy.placement.place` among a model's devices: all of them, or those that `homes` names for it."""

    def __init__(self, homes: Mapping[str, Sequence[int]] | None = None) -> None:
        self._homes = homes

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """The device that `place` chooses."""
        if self._homes is not None:
            devices = [devices[i] for i in self._homes[request.spec.model]]
            if len(devices) == 1:
                return devices[0]
        views = [_view(device, request) for device in devices]
        index = place(views)
        return next(device for device in devices if device.index == index)

    hand_over = route


def homes_for(
    demands: Mapping[str, float], costs: Mapping[str, ModelCosts], num_devices: int, *, choices: int = 2
) -> dict[str, tuple[int, ...]]:
    """Give each model `choices` devices, and more to one whose demand needs them; evens out demand and weights.

    Args:
        demands: share of one device's time that each model asks for, 0 or more.
        costs: by model.
        num_devices: devices of one kind.
        choices: devices that hold the model's host copy and may serve it.

    The largest demand is placed first, on the devices with the least of it. Weights count too, at one device's time
    for 16 models, so that models nobody asks for are spread. O(models * choices * log devices).
    """
    total = sum(costs[name].weight_bytes for name in demands) / max(1, len(demands))
    heap = [(0.0, i) for i in range(num_devices)]
    homes = {}
    for name in sorted(demands, key=lambda n: (-demands[n], n)):
        count = min(num_devices, max(choices, int(2 * demands[name]) + 1))
        share = demands[name] / count + costs[name].weight_bytes / total / 16 / count
        taken = [heapq.heappop(heap) for _ in range(count)]
        homes[name] = tuple(sorted(i for _, i in taken))
        for load, i in taken:
            heapq.heappush(heap, (load + share, i))
    return homes


def _view(device: SimDevice, request: Timeline) -> HostView:
    seat = device.seat(request.spec.model)
    costs, ttft_s, tpot_s = seat.costs, request.ttft_s, request.tpot_s
    load, held_bytes = 0.0, 0
    for other in device.active:
        load += other.costs.step(max(1, other.num_decoding), other.context_tokens) / tpot_s
        if other.waiting:
            load += other.costs.prefill(other.waiting_tokens, other.waiting_squares) / ttft_s
        held_bytes += other.costs.weight_bytes
    per_link_s = device.spec.link_bytes_per_s * ttft_s
    capacity = device.spec.memory_bytes
    link_load = max(0, held_bytes - capacity) / per_link_s
    more_load = costs.prefill(request.context_len, request.context_len**2) / ttft_s
    more_link_load = 0.0
    if seat.has_work:
        more_load += costs.step_per_request_s / tpot_s
    else:
        more_load += costs.step(1, request.context_len) / tpot_s
        more_link_load = max(0, held_bytes + costs.weight_bytes - capacity) / per_link_s - link_load
    is_resident = seat.residency is not Residency.IN_HOST
    return HostView(device.index, load, link_load, more_load, more_link_load, seat.has_work, is_resident)
