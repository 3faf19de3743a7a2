# SPDX-License-Identifier: Apache-2.0
"""How many GPUs a workload needs: all models reach the target, also with one GPU more, and hopeless runs end early."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.config import SLO
from tokenpool.sim import generate
from tokenpool.sim.compared import trial
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.costs import costs_of
from tokenpool.sim.gpus import gpu
from tokenpool.sim.planner import plan
from tokenpool.sim.result import MostMissed, SimResult
from tokenpool.sim.workload import Workload

pytestmark = pytest.mark.cpu

GPU, COSTS = gpu("h100-80g"), {"qwen2.5-7b": costs_of("qwen2.5-7b", "h100-80g")}
SLO_10S = SLO(10.0, 0.1)


def workload(rates: dict[str, float], duration_s: float = 60.0) -> Workload:
    return generate.poisson(rates, duration_s, 1, kinds=dict.fromkeys(rates, "qwen2.5-7b"))


def test_every_model_reaches_the_target_and_one_gpu_may_fail():
    """The answer holds for each model by itself, with one more as well; what was tried is told line by line."""
    asked = workload({**{f"m{i}": 0.3 for i in range(12)}, "rare": 0.05}, 90.0)
    told: list[str] = []
    made = plan(asked, COSTS, GPU, SLO_10S, 0.95, progress=told.append)
    found = made.systems["slack"]
    assert found.num_gpus is not None and found.num_gpus < made.systems["dedicated"].num_gpus == 13
    assert found.spare_gpus == found.num_gpus + 1
    for count in (found.num_gpus, found.num_gpus + 1):
        result = run_system(system("slack", count, GPU.name, 16e9), asked, COSTS.__getitem__, SLO_10S)
        assert result.worst_model >= 0.95
    group = found.groups[0]
    assert group.worst_frac >= 0.95 and group.worst_model in asked.kinds
    assert 0 < group.headroom_frac < 1
    weights = COSTS["qwen2.5-7b"].weight_bytes
    assert 13 * weights <= group.host_bytes_per_node < 40 * weights
    assert asked.kinds.keys() == group.placement.keys()
    assert any(line.startswith(f"slack: {found.num_gpus} GPUs, worst model") for line in told)


def test_processes_change_nothing_but_the_time():
    """Two processes give the answer that one gives; each try is told once."""
    asked, told = workload({f"m{i}": 0.3 for i in range(6)}, 40.0), {1: [], 2: []}
    made = {n: plan(asked, COSTS, GPU, SLO_10S, 0.95, progress=told[n].append, num_processes=n) for n in told}

    assert made[1].to_json() == made[2].to_json()
    assert sorted(told[1]) == sorted(told[2])


def test_a_run_ends_when_a_model_has_missed_too_much():
    """Long before the last request; what came by then is counted."""
    asked = workload({f"m{i:02}": 0.5 for i in range(40)}, 200.0)
    made = system("request_level", 1, GPU.name, 16e9)
    result = run_system(
        made, asked, COSTS.__getitem__, SLO_10S, most_missed=MostMissed(1e9, dict.fromkeys(asked.kinds, 100.0))
    )
    assert result.is_stopped
    assert 0 < result.num_requests < len(asked.requests) / 2
    enough = system("slack", 8, GPU.name, 16e9)
    result = run_system(
        enough, workload({"m": 0.5}), COSTS.__getitem__, SLO_10S, most_missed=MostMissed(0.0, {"m": 0.0})
    )
    assert not result.is_stopped and result.token_attainment == 1.0


def test_none_says_how_far_it_came():
    """A model whose requests no GPU can serve in time: no number is enough, and the worst model is named."""
    made = plan(workload({"m": 1.0}, 20.0), COSTS, GPU, SLO(0.001, 0.001), 0.99)
    assert made.systems["slack"].num_gpus is None and made.systems["slack"].spare_gpus is None
    assert "m" == made.systems["slack"].worst.worst_model


@settings(max_examples=300)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 50))
def test_a_search_takes_no_order_for_granted(outcomes, low, start):
    """Whatever passes: the answer does, with one more too; one less does not, nor both of two and three less."""
    good, cap = {low + i: outcome for i, outcome in enumerate(outcomes)}, low + len(outcomes) - 1
    counted: list[int] = []

    def run(count: int) -> SimResult:
        counted.append(count)
        return SimResult(num_failed=0 if good[count] else 1)

    runs, answer = trial.search(run, lambda result: not result.num_failed, low, cap, start=start)

    assert len(counted) == len(set(counted)) == len(runs)
    if answer is None:
        assert not good[cap]
    else:
        assert good[answer] and good.get(answer + 1, True)
        assert not good.get(answer - 1, False)
        assert not (good.get(answer - 2, False) and good.get(answer - 3, False))
        assert {answer, min(cap, answer + 1), max(low, answer - 1)} <= runs.keys()


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 60), st.booleans())
def test_a_search_finds_the_least_where_more_is_better(low, more, least, spare):
    """From any start; None where not even the most is enough."""
    cap = low + more
    for start in (None, low, least, cap):
        _, answer = trial.search(
            lambda count: SimResult(num_failed=int(count < least)),
            lambda result: not result.num_failed,
            low,
            cap,
            start=start,
            spare=spare,
        )
        assert answer == (max(low, least) if least <= cap else None)


@settings(max_examples=200)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 40))
def test_what_a_search_does_next_is_foreseen(outcomes, low, start):
    """First what it does for certain; then, whatever that brings, what follows is among the rest."""
    good, cap = {low + i: outcome for i, outcome in enumerate(outcomes)}, low + len(outcomes) - 1
    runs, answer = trial.search(
        lambda count: SimResult(is_stopped=not good[count]), lambda r: not r.is_stopped, low, cap, start=start
    )
    steps = [*((count, False) for count in runs), (answer, True)]
    known: dict[int, bool] = {}
    for step, after in itertools.zip_longest(steps, steps[1:]):
        first, *others = trial.foreseen(known, low, cap, start=start)
        assert first == step
        if after is not None:
            assert after in others
            known[step[0]] = good[step[0]]
        else:
            assert [] == others


@settings(max_examples=20)
@given(
    st.integers(1, 10**6),
    st.integers(1, 10),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.integers(1, 4),
    st.sampled_from([0.5, 0.9, 0.97, 1.0]),
    st.sampled_from(["slack", "request_level"]),
    st.sampled_from([SLO_10S, SLO(2.0, 0.02)]),
)
def test_ending_a_run_early_changes_no_verdict(seed, num_models, rate, count, target, name, slo):
    """Tokens that are overdue count before their request ends: what is ended so would not have passed."""
    rates = {f"m{i}": rate for i in range(num_models)}
    asked = generate.poisson(rates, 60.0, seed, kinds=dict.fromkeys(rates, "qwen2.5-7b"))
    tried = trial.Trial(1, asked, COSTS, slo, GPU, 16e9, target, 0.9 * target)
    most = trial.may_miss(asked, target, 0.9 * target)
    made = system(name, count, GPU.name, 16e9)

    early = tried.run(name, count)
    whole = run_system(made, asked, COSTS.__getitem__, slo)
    late = run_system(made, asked, COSTS.__getitem__, slo, most_missed=most._replace(counts_overdue=False))

    assert tried.is_enough(early) == tried.is_enough(whole) == tried.is_enough(late)
    assert early.num_events <= late.num_events <= whole.num_events
    if not early.is_stopped:
        assert dataclasses.replace(early, wall_s=0.0) == dataclasses.replace(whole, wall_s=0.0)
