# SPDX-License-Identifier: Apache-2.0
"""Simulated devices: small cases solved by hand, nothing lost, nothing made up, the same twice."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping

import pytest

from tokenpool.config import SLO
from tokenpool.policy.turns import Decision, PoolView, Residency, load_turn_policy
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

pytestmark = pytest.mark.cpu

COSTS = ModelCosts(1 << 30, 1 << 15, 0.5, 0.001, 0.0, 0.125, 0.0, 0.0)
"""1 GiB, 1 s over the link; a prefill takes 0.5 s and 1 ms a token, a step 0.125 s whatever is in it."""
SPEC = DeviceSpec(memory_bytes=4 << 30, link_bytes_per_s=1 << 30)
SLO_2S = SLO(2.0, 0.25)


def cluster(spec: DeviceSpec = SPEC, policy: str = "slack", count: int = 1, costs: ModelCosts = COSTS) -> Cluster:
    return Cluster([spec] * count, lambda: load_turn_policy(policy), FrontendRouter(), lambda model: costs, SLO_2S)


def workload(*requests: SimRequest) -> Workload:
    return Workload(sorted(requests), {request.model: "any" for request in requests})


def many(seed: int, num_models: int, count: int, rate: float) -> Workload:
    rng, now_s, made = random.Random(seed), 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate)
        made.append(SimRequest(now_s, f"m{rng.randrange(num_models)}", rng.randint(1, 800), rng.randint(1, 60)))
    return workload(*made)


def test_one_request_takes_load_prefill_and_steps():
    """1 s for the weights, 0.5 s + 100 ms for the prompt, then three steps."""
    c = cluster()
    result = c.run(workload(SimRequest(0.0, "a", 100, 4)))

    assert 1.6 == pytest.approx(result.ttft_s(50))
    assert 1.6 + 3 * 0.125 == pytest.approx(result.end_s)
    assert 4 == result.tokens_on_time
    assert (1.0, 1.0, 1.0) == (result.token_attainment, result.request_attainment, result.time_weighted_attainment)
    device = c.devices[0]
    assert 0.6 + 3 * 0.125 == pytest.approx(device.busy_s)
    assert 1.0 == pytest.approx(device.waited_s)
    assert 1 << 30 == device.memory.weights_in_bytes


def test_a_second_request_joins_the_batch_at_a_step_boundary():
    """It comes during a leap of decode steps: the leap ends with the step that runs, and both decode together."""
    result = cluster().run(workload(SimRequest(0.0, "a", 100, 9), SimRequest(1.65, "a", 100, 2)))

    # The step that began at 1.6 ends at 1.725; then prefill beside a decode: 0.125 + 0.1.
    assert 1.725 + 0.225 - 1.65 == pytest.approx(result.ttft_s(0.1), abs=0.002)
    assert 1.725 + 0.225 + 6 * 0.125 == pytest.approx(result.end_s)


def test_request_level_serves_one_model_after_the_other():
    """b waits until a has no work, then for its weights, because request_level prefetches nothing."""
    c = cluster(policy="request_level")
    result = c.run(workload(SimRequest(0.0, "a", 100, 9), SimRequest(0.1, "b", 100, 1)))

    assert 1.6 + 8 * 0.125 + 1.0 + 0.6 == pytest.approx(result.end_s)
    assert 9 == result.tokens_on_time  # b's only token is 4.1 s after its arrival


def test_weights_leave_for_a_model_that_needs_the_room():
    """With room for one model, its weights go and come: three loads for two models in turns."""
    c = cluster(SPEC.__class__(memory_bytes=(1 << 30) + (256 << 20), link_bytes_per_s=1 << 30))
    requests = [SimRequest(0.0, "a", 10, 2), SimRequest(20.0, "b", 10, 2), SimRequest(40.0, "a", 10, 2)]
    c.run(workload(*requests))

    assert 3 << 30 == c.devices[0].memory.weights_in_bytes
    assert 2 == c.devices[0].memory.evictions


def test_what_can_never_fit_fails_alone():
    """A prompt larger than the memory beside the weights fails; the next request of the model is served."""
    spec = DeviceSpec(memory_bytes=(1 << 30) + (8 << 20), link_bytes_per_s=1 << 30)
    result = cluster(spec).run(workload(SimRequest(0.0, "a", 4000, 5), SimRequest(0.1, "a", 50, 5)))

    assert (1, 0) == (result.num_failed, result.num_unfinished)
    assert 5 == result.num_tokens_delivered


def test_what_has_not_ended_counts_as_missed():
    """Requests open when the time is up miss all tokens that they did not get."""
    result = cluster().run(workload(SimRequest(0.0, "a", 100, 1000)), drain_s=5.0)

    assert (0, 1, 1000) == (result.num_failed, result.num_unfinished, result.num_tokens)
    assert result.tokens_on_time == result.num_tokens_delivered < 40
    assert 0.0 == result.request_attainment


TIGHT = DeviceSpec(memory_bytes=(5 << 30) // 2, link_bytes_per_s=4 << 30)
FAST = COSTS._replace(prefill_s=0.01, prefill_per_token_s=1e-5, step_s=0.01, step_per_request_s=1e-4)
VARIANTS = {
    "slack": (TIGHT, "slack"),
    "aegaeon": (TIGHT, "aegaeon"),
    "request_level": (TIGHT, "request_level"),
    "few batched tokens": (DeviceSpec(3 << 30, 4 << 30, max_batched_tokens=256, max_running=4), "slack"),
    "kv leaves with the turn": (DeviceSpec(3 << 30, 4 << 30, kv_follows_turn=True, max_resident=2), "aegaeon"),
    "hardly any memory for kv": (DeviceSpec((1 << 30) + (64 << 20), 4 << 30), "slack"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_accounted_for(variant, seed):
    """Each request gets exactly its tokens, memory comes back, and no model ends without its books at zero."""
    spec, policy = VARIANTS[variant]
    traffic = many(seed, 6, 200, rate=4.0)
    c = cluster(spec, policy, costs=FAST)
    result = c.run(traffic, drain_s=1e6)

    assert (200, 0, 0) == (result.num_requests, result.num_failed, result.num_unfinished)
    assert sum(request.output_len for request in traffic.requests) == result.num_tokens == result.num_tokens_delivered
    device = c.devices[0]
    assert not device.active
    held = sum(seat.costs.weight_bytes for seat in device.seats.values() if seat.residency is not Residency.IN_HOST)
    assert spec.memory_bytes - held == pytest.approx(device.memory.free_bytes)
    for seat in device.seats.values():
        assert (0.0, 0.0, [], [], 0) == (seat.kv_bytes, seat.kv_out_bytes, seat.running, seat.paused, len(seat.waiting))
    assert device.busy_s + device.waited_s <= result.end_s * (1 + 1e-9)


def _figures(result) -> Mapping[str, float]:
    return {key: value for key, value in result.to_json().items() if key != "wall_s"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_input_gives_the_same_run(variant):
    """No clock and no chance: two runs are equal in every figure."""
    spec, policy = VARIANTS[variant]
    runs = [cluster(spec, policy, count=3, costs=FAST).run(many(7, 6, 200, rate=10.0)) for _ in range(2)]

    assert _figures(runs[0]) == _figures(runs[1])


class AskedAlways:
    """A policy whose answers never hold: it is asked after every step."""

    def __init__(self, name: str) -> None:
        self._policy = load_turn_policy(name)

    def decide(self, pool):
        return self._policy.decide(pool)._replace(hold_s=0.0)


@pytest.mark.parametrize(("policy", "points"), [("request_level", 0.0), ("aegaeon", 0.0), ("slack", 2.0)])
@pytest.mark.parametrize("rate", [5.0, 20.0])
def test_leaps_change_nothing(policy, points, rate):
    """With answers that hold, and being asked after every step, the shares are the same; slack's within 2 points."""
    shares = []
    for make in (lambda: load_turn_policy(policy), lambda: AskedAlways(policy)):
        c = Cluster([TIGHT], make, FrontendRouter(), lambda model: FAST, SLO(2.0, 0.05))
        result = c.run(many(1, 6, 300, rate=rate))
        shares.append([100 * result.token_attainment, 100 * result.request_attainment])

    assert shares[0] == pytest.approx(shares[1], abs=points + 1e-9)
    assert rate == 5.0 or 1 < shares[0][0] < 99.9, "the load says nothing"


def test_models_may_have_their_own_slo_and_priority():
    """A turn policy is shown them, tokens are due by them, and without an SLO every token is on time."""
    shown = {}

    class Shown(AskedAlways):
        def decide(self, pool):
            for view in pool.models:
                if view.num_waiting and view.model != "a":
                    shown[view.model] = view.ttft_s, view.tpot_s, view.priority, view.first_due_s - view.arrival_s
            return super().decide(pool)

    c = Cluster(
        [SPEC], lambda: Shown("request_level"), FrontendRouter(), lambda model: COSTS, SLO_2S,
        slos={"b": SLO(1.0, 0.5), "c": None}, priorities={"b": 3},
    )  # fmt: skip
    result = c.run(workload(*(SimRequest(0.0, name, 100, 4) for name in "abcd")))

    inf = math.inf
    assert {"b": (1.0, 0.5, 3, 1.0), "c": (inf, inf, 0, inf), "d": (2.0, 0.25, 0, 2.0)} == shown
    assert 4 + 0 + 4 + 0 == result.tokens_on_time  # a is first, c's are never late
    assert 4 == result.num_requests == result.num_requests - result.num_failed


def test_what_a_seat_shows_and_sums_is_as_if_counted_anew():
    """Views that are kept, and sums that grow by steps, equal those that are made from the requests."""
    compared = 0

    class Watched:
        """Compares what it is shown."""

        def __init__(self) -> None:
            self._policy = load_turn_policy("slack")

        def decide(self, pool: PoolView) -> Decision:
            nonlocal compared
            device = c.devices[0]
            for view in pool.models:
                seat = device.seats[view.model]
                anew = copy.copy(seat)
                anew.count_waiting()
                anew.count_running()
                assert (seat.context_tokens, seat.waiting_tokens) == (anew.context_tokens, anew.waiting_tokens)
                assert anew.view(device.memory.ready_in_s(seat, pool.now_s), pool.now_s) == view
                compared += 1
            return self._policy.decide(pool)

    for seed in range(3):
        c = Cluster([SPEC], Watched, FrontendRouter(), lambda model: COSTS, SLO_2S)
        c.run(many(seed, 6, 120, 4.0), drain_s=20.0)
    assert compared > 1000
