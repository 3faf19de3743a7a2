# SPDX-License-Identifier: Apache-2.0
"""The least work of a workload: solved by hand where that is possible, and never more than what a run took."""

from __future__ import annotations

import random

import pytest

from tokenpool.config import SLO
from tokenpool.sim.compared.bound import bound, least_steps, max_models
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.gpus import gpu
from tokenpool.sim.planner import plan
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

pytestmark = pytest.mark.cpu

COSTS = {"kind": ModelCosts(1 << 30, 1000.0, 0.5, 0.001, 0.0, 0.125, 0.0, 0.0)}
TEN_S = SLO(10.0, 0.5)
MET: set[str] = set()
"""Systems that had every token on time in a random pool."""


def workload(*requests: tuple[float, str, int, int]) -> Workload:
    made = sorted(SimRequest(*request) for request in requests)
    return Workload(made, {request.model: "kind" for request in made})


def test_one_request_needs_its_tokens_and_its_steps():
    """100 tokens in, 5 out: 0.1 s for the prompt and five steps, as if the first were no dearer than the others."""
    least = bound(workload((0.0, "a", 100, 5)), COSTS, TEN_S)

    assert 0.1 + 5 * 0.125 == pytest.approx(least.gpu_s)
    assert 5 == least.num_steps


def test_requests_that_overlap_share_steps():
    """A request that can wait until the other decodes adds its prompt only; one that comes too late adds its steps."""
    one = bound(workload((0.0, "a", 100, 5)), COSTS, TEN_S).gpu_s
    shared = bound(workload((0.0, "a", 100, 5), (1.0, "a", 100, 5)), COSTS, TEN_S).gpu_s
    apart = bound(workload((0.0, "a", 100, 5), (50.0, "a", 100, 5)), COSTS, TEN_S).gpu_s

    assert one < shared < one + 0.6
    assert 2 * one == pytest.approx(apart)


def test_steps_come_when_something_falls_due():
    """Two needs of three steps each, half a second apart and one second between steps: five points cover both."""
    assert [10.0, 10.5, 11.5, 12.5] == list(least_steps([(0.0, 10.0, 3), (10.2, 10.5, 3)], 1.0))


def test_more_models_are_served_with_more_gpus():
    """The count grows with the GPUs and is that of the last workload that fits."""

    def make(count: int) -> Workload:
        return workload(*[(0.1 * i, f"m{i}", 1000, 50) for i in range(count)])

    one, two = (max_models(make, COSTS, SLO(3.0, 0.25), n) for n in (1, 2))
    assert 0 < one < two
    peaks = [bound(make(count), COSTS, SLO(3.0, 0.25)).peak_gpus for count in (one, one + 1)]
    assert peaks[0] <= 1 < peaks[1]


def test_no_run_beats_the_bound():
    """A run in which every token is on time worked at least so long."""
    traffic = workload(*[(0.7 * i, f"m{i % 5}", 50 + i, 10 + i % 30) for i in range(100)])
    result = run_system(system("slack", 4, "h100-80g", 16e9), traffic, COSTS.__getitem__, TEN_S)

    assert 1.0 == result.token_attainment
    assert bound(traffic, COSTS, TEN_S).gpu_s <= result.busy_frac * result.end_s * 4 + 1e-6


def small_pool(seed: int) -> tuple[Workload, int, SLO]:
    """Up to six models that come in bursts, one to three devices, and an SLO that some policy may meet."""
    rng, now_s, rows = random.Random(seed), 0.0, []
    num_models, num_gpus = rng.randint(1, 6), rng.randint(1, 3)
    for _ in range(rng.randint(5, 80)):
        now_s += rng.expovariate(2.0) * rng.choice((0.2, 3.0))
        rows.append((now_s, f"m{rng.randrange(num_models)}", rng.randint(10, 1500), rng.randint(1, 60)))
    return workload(*rows), num_gpus, SLO(rng.choice((5.0, 20.0)), rng.choice((0.3, 1.0)))


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_for_every_policy(seed):
    """Whichever of them has every token on time had as many devices as the bound asks for, and worked as long."""
    traffic, num_gpus, slo = small_pool(seed)
    least = bound(traffic, COSTS, slo, windows_s=(3.0, 10.0, 30.0))
    whole = bound(traffic, COSTS, slo)
    assert least.peak_gpus >= whole.peak_gpus and least[:3] == whole[:3]
    for name in ("slack", "request_level", "round_robin", "sllm", "mux", "sleep", "aegaeon", "dedicated"):
        if name == "aegaeon" and num_gpus == 1:
            continue
        made = system(name, num_gpus, "h100-80g", 16e9, prefill_gpus=1)
        result = run_system(made, traffic, COSTS.__getitem__, slo)
        if result.token_attainment == 1.0:
            MET.add(name)
            assert least.peak_gpus <= num_gpus
            assert least.gpu_s <= result.busy_frac * result.end_s * num_gpus + 1e-6


def test_every_policy_was_held_against_the_bound():
    """None of them only because it never had every token on time."""
    assert {"slack", "request_level", "round_robin", "sllm", "mux", "sleep", "aegaeon"} <= MET


def test_a_burst_needs_its_devices_whatever_came_before():
    """Ten models at once after a long quiet time: the mean hides them, a span does not."""
    burst = [(500.0 + 0.01 * i, f"m{i}", 100, 60) for i in range(10)]
    traffic = workload((0.0, "m0", 100, 2), *burst)
    slo = SLO(5.0, 0.2)
    alone = bound(workload(*burst), COSTS, slo).peak_gpus

    assert bound(traffic, COSTS, slo).peak_gpus < 1
    found = bound(traffic, COSTS, slo, windows_s=(30.0,))
    assert 0.99 * alone <= found.peak_gpus <= alone + 1e-9
    assert found.gpu_s == pytest.approx(bound(traffic, COSTS, slo).gpu_s)


def test_a_plan_saves_gpus_for_models_that_nobody_asks_for():
    """Twenty models with a request now and then: one GPU each, or one for all; the same twice."""
    traffic = workload(*[(5.0 * i, f"m{i}", 100, 20) for i in range(20)])
    answers = [plan(traffic, COSTS, gpu("h100-80g"), TEN_S) for _ in range(2)]

    assert answers[0].to_json() == answers[1].to_json()
    assert (20, 1) == tuple(answers[0].systems[name].num_gpus for name in ("dedicated", "slack"))
    assert 0.95 == answers[0].saved_frac("slack")
    assert answers[0].bound_gpus <= 1


def test_models_of_several_gpus_are_planned_apart():
    """A model on four GPUs shares devices only with its like."""
    costs = COSTS | {"large": COSTS["kind"]._replace(num_gpus=4)}
    small = workload((0.0, "a", 100, 5), (1.0, "b", 100, 5))
    traffic = Workload([*small.requests, SimRequest(2.0, "c", 100, 5)], {**small.kinds, "c": "large"})
    answer = plan(traffic, costs, gpu("h100-80g"), TEN_S)

    assert 2 + 4 == answer.systems["dedicated"].num_gpus
    assert 1 + 4 == answer.systems["slack"].num_gpus
