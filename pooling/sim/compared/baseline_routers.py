# SPDX-License-Identifier: Apache-2.0
"""Routers of the systems that ours is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenpool.policy.turns import Residency
from tokenpool.sim.device import SimDevice
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts

_GROUP_SIZE = 8


class Locality:
    """To a device that has the model and fewer than `max_requests` requests, else to the least recently used one.

    A device has a model from when a request for it came until other weights take the place. It counts as used when
    a prefill ends, and when a request comes while it decodes; not while it only waits for weights.

    Source: ServerlessLLM (OSDI'24) as in the simulator of Aegaeon's artifact. What counts as use was inferred from
    that simulator's results: it explains its failed requests at loads where half of the devices are idle.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._used_s: dict[int, float] = {}

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """See `Router`; ties go to the first."""
        model, used_s = request.spec.model, self._used_s
        near = [d for d in devices if _has(d, model) and d.num_requests < self._max_requests]
        if near:
            device = min(near, key=lambda d: d.num_requests)
        else:
            device = min(devices, key=lambda d: max(used_s.get(d.index, -1.0), d.last_prefill_s))
        used_s.setdefault(device.index, 0.0)
        if any(seat.running for seat in device.active):
            used_s[device.index] = now_s
        return device


def _has(device: SimDevice, model: str) -> bool:
    seat = device.seats.get(model)
    return seat is not None and (seat.has_work or seat.residency is not Residency.IN_HOST)


class FewestRequests:
    """To the device with the fewest requests; ties go to the first."""

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """See `Router`."""
        return min(devices, key=lambda d: d.num_requests)


class PrefillDecode:
    """Aegaeon's two dispatchers.

    Prefill: a device where the model has a group with room, else that with the fewest waiting requests. The request
    that is being executed, its switch included, does not count as waiting. Decode: a device that has a batch of the
    model, else that with the fewest batches. Ties go to the first.

    Source: Aegaeon's published code (SOSP'25), where groups and load differ from the paper. A batch
    always has room here; the device preempts if it runs out of memory.
    """

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """See `Router`."""
        for device in devices:
            seat = device.seats.get(request.spec.model)
            if seat is not None and 0 < len(seat.waiting) - (device.waited_for is seat) < _GROUP_SIZE:
                return device
        return min(devices, key=_num_waiting)

    def hand_over(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """See `Router`."""
        for device in devices:
            seat = device.seats.get(request.spec.model)
            if seat is not None and seat.has_work:
                return device
        return min(devices, key=lambda d: len(d.active))


def _num_waiting(device: SimDevice) -> int:
    return sum([len(seat.waiting) for seat in device.active]) - (device.waited_for is not None)


class Static:
    """Each model on a device of its own choice, for ever; models that do not fit are refused.

    Models are placed in the order given, each on the device with the most room that is left. `kv_frac` of a device
    is kept for KV.
    """

    def __init__(self, specs: Sequence[DeviceSpec], models: Mapping[str, ModelCosts], kv_frac: float = 0.0) -> None:
        free = [spec.memory_bytes * (1 - kv_frac) for spec in specs]
        places = [spec.max_resident or len(models) for spec in specs]
        self.placement: dict[str, int] = {}
        """Index of the device by model; a model that is refused is not in it."""
        for model, costs in models.items():
            needs = [costs.weight_bytes + spec.resident_bytes + spec.engine_bytes for spec in specs]
            fits = [i for i in range(len(specs)) if places[i] and needs[i] <= free[i]]
            if fits:
                i = self.placement[model] = max(fits, key=lambda i: free[i])
                free[i] -= needs[i]
                places[i] -= 1

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice | None:
        """See `Router`."""
        index = self.placement.get(request.spec.model)
        return None if index is None else devices[index]
