# SPDX-License-Identifier: Apache-2.0
"""A simulated pool whose models move: it adapts, comes to rest under constant load, and loses no request."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tokenpool.config import SLO
from tokenpool.policy.capacity import Action, CapacityDecision, CapacityView, Role
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.live import LivePool, LiveSettings
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

pytestmark = pytest.mark.cpu

GB = 1 << 30
COSTS = ModelCosts(4 * GB, 1 << 15, 0.02, 1e-4, 0.0, 0.02, 0.002, 0.0)
"""A request of 200 + 100 tokens at 2 per second takes 0.2 for weights, 0.4 for tokens and 0.08 for prefill."""
SPEC = DeviceSpec(memory_bytes=16 * GB, link_bytes_per_s=8 * GB)
SLO_LONG = SLO(5.0, 0.1)
SETTINGS = LiveSettings(host_bytes=64 * GB, load_bytes_per_s=GB, hosts_per_node=1)


def requests(rates: dict[str, float], start_s: float, end_s: float, seed: int = 0) -> list[SimRequest]:
    made = []
    for model, rate in rates.items():
        rng, now_s = random.Random(f"{seed}/{model}"), start_s
        while rate and (now_s := now_s + rng.expovariate(rate)) < end_s:
            made.append(SimRequest(now_s, model, 200, 100))
    return made


def workload(made: list[SimRequest]) -> Workload:
    return Workload(sorted(made), {request.model: "any" for request in made})


def pool(traffic: Workload, capacity=None, *, specs=(SPEC,) * 3, failures=(), settings=SETTINGS) -> LivePool:
    costs = dict.fromkeys(traffic.kinds, COSTS)
    return LivePool(specs, lambda: load_turn_policy("slack"), costs, SLO_LONG, capacity, settings, failures)


def flip() -> Workload:
    low = {f"m{i}": 0.02 for i in range(4)}
    return workload(requests({**low, "m0": 5.0}, 0, 120) + requests({**low, "m1": 5.0}, 120, 240, seed=1))


def test_every_token_is_accounted_for_while_models_move():
    """All requests get all their tokens, on fixed seats and on moving ones, and the controller has more on time."""
    traffic = flip()
    static = pool(traffic).run(traffic, drain_s=1e5)
    moving = pool(traffic, LiveCapacity())
    live = moving.run(traffic, drain_s=1e5)

    wanted = sum(request.output_len for request in traffic.requests)
    for result in (static, live):
        assert (0, 0, wanted) == (result.num_failed, result.num_unfinished, result.num_tokens_delivered)
    assert live.token_attainment > static.token_attainment + 0.2
    assert {"m1"} <= {d.model for _, d in moving.decisions if d.action is Action.REPLICATE}


def test_the_same_input_gives_the_same_moves():
    """No clock and no chance in the controller either."""
    traffic = flip()
    runs = [pool(traffic, LiveCapacity()) for _ in range(2)]
    for each in runs:
        each.run(traffic)
    assert runs[0].decisions == runs[1].decisions


def test_nothing_moves_under_constant_load():
    """One hour of stationary Poisson arrivals: after ten minutes no decision is made."""
    traffic = workload(requests({f"m{i}": 0.4 / (i + 1) for i in range(6)}, 0, 3600))
    moving = pool(traffic, LiveCapacity())
    result = moving.run(traffic)

    assert result.token_attainment > 0.99
    assert [] == [(at_s, d.reason) for at_s, d in moving.decisions if at_s > 600]


@pytest.mark.parametrize("time_s", [33.3, 60.0])
def test_a_lost_host_loses_no_request(time_s):
    """Its models are placed again, and what it had is served elsewhere to the last token."""
    traffic = workload(requests({f"m{i}": 0.3 for i in range(6)}, 0, 120))
    moving = pool(traffic, LiveCapacity(), failures=[(time_s, 0)])
    result = moving.run(traffic)

    wanted = sum(request.output_len for request in traffic.requests)
    assert (0, 0, wanted) == (result.num_failed, result.num_unfinished, result.num_tokens_delivered)
    gone = {model for model, hosts in moving.first.items() if hosts == (0,)}
    placed = {d.model: at_s for at_s, d in moving.decisions if d.action is Action.PLACE}
    assert gone and gone == set(placed)
    assert max(placed.values()) <= time_s + SETTINGS.period_s
    assert not moving.devices[0].active


class _Once:
    """Decides a given list at the first look."""

    def __init__(self, *decisions: CapacityDecision) -> None:
        self._left = list(decisions)

    def decide(self, view: CapacityView) -> list[CapacityDecision]:
        made, self._left = self._left, []
        return made


def test_a_new_seat_serves_when_its_weights_have_come():
    """4 GiB at 1 GiB/s from the look at 5 s on: the model is asked for there from 9 s on, and gone where it was."""
    traffic = workload(requests({"a": 1.0}, 0, 60))
    probe = pool(traffic, specs=(SPEC,) * 2)
    probe.run(traffic)
    (source,) = probe.first["a"]
    move = CapacityDecision(Action.MOVE, "test", "a", f"h{source}", f"h{1 - source}", copy_bytes=4 * GB)
    moving = pool(traffic, _Once(move), specs=(SPEC,) * 2)
    result = moving.run(traffic)

    assert 0 == result.num_failed == result.num_unfinished
    last_old_s = max(request.arrival_s for request in traffic.requests if request.arrival_s < 9)
    assert moving.devices[1 - source].busy_s > moving.devices[source].busy_s > 0
    assert moving.devices[source].last_prefill_s < last_old_s + 1.0
    assert "a" not in moving._seats[source]


def test_roles_change_at_run_time():
    """Prefilled requests go on at decode hosts; a host that becomes one ends what it has, and nothing is lost."""
    specs = [replace(SPEC, role=role) for role in ("prefill", "prefill", "decode")]
    traffic = workload(requests({"a": 1.0, "b": 0.5}, 0, 60))
    change = CapacityDecision(Action.ROLE, "test", to_host="h1", role=Role.DECODE)
    moving = pool(traffic, _Once(change), specs=specs, settings=replace(SETTINGS, min_replicas=2))
    result = moving.run(traffic)

    assert ["prefill", "decode", "decode"] == [device.spec.role for device in moving.devices]
    wanted = sum(request.output_len for request in traffic.requests)
    assert (0, wanted) == (result.num_failed, result.num_tokens_delivered)
