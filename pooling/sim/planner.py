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
from tokenpool.sim.result import MostMissed, SimResult
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
    model_target: float = 0.9,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    max_requests: int = 20_000,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Find the least number of GPUs with which `target` of all tokens and `model_target` of every model's are on time.

    Args:
        workload: models without a request count too, they need an instance.
        costs: by kind.
        gpu: all are of this kind.
        slo: of every model.
        target: share of all tokens on time, above 0 and at most 1; for dedicated instances that of each model.
        model_target: share of the tokens of the model with the least; at most `target`.
        link_bytes_per_s: of copies from host memory to one device.
        max_requests: only the first so many are simulated.
        progress: told in one line what was tried, after each try.

    Numbers are doubled until one is enough, then the gap is halved. In a pool more GPUs may do worse, for models are
    placed anew: so one more than the answer must do as well, and two less must not. A pool begins with half of what
    the bound asks for and ends at twice the dedicated GPUs. A run ends as soon as a model has missed more than it may.

    Raises ConfigError for settings out of range, an empty workload, a kind without costs and weights too large for the
    device.
    """
    _check_targets(target, model_target)
    check_setting(link_bytes_per_s > 0, "link_bytes_per_s", f"must be above 0, not {show(link_bytes_per_s)}")
    check_setting(max_requests >= 1, "max_requests", f"must be at least 1, not {show(max_requests)}")
    check_setting(len(workload.requests) > 0, None, "there are no requests to plan for")
    check_costs(workload, costs, gpu)
    used = Workload(workload.requests[:max_requests], workload.kinds)
    groups = [
        _Group(n, part, costs, slo, gpu, link_bytes_per_s, (target, model_target), progress)
        for n, part in _by_num_gpus(used, costs)
    ]
    dedicated = [group.dedicated() for group in groups]
    systems = {"dedicated": SystemPlan(tuple(dedicated))}
    for name in POOLED:
        found = (group.pooled(name, alone) for group, alone in zip(groups, dedicated, strict=True))
        systems[name] = SystemPlan(tuple(found))
    return Plan(
        gpu=gpu.name,
        slo=slo,
        target=target,
        model_target=model_target,
        num_models=len(workload.kinds),
        num_requests=len(workload.requests),
        num_simulated=len(used.requests),
        span_s=used.requests[-1].arrival_s - used.requests[0].arrival_s,
        bound_gpus=sum(group.bound_devices * group.gpus_per_instance for group in groups),
        systems=systems,
        assumptions=_assumptions(workload, used, costs, gpu, link_bytes_per_s),
    )


def _check_targets(target: float, model_target: float) -> None:
    check_setting(0 < target <= 1, "target", f"must be above 0 and at most 1, not {show(target)}; 0.99 is 99 %")
    problem = f"must be from 0 to the target {target:g}, not {show(model_target)}"
    check_setting(0 <= model_target <= target, "model_target", problem)


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
        targets: tuple[float, float],
        progress: Callable[[str], None],
    ) -> None:
        self.gpus_per_instance = gpus_per_instance
        self.workload, self.costs, self.slo, self._progress = workload, costs, slo, progress
        self._target, self._model_target = targets
        self._gpu, self._link_bytes_per_s = gpu, link_bytes_per_s
        least = bound(workload, costs, slo)
        self._peak_devices = least.peak_gpus / gpus_per_instance
        self._most_missed = _may_miss(workload, self._target, self._model_target)
        self.bound_devices = -(-least.num_gpus // gpus_per_instance) if workload.requests else 0
        self.least_devices = max(1, int(least.peak_gpus / gpus_per_instance / 2))
        """A pool of fewer is not tried."""

    def dedicated(self) -> GroupPlan:
        """Instances of each model on its own, with weights that are always there."""
        parts = by_model(self.workload.requests)
        instances = dict.fromkeys(self.workload.kinds, 1)
        first, last, is_enough = [], {}, True
        for model, requests in parts.items():
            part = Workload(requests, {model: self.workload.kinds[model]})
            cap = min(_MAX_INSTANCES, len(requests))
            run_alone = functools.partial(self._run_alone, part, _may_miss(part, self._target, self._target))
            runs, answer = _search(run_alone, self._is_enough, 1, cap, spare=False)
            instances[model] = answer or max(runs)
            is_enough = is_enough and answer is not None
            first.append(runs[1])
            last[model] = runs[instances[model]]
        num_devices = sum(instances.values())
        self._progress(f"dedicated: {num_devices} instances{'' if is_enough else ' do not suffice'}")
        end_s = max((result.end_s for result in last.values()), default=0.0)
        busy_s = sum(instances[model] * result.busy_frac * result.end_s for model, result in last.items())
        tries = {len(instances): _share(first), num_devices: _share(list(last.values()))}
        worst = min(last, key=lambda model: last[model].token_attainment, default=None)
        return GroupPlan(
            gpus_per_instance=self.gpus_per_instance,
            num_models=len(instances),
            num_gpus=num_devices * self.gpus_per_instance if is_enough else None,
            tries=tuple(Try(n * self.gpus_per_instance, tries[n]) for n in sorted(tries)),
            num_tokens=sum(result.num_tokens for result in last.values()),
            tokens_on_time=sum(result.tokens_on_time for result in last.values()),
            busy_frac=busy_s / (num_devices * end_s) if end_s else 0.0,
            waited_frac=0.0,
            link_frac=0.0,
            worst_model=worst,
            worst_frac=last[worst].token_attainment if worst else 1.0,
            headroom_frac=self._headroom(num_devices),
            instances=instances,
        )

    def pooled(self, policy: str, alone: GroupPlan) -> GroupPlan:
        """All models on any of the devices, which take turns by `policy`."""
        cap = max(2 * sum(alone.instances.values()), self.least_devices)

        def run(count: int) -> SimResult:
            result = self._run(policy, count)
            worst = f"worst model {100 * result.worst_model:.1f} %"
            what = f"not enough after {result.num_requests} requests" if result.is_stopped else worst
            self._progress(f"{policy}: {count * self.gpus_per_instance} GPUs, {what}")
            return result

        runs, answer = _search(run, self._is_enough, self.least_devices, cap)
        count = answer or max(runs)
        result = runs[count]
        shares = result.model_attainments()
        worst = min(shares, key=shares.__getitem__, default=None)
        limited = None if answer == self.least_devices else count - (answer is not None)
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
            worst_model=worst,
            worst_frac=result.worst_model,
            headroom_frac=self._headroom(count),
            host_bytes_per_node=result.host_bytes_per_node * self.gpus_per_instance,
            placement=result.placement,
            binding=self._binding(policy, limited, runs) if limited else None,
        )

    def _headroom(self, count: int) -> float:
        return max(0.0, 1 - self._peak_devices / count)

    def _binding(self, policy: str, count: int, runs: Mapping[int, SimResult]) -> str | None:
        """Which resource, doubled, brings `count` devices furthest before a model has missed too much."""
        before = runs[count] if count in runs else self._run(policy, count)
        faster = {kind: c._replace(**{x: getattr(c, x) / 2 for x in _TIMES}) for kind, c in self.costs.items()}
        twice: dict[str, Callable[[], SimResult]] = {
            "compute": lambda: self._run(policy, count, costs=faster),
            "link": lambda: self._run(policy, count, link_factor=2.0),
            "memory": lambda: self._run(policy, count, memory_bytes=2 * self._gpu.pool_bytes),
        }
        best, most = None, _reached(before)
        for resource, run in twice.items():
            reached = _reached(run())
            if reached > most:
                best, most = resource, reached
        self._progress(f"{policy}: {count * self.gpus_per_instance} GPUs lack {best or 'nothing that is known'}")
        return best

    def _is_enough(self, result: SimResult) -> bool:
        is_enough = result.token_attainment >= self._target and result.worst_model >= self._model_target
        return is_enough and not result.is_stopped

    def _run(
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
        described = system(name, count, self._gpu.name, self._link_bytes_per_s, gpus_per_device=self.gpus_per_instance)
        memory_bytes = memory_bytes or self._gpu.pool_bytes
        specs = tuple(
            replace(
                spec,
                memory_bytes=memory_bytes,
                link_bytes_per_s=link_factor * spec.link_bytes_per_s,
                node_link_bytes_per_s=link_factor * spec.node_link_bytes_per_s,
            )
            for spec in described.specs
        )
        made, costs_of = replace(described, specs=specs), (costs or self.costs).__getitem__
        return run_system(made, self.workload, costs_of, self.slo, most_missed=self._most_missed)

    def _run_alone(self, workload: Workload, most_missed: MostMissed, count: int) -> SimResult:
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
        return cluster.run(workload, most_missed=most_missed)


def _may_miss(workload: Workload, target: float, model_target: float) -> MostMissed:
    """Tokens that may be late, a rounding error more."""
    counts = dict.fromkeys(workload.kinds, 0)
    for request in workload.requests:
        counts[request.model] += request.output_len
    of_model = {model: (1 - model_target) * count + 1e-6 for model, count in counts.items()}
    return MostMissed((1 - target) * sum(counts.values()) + 1e-6, of_model)


def _search(
    run: Callable[[int], SimResult], passes: Callable[[SimResult], bool], low: int, cap: int, *, spare: bool = True
) -> tuple[dict[int, SimResult], int | None]:
    """The least count from `low` to `cap` found with which a run passes, and all results on the way.

    None if `cap` fails. With `spare`, one more must pass as well, unless that is beyond `cap`.
    """
    runs: dict[int, SimResult] = {}

    def is_enough(count: int) -> bool:
        if count not in runs:
            runs[count] = run(count)
        return passes(runs[count])

    bad, good = low - 1, low
    while not is_enough(good):
        if good >= cap:
            return runs, None
        bad, good = good, min(2 * good, cap)
    while good - bad > 1:
        middle = (bad + good) // 2
        good, bad = (middle, bad) if is_enough(middle) else (good, middle)
    if not spare:
        return runs, good
    while good - 2 >= low and is_enough(good - 2):
        good -= 2
    while good < cap and not (is_enough(good) and is_enough(good + 1)):
        good = min(cap, good + max(1, good // 8))
    return runs, good if is_enough(good) else None


def _reached(result: SimResult) -> tuple[bool, int]:
    """How far a run got: to its end, or up to so many requests."""
    return not result.is_stopped, result.num_requests


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
        "dedicated instances hold their weights all the time, and each model must reach the target; in a pool all "
        "tokens together must, and each model its own target",
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
