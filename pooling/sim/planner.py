# SPDX-License-Identifier: Apache-2.0
"""How many GPUs a workload needs: with dedicated instances, with request-level swapping, and with a pool.

    answer = plan(read_requests("week.csv"), load_costs("h100-80g"), gpu("h100-80g"), SLO(10, 0.1))
    answer.systems["slack"].num_gpus

Each number of GPUs is found by simulating that many. Needs neither vLLM nor torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.policy.capacity import LINK_BYTES_PER_S
from tokenpool.sim.compared.bound import bound, by_model
from tokenpool.sim.compared.trial import ENGINE_BYTES, Alone, Trial, describe_try, foreseen, search, twice_as_much
from tokenpool.sim.compared.workers import Call, Workers
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import GpuSpec
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.plan import GroupPlan, Plan, SystemPlan, Try
from tokenpool.sim.result import SimResult
from tokenpool.sim.workload import ModelCosts, Workload
from tokenpool.units import format_bytes, format_count, format_seconds

POOLED = ("request_level", "slack")
"""Systems in which models share devices, by their turn policy; the last is tokenpool's own."""


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
    num_processes: int = 1,
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
        progress: told in one line what was tried, after each try; by several threads, if there are several processes.
        num_processes: that simulate. The answer does not depend on it. With more than one, a script that calls this
            needs the usual `if __name__ == "__main__":`.

    In a pool numbers are tried from the bound on, see `sim.compared.trial.search`: from half of it up to twice the
    dedicated GPUs. More GPUs may do worse, for models are placed anew, so the answer and one more are both tried, and
    one less fails. A run ends as soon as models have missed more than they may, tokens that are overdue included.
    While a process has nothing to do, it tries what may be asked for next.

    Raises ConfigError for settings out of range, an empty workload, a kind without costs and weights too large for the
    device.
    """
    _check(workload, target, model_target, link_bytes_per_s, max_requests)
    check_costs(workload, costs, gpu)
    used = Workload(workload.requests[:max_requests], workload.kinds)
    trials = [
        Trial(n, part, costs, slo, gpu, link_bytes_per_s, target, model_target) for n, part in _by_num_gpus(used, costs)
    ]
    with Workers(num_processes, trials) as workers:
        groups = [_Group(i, trial, workers, progress) for i, trial in enumerate(trials)]
        systems = _systems(groups, workers)
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


def _check(workload: Workload, target: float, model_target: float, link_bytes_per_s: float, max_requests: int) -> None:
    check_setting(0 < target <= 1, "target", f"must be above 0 and at most 1, not {show(target)}; 0.99 is 99 %")
    problem = f"must be from 0 to the target {target:g}, not {show(model_target)}"
    check_setting(0 <= model_target <= target, "model_target", problem)
    check_setting(link_bytes_per_s > 0, "link_bytes_per_s", f"must be above 0, not {show(link_bytes_per_s)}")
    check_setting(max_requests >= 1, "max_requests", f"must be at least 1, not {show(max_requests)}")
    check_setting(len(workload.requests) > 0, None, "there are no requests to plan for")


def check_costs(workload: Workload, costs: Mapping[str, ModelCosts], gpu: GpuSpec) -> None:
    """Raise ConfigError for a kind without costs, and for weights that fill a device with no room for KV."""
    for model, kind in workload.kinds.items():
        if kind not in costs:
            known = ", ".join(sorted(costs)) or "none"
            raise ConfigError(f"no costs on {gpu.name} for kind {show(kind)}; known: {known}", key=model)
        needs, has = costs[kind].weight_bytes + ENGINE_BYTES, gpu.pool_bytes
        if needs + costs[kind].kv_bytes_per_token >= has:
            problem = f"weights of {format_bytes(needs)} on a device leave no room for KV: {gpu.name} has"
            raise ConfigError(f"{problem} {format_bytes(has)} for both; use more GPUs per instance", key=model)


class _Group:
    """The models that take the same number of GPUs, as a problem of its own."""

    def __init__(self, index: int, trial: Trial, workers: Workers, progress: Callable[[str], None]) -> None:
        self._index, self.trial, self.gpus_per_instance = index, trial, trial.gpus_per_instance
        self._workers, self._progress = workers, progress
        self._twice_as_much = twice_as_much(trial)
        least = bound(trial.workload, trial.costs, trial.slo)
        self._peak_devices = least.peak_gpus / self.gpus_per_instance
        self.bound_devices = -(-least.num_gpus // self.gpus_per_instance) if trial.workload.requests else 0
        self.least_devices = max(1, int(self._peak_devices / 2))
        """A pool of fewer is not tried."""

    def dedicated(self) -> GroupPlan:
        """Instances of each model on its own, with weights that are always there."""
        workload = self.trial.workload
        instances = dict.fromkeys(workload.kinds, 1)
        asked = by_model(workload.requests)
        # The ones with the most to do first, so that no process is left with a long one at the end.
        order = sorted(asked, key=lambda model: -len(asked[model]))
        begun = {model: self._workers.begin(Call(model, self._index, Trial.alone, (model,))) for model in order}
        found: dict[str, Alone] = {model: begun[model].result() for model in asked}
        instances |= {model: alone.num_instances for model, alone in found.items()}
        is_enough = all(alone.is_enough for alone in found.values())
        first, last = [alone.first for alone in found.values()], {model: alone.last for model, alone in found.items()}
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
        low, cap = self.least_devices, max(2 * sum(alone.instances.values()), self.least_devices)
        known: dict[int, bool] = {}

        def run(count: int) -> SimResult:
            result = self._run(policy, count, self._maybe(policy, known, cap))
            known[count] = self.trial.is_enough(result)
            self._progress(describe_try(policy, count * self.gpus_per_instance, result))
            return result

        runs, answer = search(run, self.trial.is_enough, low, cap, start=self.bound_devices)
        count = answer or max(runs)
        result = runs[count]
        shares = result.model_attainments()
        worst = min(shares, key=shares.__getitem__, default=None)
        limited = self._limited(answer, cap)
        return GroupPlan(
            gpus_per_instance=self.gpus_per_instance,
            num_models=len(self.trial.workload.kinds),
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

    def _limited(self, answer: int | None, cap: int) -> int | None:
        """Devices of which it is asked what they lack; None = a pool of fewer than the answer is not tried."""
        if answer is None:
            return cap
        return answer - 1 if answer > self.least_devices else None

    def _maybe(self, policy: str, known: Mapping[int, bool], cap: int) -> list[Call]:
        """What may be run after the next count; nothing in one process."""
        if not self._workers.are_several:
            return []
        calls = []
        for count, has_ended in foreseen(known, self.least_devices, cap, start=self.bound_devices)[1:]:
            if has_ended and (limited := self._limited(count, cap)):
                calls.append(self._call(policy, limited, next(iter(self._twice_as_much))))
            elif not has_ended and count is not None:
                calls.append(self._call(policy, count))
        return calls

    def _call(self, policy: str, count: int, resource: str = "") -> Call:
        """A run of so many devices, with twice as much of a resource if one is named."""
        more = self._twice_as_much[resource] if resource else {}
        return Call((policy, count, resource), self._index, Trial.run, (policy, count), more)

    def _run(self, policy: str, count: int, maybe: Sequence[Call] = (), resource: str = "") -> SimResult:
        """What comes of it, and what may be wanted after it."""
        line = self._index, policy
        result: SimResult = self._workers.begin(self._call(policy, count, resource), line, maybe).result()
        return result

    def _binding(self, policy: str, count: int, runs: Mapping[int, SimResult]) -> str | None:
        """Which resource, doubled, brings `count` devices furthest before a model has missed too much."""
        calls = [self._call(policy, count, resource) for resource in self._twice_as_much]
        before = runs[count] if count in runs else self._run(policy, count, calls)
        best, most = None, _reached(before)
        for i, resource in enumerate(self._twice_as_much):
            if most[0]:  # none comes further than to the end
                break
            reached = _reached(self._run(policy, count, calls[i + 1 :], resource))
            if reached > most:
                best, most = resource, reached
        self._progress(f"{policy}: {count * self.gpus_per_instance} GPUs lack {best or 'nothing that is known'}")
        return best


def _systems(groups: Sequence[_Group], workers: Workers) -> dict[str, SystemPlan]:
    dedicated = [group.dedicated() for group in groups]
    calls = [
        functools.partial(group.pooled, name, alone)
        for name in POOLED
        for group, alone in zip(groups, dedicated, strict=True)
    ]
    pooled = _side_by_side(calls, workers)
    systems = {"dedicated": SystemPlan(tuple(dedicated))}
    for i, name in enumerate(POOLED):
        systems[name] = SystemPlan(tuple(pooled[i * len(groups) : (i + 1) * len(groups)]))
    return systems


def _side_by_side(calls: Sequence[Callable[[], GroupPlan]], workers: Workers) -> list[GroupPlan]:
    """Each in a thread of its own, where several can run."""
    if not workers.are_several:
        return [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        try:
            return list(threads.map(lambda call: call(), calls))
        except BaseException as error:  # the other threads wait for answers
            workers.stop(str(error) or type(error).__name__)
            raise


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
        "by default; where the trace says what prompts share, their KV is kept, in what weights leave of host memory, "
        "or of the device's with dedicated instances",
    )


def _describe(kind: str, costs: ModelCosts, gpu: GpuSpec) -> str:
    per_gpu = f" on each of {costs.num_gpus} GPUs" if costs.num_gpus > 1 else ""
    return (
        f"{kind} on {gpu.name}: {format_bytes(costs.weight_bytes)} of weights{per_gpu}, "
        f"{1e3 * costs.step(1, 1000):.1f} ms for a decode step of 1 request and {1e3 * costs.step(32, 32_000):.1f} ms "
        f"of 32 with contexts of 1000 tokens, {1e3 * costs.prefill(1000, 10**6):.0f} ms for a prompt of 1000"
    )
