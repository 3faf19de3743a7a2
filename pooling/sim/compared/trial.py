# SPDX-License-Identifier: Apache-2.0
"""What a planner tries: the same requests on any number of devices, and which numbers."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenpool.config import SLO
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.compared.baseline_routers import FewestRequests
from tokenpool.sim.compared.bound import by_model
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.compared.workers import is_unwanted
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import GpuSpec
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.result import MostMissed, SimResult
from tokenpool.sim.workload import ModelCosts, Workload

ENGINE_BYTES = int(HostCosts().resident_bytes + HostCosts().engine_bytes)
"""Of a device, for each instance beside its weights and KV."""
_MAX_INSTANCES = 64
_MAX_STATES = 31
"""Outcomes of the next tries that are thought through."""


class Alone(NamedTuple):
    """A model with instances of its own."""

    num_instances: int
    """The fewest that are enough, or the most that were tried."""
    is_enough: bool
    first: SimResult
    """With one instance."""
    last: SimResult
    """With `num_instances`."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Requests of models that take the same number of GPUs, what they cost, and what is enough."""

    gpus_per_instance: int
    workload: Workload
    costs: Mapping[str, ModelCosts]
    """By kind."""
    slo: SLO
    gpu: GpuSpec
    link_bytes_per_s: float
    target: float
    """Share of all tokens on time; of dedicated instances, of each model's."""
    model_target: float
    """Share of the tokens of every model."""

    def run(
        self,
        name: str,
        count: int,
        *,
        costs: Mapping[str, ModelCosts] | None = None,
        memory_bytes: int | None = None,
        link_factor: float = 1.0,
    ) -> SimResult:
        """Simulate a system of `count` devices, with other costs, memory or links than its own if these are given.

        It ends when a model has missed too much.
        """
        described = system(name, count, self.gpu.name, self.link_bytes_per_s, gpus_per_device=self.gpus_per_instance)
        specs = tuple(
            replace(
                spec,
                memory_bytes=memory_bytes or self.gpu.pool_bytes,
                link_bytes_per_s=link_factor * spec.link_bytes_per_s,
                node_link_bytes_per_s=link_factor * spec.node_link_bytes_per_s,
            )
            for spec in described.specs
        )
        made, costs_of = replace(described, specs=specs), (costs or self.costs).__getitem__
        most_missed = may_miss(self.workload, self.target, self.model_target)
        return run_system(made, self.workload, costs_of, self.slo, most_missed=most_missed)

    def is_enough(self, result: SimResult) -> bool:
        """Whether enough tokens were on time."""
        is_enough = result.token_attainment >= self.target and result.worst_model >= self.model_target
        return is_enough and not result.is_stopped

    def alone(self, model: str) -> Alone:
        """Find the fewest dedicated instances of a model that has requests."""
        requests = by_model(self.workload.requests)[model]
        part = Workload(requests, {model: self.workload.kinds[model]})
        most_missed = may_miss(part, self.target, self.target)
        cap = min(_MAX_INSTANCES, len(requests))
        run = functools.partial(self._run_alone, part, most_missed)
        runs, answer = search(run, self.is_enough, 1, cap, spare=False)
        count = answer or max(runs)
        return Alone(count, answer is not None, runs[1], runs[count])

    def _run_alone(self, workload: Workload, most_missed: MostMissed, count: int) -> SimResult:
        """Simulate `count` instances of the only model of `workload`, with weights that are always there."""
        charges = HostCosts()
        ((model, kind),) = workload.kinds.items()
        spec = DeviceSpec(self.gpu.pool_bytes, self.link_bytes_per_s, can_prefetch=False)
        spec = charges.of_device(spec, self.gpus_per_instance)
        free_bytes = self.gpu.pool_bytes - self.costs[kind].weight_bytes - ENGINE_BYTES
        spec = replace(spec, prefix_bytes=free_bytes, prefix_on_device=True)
        costs = {model: charges.of_model(self.costs[kind], self.gpu)}
        # With one model every policy does the same.
        make_policy = functools.partial(load_turn_policy, "request_level")
        cluster = Cluster([spec] * count, make_policy, FewestRequests(), costs.__getitem__, self.slo)
        for device in cluster.devices:
            device.preload(model)
        return cluster.run(workload, most_missed=most_missed)


def may_miss(workload: Workload, target: float, model_target: float) -> MostMissed:
    """Tokens that may be late, a rounding error more."""
    counts = dict.fromkeys(workload.kinds, 0)
    for request in workload.requests:
        counts[request.model] += request.output_len
    of_model = {model: (1 - model_target) * count + 1e-6 for model, count in counts.items()}
    return MostMissed((1 - target) * sum(counts.values()) + 1e-6, of_model, True, is_unwanted)


def search(
    run: Callable[[int], SimResult],
    passes: Callable[[SimResult], bool],
    low: int,
    cap: int,
    *,
    start: int | None = None,
    spare: bool = True,
) -> tuple[dict[int, SimResult], int | None]:
    """The least count from `low` to `cap` found with which a run passes, and all results on the way.

    None if `cap` fails. It is looked for from `start` on, None = `low`, in steps of a half up or a third down, until
    one count fails and a larger one passes; the gap is closed from below, because a run that fails ends early and one
    that passes does not.

    With `spare` it is not taken for granted that more is better. One more than the answer passes too, unless that is
    beyond `cap`. One less fails. And of two and three less, if there are such, not both pass: else the search goes on
    down from there. What is further down is not looked at.
    """
    runs: dict[int, SimResult] = {}

    def is_enough(count: int) -> bool:
        if count not in runs:
            runs[count] = run(count)
        return passes(runs[count])

    good, bad = low if start is None else min(max(start, low), cap), low - 1
    if is_enough(good):
        while good > low and is_enough(max(low, 2 * good // 3)):
            good = max(low, 2 * good // 3)
        bad = max(low, 2 * good // 3) if good > low else low - 1
    while not is_enough(good):
        if good >= cap:
            return runs, None
        bad, good = good, min(max(good + 1, good * 3 // 2), cap)
    while good - bad > 1:
        middle = bad + (good - bad + 1) // 3
        good, bad = (middle, bad) if is_enough(middle) else (good, middle)
    if spare:
        good = _settled(is_enough, good, low, cap)
    return runs, good if is_enough(good) else None


def _settled(is_enough: Callable[[int], bool], good: int, low: int, cap: int) -> int:
    """A count near `good` that is enough with one more and not with less, as `search` says; `cap` if there is none."""
    while True:
        while good < cap and not (is_enough(good) and is_enough(good + 1)):
            good = min(cap, good + max(1, good // 8))
        if not is_enough(good):
            return good
        while good > low and is_enough(good - 1):
            good -= 1
        if good - 3 < low or not (is_enough(good - 2) and is_enough(good - 3)):
            return good
        good -= 3


class _NotKnownError(Exception):
    """What comes of a count is yet to be found out."""


def foreseen(
    known: Mapping[int, bool], low: int, cap: int, *, start: int | None = None, most: int = 7
) -> list[tuple[int | None, bool]]:
    """What `search` may do next after the counts whose outcomes are `known`, the likeliest first.

    (count, False) = it asks for a count; (count, True) = it ends with that answer. The first comes for certain, and
    each of the others if what was asked for before comes out in one way or the other.
    """
    found: list[tuple[int | None, bool]] = []
    states = collections.deque([dict(known)])
    for _ in range(_MAX_STATES):
        if not states or len(found) == most:
            break
        state = states.popleft()
        step = _next_step(state, low, cap, start)
        if step not in found:
            found.append(step)
        count, has_ended = step
        if not has_ended and count is not None:
            # Between one that is enough and one that is not, it is looked for from below.
            first = not any(state.values())
            states.extend({**state, count: outcome} for outcome in (first, not first))
    return found


def _next_step(known: Mapping[int, bool], low: int, cap: int, start: int | None) -> tuple[int | None, bool]:
    asked: list[int] = []

    def run(count: int) -> SimResult:
        if count not in known:
            asked.append(count)
            raise _NotKnownError
        return SimResult(is_stopped=not known[count])

    try:
        return search(run, lambda result: not result.is_stopped, low, cap, start=start)[1], True
    except _NotKnownError:
        return asked[0], False


def describe_try(policy: str, num_gpus: int, result: SimResult) -> str:
    """What came of it, in one line."""
    worst = f"worst model {100 * result.worst_model:.1f} %"
    what = f"not enough after {result.num_requests} requests" if result.is_stopped else worst
    return f"{policy}: {num_gpus} GPUs, {what}"


def twice_as_much(trial: Trial) -> dict[str, dict[str, Any]]:
    """By resource, the arguments of `Trial.run` with which there is twice as much of it."""
    times = [name for name in ModelCosts._fields if name.endswith("_s")]
    faster = {kind: c._replace(**{x: getattr(c, x) / 2 for x in times}) for kind, c in trial.costs.items()}
    return {
        "compute": {"costs": faster},
        "link": {"link_factor": 2.0},
        "memory": {"memory_bytes": 2 * trial.gpu.pool_bytes},
    }
