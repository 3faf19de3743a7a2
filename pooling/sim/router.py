# SPDX-License-Identifier: Apache-2.0
"""The router of a pool: a frontend of the product, with what it knows of the hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenpool.policy import host_report
from tokenpool.policy.routing import LOADS_PERIOD_S, PREFIX_TOKENS, HostQueue, Told, choose_host
from tokenpool.policy.turns import ModelView, PoolView, Residency
from tokenpool.sim.device import SimDevice
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts


class _Look(NamedTuple):
    """One device as it answered the last question for its load."""

    pool: PoolView
    load: float
    views: Mapping[str, tuple[ModelView, int]]
    """Models with work there, with the length of a usual prompt."""
    residencies: Mapping[str, Residency]
    """Of all models that were ever asked for there."""
    requests: Mapping[str, int]
    """Unfinished requests of the models with work."""


class FrontendRouter:
    """`policy.routing.choose_host`, as the one frontend of a pool asks it.

    The frontend counts its own unfinished requests. Of anything else it knows what the hosts reported last, which it
    asks for every `period_s` seconds: residency, running batches, loads and predicted waits. No two prompts share a
    prefix, unless the trace says so; the frontend cannot know.
    """

    def __init__(self, period_s: float = LOADS_PERIOD_S) -> None:
        self.period_s = period_s
        self._looks: dict[int, _Look] = {}
        self._told: dict[tuple[int, str], Told] = {}

    def look(self, now_s: float, devices: Sequence[SimDevice]) -> None:
        """All hosts report."""
        self._told.clear()
        self._looks = {device.index: _look(device, now_s) for device in devices}

    def route(self, request: Timeline, now_s: float, devices: Sequence[SimDevice]) -> SimDevice:
        """The device that the frontend chooses of those that serve the model."""
        if len(devices) == 1:
            return devices[0]
        by_name = {f"h{device.index}": device for device in devices}
        queues = {name: self._queue(device, request, now_s) for name, device in by_name.items()}
        spec = request.spec
        begin = spec.blocks[0] if spec.blocks else spec.arrival_s
        prefix = f"{spec.model}/{begin!r}".encode() if spec.input_len >= PREFIX_TOKENS else b""
        return by_name[choose_host(queues, prefix, request.arrival_s + request.ttft_s - now_s)]

    hand_over = route

    def _queue(self, device: SimDevice, request: Timeline, now_s: float) -> HostQueue:
        model = request.spec.model
        seat = device.seats.get(model)
        num_requests = seat.num_requests if seat is not None else 0
        look = self._looks.get(device.index)
        if look is None:
            return HostQueue(num_requests)
        key = device.index, model
        told = self._told.get(key)
        if told is None:
            told = self._told[key] = _report(device, look, request)
        return told.queue(num_requests, now_s)


class _Predictor:
    """See `policy.host_report.Predictor`."""

    def __init__(self, costs: ModelCosts) -> None:
        self._costs = costs

    def predict_step(self, batch: int, context_tokens: int) -> float:
        """See Predictor."""
        return self._costs.step(batch, context_tokens)

    def predict_prefill(self, tokens: int) -> float:
        """See Predictor."""
        return self._costs.prefill(tokens, tokens**2) if tokens else 0.0


def _look(device: SimDevice, now_s: float) -> _Look:
    views, requests = {}, {}
    for seat in device.active:
        view = seat.view(device.memory.ready_in_s(seat, now_s), now_s)
        usual = host_report.usual_prompt_tokens(
            view.num_waiting, view.waiting_tokens, len(seat.running), seat.context_tokens
        )
        views[seat.name] = view, usual
        requests[seat.name] = seat.num_requests
    pool = PoolView(now_s, None, [view for view, _ in views.values()])
    residencies = {name: seat.residency for name, seat in device.seats.items()}
    return _Look(pool, host_report.host_load(pool), views, residencies, requests)


def _report(device: SimDevice, look: _Look, request: Timeline) -> Told:
    model = request.spec.model
    costs = device.seat(model).costs
    view, usual = look.views.get(model) or (None, host_report.usual_prompt_tokens(0, 0, 0, 0))
    if view is None:
        residency = look.residencies.get(model, Residency.IN_HOST)
        copy_s = device.spec.switch_s + costs.weight_bytes / device.spec.link_bytes_per_s
        ready_in_s = 0.0 if residency is Residency.ON_DEVICE else copy_s
        view = ModelView(
            model, 0, ttft_s=request.ttft_s, tpot_s=request.tpot_s, residency=residency, ready_in_s=ready_in_s
        )
    report = host_report.report_model(
        view, usual, look.pool, _Predictor(costs), load=look.load, num_places=device.spec.max_running
    )
    return Told(report, look.requests.get(model, 0), look.pool.now_s)
