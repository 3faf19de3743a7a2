# SPDX-License-Identifier: Apache-2.0
"""Where models begin: the seats that the capacity policy gives them for a known traffic, before any request comes."""

from __future__ import annotations

from dataclasses import replace

from tokenpool.config import SLO
from tokenpool.policy.capacity import Action, CapacityModel, CapacityView
from tokenpool.policy.capacity_laws import apply_all, finish
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.sim.workload import Workload

_MAX_ROUNDS = 100


def first_seats(view: CapacityView, workload: Workload, forecast_s: float, slo: SLO) -> dict[str, tuple[int, ...]]:
    """Hosts, as indices, for each model and the mean traffic of the first `forecast_s` seconds.

    Decided until nothing changes, as if copies took no time; hosts keep their roles. A model that fits nowhere has
    none.
    """
    counts: dict[str, list[float]] = {model.model: [0, 0, 0] for model in view.models}
    for request in workload.requests:
        if request.arrival_s >= forecast_s:
            break
        sums = counts[request.model]
        sums[0] += 1
        sums[1] += request.input_len
        sums[2] += request.output_len
    end_s = workload.requests[-1].arrival_s if workload.requests else 0.0
    span_s = max(1.0, min(forecast_s, end_s))
    models = [_asked(model, [count / span_s for count in counts[model.model]], slo) for model in view.models]
    view, policy = replace(view, models=models), LiveCapacity()
    for _ in range(_MAX_ROUNDS):
        made = [d for d in policy.decide(view) if d.action is not Action.ROLE]
        if not made:
            break
        view = finish(apply_all(view, made))
        view = replace(view, models=[replace(model, since_move_s=float("inf")) for model in view.models])
    found: dict[str, list[int]] = {model.model: [] for model in view.models}
    for h, host in enumerate(view.hosts):
        for seat in host.seats:
            found[seat.model].append(h)
    return {model: tuple(hosts) for model, hosts in found.items()}


def _asked(model: CapacityModel, rates: list[float], slo: SLO) -> CapacityModel:
    arrivals, inputs, outputs = rates
    return replace(
        model,
        arrivals_per_s=arrivals,
        recent_arrivals_per_s=None,
        input_tokens_per_s=inputs,
        output_tokens_per_s=outputs,
        ttft_s=slo.ttft_s,
        tpot_s=slo.tpot_s,
        since_move_s=float("inf"),
    )
