# SPDX-License-Identifier: Apache-2.0
"""How many GPUs a workload needs: with dedicated instances, with request-level swapping, and with a pool.

    answer = plan(read_requests("week.csv"), load_costs("h100-80g"), gpu("h100-80g"), SLO(10, 0.1))
    answer.systems["slack"].num_gpus

Each number of GPUs is found by simulating that many. Needs neither vLLM nor torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.policy.capacity import LINK_BYTES_PER_S
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.compared.baseline_routers import FewestRequests
from tokenpool.sim.compared.bound import bound, by_model
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import GpuSpec
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.plan import GroupPlan, Plan, SystemPlan, Try
from tokenpool.sim.result import SimResult
from tokenpool.sim.workload import ModelCosts, Workload
from tokenpool.units import format_bytes, format_count, format_seconds

POOLED = ("request_level", "slack")
"""Systems in which models share devices, by their turn policy; the last is tokenpool's own."""

_MAX_INSTANCES = 64
_ENGINE_BYTES = int(HostCosts().resident_bytes + HostCosts().engine_bytes)
_TIMES = tuple(name for name in ModelCosts._fields if name.endswith("_s"))


def plan(
    workload: Workload,
    costs: Mapping[str, ModelCosts],
    gpu: GpuSpec,
    slo: SLO,
    target: float = 0.99,
    *,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    max_requests: int = 20_000,
) -> Plan:
    """Find the least number of GPUs with which the share `target` of tokens is on time.

    Args:
        workload: models without a request count too, they need an instance.
        costs: by kind.
        gpu: all are of this kind.
        slo: of every model.
        target: share of tokens on time, above 0 and at most 1; for dedicated instances that of each model.
        link_bytes_per_s: of copies from host memory to one device.
        max_requests: only the first so many are simulated.

    Numbers are doubled until one is enough, then the gap is halved, which takes for granted that more GPUs never do
    worse. A pool begins with half of what the bound asks for and ends at twice the dedicated GPUs.

    Raises ConfigError for settings out of range, an empty workload, a kind without costs and weights too large for the
    device.
    """
    check_setting(0 < target <= 1, "target", f"must be above 0 and at most 1, not {show(target)}; 0.99 is 99 %")
    check_setting(link_bytes_per_s > 0, "link_bytes_per_s", f"must be above 0, not {show(link_bytes_per_s)}")
    check_setting(max_requests >= 1, "max_requests", f"must be at least 1, not {show(max_requests)}")
    check_setting(len(workload.requests) > 0, None, "there are no requests to plan for")
    check_costs(workload, costs, gpu)
    used = Workload(workload.requests[:max_requests], workload.kinds)
    groups = [_Group(n, part, costs, slo, gpu, link_bytes_per_s, target) for n, part in _by_num_gpus(used, costs)]
    dedicated = [group.dedicated() for group in groups]
    systems = {"dedicated": SystemPlan(tuple(dedicated))}
    for name in POOLED:
        found = (group.pooled(name, alone) for group, alone in zip(groups, dedicated, strict=True))
        systems[name] = SystemPlan(tuple(found))
    return Plan(
        gpu=gpu.name,
        slo=slo,
        target=target,
        num_models=len(workload.kinds),
        num_requests=len(workload.requests),
        num_simulated=len(used.requests),
        span_s=used.requests[-1].arrival_s - used.requests[0].arrival_s,
        bound_gpus=sum(group.bound_devices * group.gpus_per_instance for group in groups),
        systems=systems,
        assumptions=_assumptions(workload, used, costs, gpu, link_bytes_per_s),
    )


def check_costs(workload: Workload, costs: Mapping[str, ModelCosts], gpu: GpuSpec) -> None:
    """Raise ConfigError for a kind without costs, and for weights that fill a device with no room for KV."""
    for model, kind in workload.kinds.items():
        if kind not in costs:
            known = ", ".join(sorted(costs)) or "none"
            raise ConfigError(f"no costs on {gpu.name} for kind {show(kind)}; known: {known}", key=model)
        needs, has = costs[kind].weight_bytes + _ENGINE_BYTES, gpu.pool_bytes
        if needs + costs[kind].kv_bytes_per_token >= has:
            problem = f"weights of {format_bytes(needs)} on a device leave no room for KV: {gpu.name} has"
            raise ConfigError(f"{problem} {format_bytes(has)} for both; use more GPUs per instance", key=model)


class _Group:
    """The models that take the same number of GPUs, as a problem of its own."""

    def __init__(
        self,
        gpus_per_instance: int,
        workload: Workload,
        costs: Mapping[str, ModelCosts],
        slo: SLO,
        gpu: GpuSpec,
        link_bytes_per_s: float,
        target: float,
    ) -> None:
        self.gpus_per_instance = gpus_per_instance
        self.workload, self.costs, self.slo, self.target = workload, costs, slo, target
        self._gpu, self._link_bytes_per_s = gpu, link_bytes_per_s
        least = bound(workload, costs, slo)
        self.bound_devices = -(-least.num_gpus // gpus_per_instance) if workload.requests else 0
        self.least_devices = max(1, int(least.peak_gpus / gpus_per_instance / 2))
        """A pool of fewer is not tried."""

    def dedicated(self) -> GroupPlan:
        """Instances of each model on its own, with weights that are always there."""
        parts = by_model(self.workload.requests)
        instances = dict.fromkeys(self.workload.kinds, 1)
        first, last, is_enough = [], [], True
        for model, requests in parts.items():
            part = Workload(requests, {model: self.workload.kinds[model]})
            cap = min(_MAX_INSTANCES, len(requests))
            runs, answer = _search(functools.partial(self._run_alone, part), 1, cap, self.target)
            instances[model] = answer or max(runs)
            is_enough = is_enough and answer is not None
            first.append(runs[1])
            last.append(runs[instances[model]])
        num_devices = sum(instances.values())
        end_s = max((result.end_s for result in last), default=0.0)
        busy_s = sum(instances[m] * r.busy_frac * r.end_s for m, r in zip(parts, last, strict=True))
        tries = {len(instances): _share(first), num_devices: _share(last)}
        return GroupPlan(
            gpus_per_instance=self.gpus_per_instance,
            num_models=len(instances),
            num_gpus=num_devices * self.gpus_per_instance if is_enough else None,
            tries=tuple(Try(n * self.gpus_per_instance, tries[n]) for n in sorted(tries)),
            num_tokens=sum(result.num_tokens for result in last),
            tokens_on_time=sum(result.tokens_on_time for result in last),
            busy_frac=busy_s / (num_devices * end_s) if end_s else 0.0,
            waited_frac=0.0,
            link_frac=0.0,
            instances=instances,
        )

    def pooled(self, policy: str, alone: GroupPlan) -> GroupPlan:
        """All models on any of the devices, which take turns by `policy`."""
        cap = max(2 * sum(alone.instances.values()), self.least_devices)
        runs, answer = _search(lambda n: self._run(policy, n), self.least_devices, cap, self.target)
        result = runs[answer or max(runs)]
        return GroupPlan(
            gpus_per_instance=self.gpus_per_instance,
            num_models=len(self.workload.kinds),
            num_gpus=None if answer is None else answer * self.gpus_per_instance,
            tries=tuple(Try(n * self.gpus_per_instance, runs[n].token_attainment) for n in sorted(runs)),
            num_tokens=result.num_tokens,
            tokens_on_time=result.tokens_on_time,
            busy_frac=result.busy_frac,
            waited_frac=result.waited_frac,
            link_frac=result.link_frac,
            binding=self._binding(policy, answer - 1, runs) if answer and answer > 1 else None,
        )

    def _binding(self, policy: str, count: int, runs: Mapping[int, SimResult]) -> str | None:
        """Which resource, doubled, brings `count` devices furthest."""
        before = runs[count] if count in runs else self._run(policy, count)
        faster = {kind: c._replace(**{x: getattr(c, x) / 2 for x in _TIMES}) for kind, c in self.costs.items()}
        twice: dict[str, Callable[[], SimResult]] = {
            "compute": lambda: self._run(policy, count, costs=faster),
            "link": lambda: self._run(policy, count, link_bytes_per_s=2 * self._link_bytes_per_s),
            "memory": lambda: self._run(policy, count, memory_bytes=2 * self._gpu.pool_bytes),
        }
        best, best_frac = None, before.token_attainment
        for resource, run in twice.items():
            frac = run().token_attainment
            if frac > best_frac:
                best, best_frac = resource, frac
        return best

    def _run(
        self,
        name: str,
        count: int,
        *,
        costs: Mapping[str, ModelCosts] | None = None,
        memory_bytes: int | None = None,
        link_bytes_per_s: float | None = None,
    ) -> SimResult:
        """Simulate a system of `count` devices, with other costs, memory or links than its own if these are given."""
        described = system(name, count, self._gpu.name, self._link_bytes_per_s, gpus_per_device=self.gpus_per_instance)
        memory_bytes = memory_bytes or self._gpu.pool_bytes
        specs = tuple(
            replace(spec, memory_bytes=memory_bytes, link_bytes_per_s=link_bytes_per_s or spec.link_bytes_per_s)
            for spec in described.specs
        )
        return run_system(replace(described, specs=specs), self.workload, (costs or self.costs).__getitem__, self.slo)

    def _run_alone(self, workload: Workload, count: int) -> SimResult:
        """Simulate `count` instances of the only model of `workload`."""
        charges = HostCosts()
        spec = DeviceSpec(self._gpu.pool_bytes, self._link_bytes_per_s, can_prefetch=False)
        spec = charges.of_device(spec, self.gpus_per_instance)
        costs = {model: charges.of_model(self.costs[kind], self._gpu) for model, kind in workload.kinds.items()}
        # With one model every policy does the same.
        make_policy = functools.partial(load_turn_policy, "request_level")
        cluster = Cluster([spec] * count, make_policy, FewestRequests(), costs.__getitem__, self.slo)
        for device in cluster.devices:
            for model in costs:
                device.preload(model)
        return cluster.run(workload)


def _search(
    run: Callable[[int], SimResult], low: int, cap: int, target: float
) -> tuple[dict[int, SimResult], int | None]:
    """The least count from `low` to `cap` that reaches the target, and all results on the way; None if `cap` fails."""
    runs: dict[int, SimResult] = {}

    def is_enough(count: int) -> bool:
        runs[count] = run(count)
        return runs[count].token_attainment >= target

    bad, good = low - 1, low
    while not is_enough(good):
        if good >= cap:
            return runs, None
        bad, good = good, min(2 * good, cap)
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if is_enough(middle) else (middle, good)
    return runs, good


def _by_num_gpus(workload: Workload, costs: Mapping[str, ModelCosts]) -> list[tuple[int, Workload]]:
    """Workloads of the models that take 1 GPU, 2 GPUs, and so on, without empty ones."""
    size = {model: costs[kind].num_gpus for model, kind in workload.kinds.items()}
    return [
        (
            count,
            Workload(
                [request for request in workload.requests if size[request.model] == count],
                {model: kind for model, kind in workload.kinds.items() if size[model] == count},
            ),
        )
        for count in sorted(set(size.values()))
    ]


def _share(results: Sequence[SimResult]) -> float:
    num_tokens = sum(result.num_tokens for result in results)
    return sum(result.tokens_on_time for result in results) / num_tokens if num_tokens else 1.0


def _assumptions(
    workload: Workload, used: Workload, costs: Mapping[str, ModelCosts], gpu: GpuSpec, link_bytes_per_s: float
) -> tuple[str, ...]:
    span_s = used.requests[-1].arrival_s - used.requests[0].arrival_s
    traffic = f"traffic is as in the trace: {format_count(len(used.requests), 'request')} in {format_seconds(span_s)}"
    if len(used.requests) < len(workload.requests):
        traffic += f", the first of {len(workload.requests)}"
    kinds, spec = sorted(set(workload.kinds.values())), DeviceSpec(gpu.pool_bytes, link_bytes_per_s)
    host = HostCosts()
    return (
        traffic,
        *(_describe(kind, costs[kind], gpu) for kind in kinds),
        f"memory for weights and KV is {format_bytes(gpu.pool_bytes)} of each {gpu.name}",
        f"weights and KV come from host memory at {link_bytes_per_s / 1e9:g} GB/s per GPU, one copy at a time, and at "
        f"{host.node_link_bytes_per_s / 1e9:g} GB/s for the {host.gpus_per_node} GPUs of a node; copies take no time "
        "from steps",
        f"a node has {format_bytes(int(host.host_bytes))} of host memory for weights; a host takes "
        f"{1e3 * host.step_s:g} ms per step, {1e3 * host.change_s:g} ms per change of model, "
        f"{1e3 * host.load_s:g} ms per load and {format_bytes(int(host.resident_bytes))} per resident model",
        "nothing fails and nothing is restarted; there is no spare GPU",
        "models share a device only with models of the same number of GPUs per instance; where models are and which "
        "of their devices gets a request is decided as in tokenpool, with what its frontend and controller know",
        "dedicated instances hold their weights all the time, and each model must reach the target alone; a pool must "
        "reach it over all tokens",
        f"a step holds at most {spec.max_batched_tokens} tokens and {spec.max_running} requests of one model, as vLLM "
        "by default; prompts are not cached",
    )


def _describe(kind: str, costs: ModelCosts, gpu: GpuSpec) -> str:
    per_gpu = f" on each of {costs.num_gpus} GPUs" if costs.num_gpus > 1 else ""
    return (
        f"{kind} on {gpu.name}: {format_bytes(costs.weight_bytes)} of weights{per_gpu}, "
        f"{1e3 * costs.step(1, 1000):.1f} ms for a decode step of 1 request and {1e3 * costs.step(32, 32_000):.1f} ms "
        f"of 32 with contexts of 1000 tokens, {1e3 * costs.prefill(1000, 10**6):.0f} ms for a prompt of 1000"
    )
