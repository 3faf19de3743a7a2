# SPDX-License-Identifier: Apache-2.0
"""Prints how the turn policies fare on the toy pool: `python -m tests.helpers.toy_compare`, some minutes.

Two tables. The rate that a policy carries: the highest arrival rate per model, on a grid with steps of a tenth, up to
which at least 90 % of all tokens come on time. And shares on fixed traces, some of them far beyond what the device can
do. Simulated time: they show what a policy decides, not what a device does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.helpers.toy_pool import ToyModel, ToyPool, ToyRun, attainments_of, poisson_requests
from tokenpool.policy.slo import Attainments
from tokenpool.policy.turns import TurnPolicy, load_turn_policy

POLICIES: dict[str, Callable[[], TurnPolicy]] = {
    "round_robin": lambda: load_turn_policy("round_robin"),
    "request_level": lambda: load_turn_policy("request_level"),
    "aegaeon": lambda: load_turn_policy("aegaeon"),
    "aegaeon, tuned": lambda: load_turn_policy("aegaeon", {"join": 1, "quota_max_s": 0.5}),
    "slack": lambda: load_turn_policy("slack"),
}


class Scenario(NamedTuple):
    """One trace: models, how many of them fit, and arrivals."""

    title: str
    model: ToyModel
    num_models: int = 12
    slots: int = 4
    rate_per_s: float = 0.1
    skew: float = 0.0

    def run(self, policy: TurnPolicy, seed: int, duration_s: float) -> tuple[ToyRun, Attainments]:
        """Serve the trace to its end."""
        models = [self.model._replace(name=f"m{i:02d}") for i in range(self.num_models)]
        requests = poisson_requests(models, self.rate_per_s, duration_s, seed=seed, skew=self.skew)
        # What is not done by twice the time is lost; only round robin is ever that late.
        run = ToyPool(models, policy, slots=self.slots).run(requests, until_s=2 * duration_s + 60)
        return run, attainments_of(run, models)


FAST = ToyModel("fast")
SLOW = ToyModel("slow", load_s=0.6, step_s=0.012)
SCENARIOS = [
    Scenario("12 equal, 4 fit", FAST),
    Scenario("12 equal, 4 fit, x2.5", FAST, rate_per_s=0.25),
    Scenario("12 equal, 4 fit, x8", FAST, rate_per_s=0.8),
    Scenario("12 equal, 2 fit, x2", FAST, slots=2, rate_per_s=0.2),
    Scenario("12 equal, 1 fits", FAST, slots=1),
    Scenario("12 slow, 4 fit, x0.4", SLOW, rate_per_s=0.04),
    Scenario("12 slow, 4 fit", SLOW),
    Scenario("24 Zipf 1, 4 fit", FAST, num_models=24, skew=1.0),
    Scenario("40 equal, 4 fit, x0.2", FAST, num_models=40, rate_per_s=0.02),
    Scenario("40 equal, 4 fit, x0.5", FAST, num_models=40, rate_per_s=0.05),
    Scenario("12 equal, ttft 1 s, x3", FAST._replace(ttft_s=1.0), rate_per_s=0.3),
]


def carried_rate_per_s(scenario: Scenario, policy: Callable[[], TurnPolicy], *, seeds: int, duration_s: float) -> float:
    """The last rate of the grid before token attainment, averaged over seeds, first falls below 90 %; 0 if none."""
    carried = 0.0
    rate_per_s = 0.01
    while rate_per_s < 2.0:
        trial = scenario._replace(rate_per_s=rate_per_s)
        total = sum(trial.run(policy(), seed, duration_s)[1].token for seed in range(seeds))
        if total < 0.9 * seeds:
            break
        carried = rate_per_s
        rate_per_s *= 1.1
    return carried


def main() -> None:
    """Print both tables."""
    print("highest arrival rate per model and second with 90 % of tokens on time (300 s, 2 seeds)")
    for title, base in (("12 equal, 4 fit", Scenario("", FAST)), ("12 slow, 4 fit", Scenario("", SLOW))):
        for name, policy in POLICIES.items():
            rate = carried_rate_per_s(base, policy, seeds=2, duration_s=300)
            print(f"{title:24} {name:16} {rate:.3f}", flush=True)
    print("\nshares in %: tokens on time / requests with all tokens on time / time-weighted; time spent switching")
    for scenario in SCENARIOS:
        for name, policy in POLICIES.items():
            run, shares = scenario.run(policy(), seed=0, duration_s=200)
            text = " / ".join(f"{100 * share:5.1f}" for share in shares[:3])
            print(f"{scenario.title:24} {name:16} {text}   {100 * run.switch_share:4.0f}", flush=True)


if __name__ == "__main__":
    main()
