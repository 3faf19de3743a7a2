# SPDX-License-Identifier: Apache-2.0
"""What a decision of a turn policy costs: one simulated device, 4 to 64 models, all of them with work.

    python -m bench.sim.turn_cost --json bench/results/turn_cost.json

Each policy is asked as the host asks it, in the course of a run: twice as many requests come as the device can serve,
so that queues grow, models are given up and weights move. Only the calls in which exactly so many models have work
count. Times are CPU times of the one thread, with the clock's own cost taken off; the view that it is given is there
already. [slack_us_16: median of `slack` with 16 models; at most 20 wanted]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.policy.turns import Decision, PoolView, TurnPolicy, load_turn_policy
from tokenpool.sim import generate
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts

POLICIES = ("slack", "aegaeon", "request_level", "round_robin")
NUM_MODELS = (4, 8, 16, 32, 64)
_GIB = 1 << 30
_COSTS = ModelCosts(_GIB, 1024.0, 0.008, 20e-6, 0.0, 0.007, 1e-4, 0.0)
"""A 7B model on a large GPU, rounded, as in bench/sim/turns_sim.py."""
_DURATION_S = 60.0
_REQUESTS_PER_S = 16.0
"""Of all models together: about twice what the device can do."""


@dataclass(frozen=True, slots=True)
class TurnCost:
    """Results; see the module."""

    slack_us: Mapping[str, float]
    """Median by number of models, in microseconds."""
    better: Mapping[str, str] = field(default_factory=lambda: {"slack_us": "lower"})
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By policy and number of models: median, 99th percentile and number of calls."""


class _Timed:
    """A policy whose calls with so many models are timed."""

    def __init__(self, policy: TurnPolicy, num_models: int) -> None:
        self._policy, self._num_models = policy, num_models
        self.took_us: list[float] = []

    def decide(self, pool: PoolView) -> Decision:
        """See `TurnPolicy`."""
        begun_ns = time.thread_time_ns()
        made = self._policy.decide(pool)
        took_ns = time.thread_time_ns() - begun_ns
        if len(pool.models) == self._num_models:
            self.took_us.append(took_ns / 1e3)
        return made


def run(*, seed: int, **_: object) -> TurnCost:
    """Time all policies with all numbers of models."""
    clock_us = _clock_us()
    policies = {name: {str(count): _measured(name, count, seed, clock_us) for count in NUM_MODELS} for name in POLICIES}
    return TurnCost({count: found["us_p50"] for count, found in policies["slack"].items()}, policies=policies)


def _measured(name: str, num_models: int, seed: int, clock_us: float) -> dict[str, float]:
    timed = _Timed(load_turn_policy(name), num_models)
    spec = DeviceSpec(memory_bytes=max(4, num_models // 3) * (_GIB + _GIB // 2), link_bytes_per_s=_GIB / 0.3)
    cluster = Cluster([spec], lambda: timed, FrontendRouter(), lambda _: _COSTS, SLO(10.0, 0.1))
    rates = dict.fromkeys([f"m{i:02}" for i in range(num_models)], _REQUESTS_PER_S / num_models)
    cluster.run(generate.poisson(rates, _DURATION_S, seed, kinds=dict.fromkeys(rates, "any")), drain_s=0.0)
    took_us = [each - clock_us for each in timed.took_us]
    if len(took_us) < 100:
        raise RuntimeError(f"{name} was asked only {len(took_us)} times with {num_models} models that have work")
    found = {"us_p50": statistics.median(took_us), "us_p99": common.percentile(took_us, 99), "calls": len(took_us)}
    common.progress(f"{name}, {num_models} models: {found['us_p50']:.1f} us, p99 {found['us_p99']:.1f} us")
    return found


def _clock_us() -> float:
    """What the two readings of the clock cost by themselves."""
    took = []
    for _ in range(10_000):
        begun_ns = time.thread_time_ns()
        took.append(time.thread_time_ns() - begun_ns)
    return statistics.median(took) / 1e3


def main() -> None:
    """Read the flags, run, report."""
    common.report("turn_cost", run, common.parser(__doc__).parse_args(), ["slack_us_16"])


if __name__ == "__main__":
    main()
