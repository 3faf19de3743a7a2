# SPDX-License-Identifier: Apache-2.0
"""Systems to compare, ours and others, as sets of devices, a turn policy and a router.

    run_system(system("aegaeon", 16, "h100-80g", 16e9), workload, kind_costs, SLO(10, 0.1))

Each is what its publication describes, reduced to what the simulator models. `artifact_mode` takes the devices of the
simulator in Aegaeon's artifact; the costs to go with it are `artifact.costs`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.policy.capacity import LOAD_BYTES_PER_S, Role
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.policy.turns import TurnPolicy, load_turn_policy
from tokenpool.sim.cluster import Cluster, Router
from tokenpool.sim.compared import artifact
from tokenpool.sim.compared.baseline_policies import FirstCome, ShortestFirst
from tokenpool.sim.compared.baseline_routers import FewestRequests, Locality, PrefillDecode, Static
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import GpuSpec
from tokenpool.sim.gpus import gpu as gpu_spec
from tokenpool.sim.host_costs import FREE, HostCosts
from tokenpool.sim.live import LivePool, LiveSettings
from tokenpool.sim.result import MostMissed, SimResult
from tokenpool.sim.workload import ModelCosts, Workload

KindCosts = Callable[[str], ModelCosts]
"""What a kind of model costs on the devices of a system."""

_SLEEP_FIXED_S = 0.17
"""Of one wake or sleep of vLLM: what is left of 0.26 s for 1.2 GB and 0.82 s for 8.3 GB at equal bandwidth.

Source: wake times in vLLM's blog of 26 Oct 2025 (A100, level 1). Going to sleep is not in them; it is taken to be as
fast, which favours it.
"""
_MUX_KV_FRAC = 0.4
"""Memory that static multiplexing keeps for KV: two models of 7B to 13B on 80 GB, as MuxServe's published set-up."""
_ANY = gpu_spec("h100-80g")
"""Until `system` says which."""
_ENDLESS_BYTES = 1e18
_SLLM_QUEUE = 4
"""Requests on a device beyond which ServerlessLLM brings the model in elsewhere.

Source: the artifact's `V02Policy(R=1, QS=4)`.
"""
_SIM_POLICIES: Mapping[str, Callable[..., TurnPolicy]] = {"first_come": FirstCome, "shortest_first": ShortestFirst}


@dataclass(frozen=True, slots=True)
class System:
    """Everything about a system but its models and requests."""

    name: str
    specs: tuple[DeviceSpec, ...]
    policy: str
    """A turn policy plugin, or one of those that exist only here: `first_come`, `shortest_first`."""
    make_router: Callable[[tuple[DeviceSpec, ...], Mapping[str, ModelCosts]], Router] | None
    """Takes the devices, and the costs of all models by name; None = the router and the capacity policy of tokenpool,
    see `LivePool`."""
    gpu: GpuSpec
    charges: HostCosts = FREE
    """What `specs` hold already, and models are charged."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Of the policy."""
    give_up_s: float = math.inf
    """See `Cluster`."""


def system(
    name: str,
    num_gpus: int,
    gpu: str,
    link_bytes_per_s: float,
    prefill_gpus: int = 6,
    artifact_mode: bool = False,
    *,
    charges: HostCosts | None = None,
    gpus_per_device: int = 1,
    options: Mapping[str, float] | None = None,
) -> System:
    """Describe a system of `num_gpus` devices, each of `gpus_per_device` GPUs.

    `charges` are what hosts pay, None = the defaults, and nothing in `artifact_mode`. `options` go to the turn policy.

        slack       tokenpool: mixed devices, its router and capacity policy, the turn policy `slack`
        request_level, round_robin    the same with these turn policies
        sllm        ServerlessLLM: request-level, to a device that has the model, else the least recently used
        sllm+       to the device with the fewest requests, the shortest rest first by an oracle; what it interrupts is
                    computed anew
        aegaeon     `prefill_gpus` of the devices prefill and the others decode, with the plugin `aegaeon`
        mux         models fixed to devices as memory allows, all resident, a step each in turn; others are refused
        dedicated   one model per device; others are refused
        sleep       vLLM's sleep mode, level 1: request-level; both models' weights are copied at a switch

    KV of prompts is kept for others by tokenpool's devices in host memory, by `mux` and `dedicated` on the device, by
    the others not at all: Aegaeon decodes elsewhere, and the rest drop a model's KV with it.

    Raises ConfigError for an unknown name or GPU, and for numbers of devices that cannot be.
    """
    check_setting(name in _SYSTEMS, "system", f"no such system: {show(name)}; known are {', '.join(_SYSTEMS)}")
    check_setting(num_gpus >= 1, "num_gpus", f"must be at least 1, not {show(num_gpus)}")
    check_setting(0 < link_bytes_per_s < math.inf, "link_bytes_per_s", f"must be above 0, not {show(link_bytes_per_s)}")
    on = gpu_spec(gpu)
    base = DeviceSpec(on.pool_bytes, link_bytes_per_s)
    if artifact_mode:
        # It charges copies to a device only.
        base = replace(base, memory_bytes=artifact.MEMORY_BYTES, out_bytes_per_s=math.inf)
    charges = charges or (FREE if artifact_mode else HostCosts())
    base = charges.of_device(base, gpus_per_device)
    made = _SYSTEMS[name](name, base, num_gpus, prefill_gpus, artifact_mode)
    return replace(made, gpu=on, charges=charges, options={**made.options, **(options or {})})


def run_system(
    system: System,
    workload: Workload,
    costs: KindCosts,
    slo: SLO,
    *,
    drain_s: float = 600.0,
    window_s: tuple[float, float] = (0.0, math.inf),
    most_missed: MostMissed | None = None,
) -> SimResult:
    """Serve a workload; `costs` takes the kind of a model. See `Cluster.run` for the rest."""
    make_policy = functools.partial(_make_policy, system)
    models = charged_models(system, workload, costs)
    if system.make_router is None:
        pool = LivePool(system.specs, make_policy, models, slo, LiveCapacity(), live_settings(system.specs))
        return pool.run(workload, drain_s=drain_s, window_s=window_s, most_missed=most_missed)
    router = system.make_router(system.specs, models)
    cluster = Cluster(system.specs, make_policy, router, models.__getitem__, slo, give_up_s=system.give_up_s)
    for device in cluster.devices:
        if isinstance(device.policy, ShortestFirst):
            device.policy.device = device
    if isinstance(router, Static):
        for model, index in router.placement.items():
            cluster.devices[index].preload(model)
    return cluster.run(workload, drain_s=drain_s, window_s=window_s, most_missed=most_missed)


def charged_models(system: System, workload: Workload, costs: KindCosts) -> dict[str, ModelCosts]:
    """What each model costs on the devices of a system, with what hosts pay; `costs` takes kinds."""
    by_kind = functools.cache(lambda kind: system.charges.of_model(costs(kind), system.gpu))
    return {model: by_kind(kind) for model, kind in workload.kinds.items()}


def live_settings(specs: Sequence[DeviceSpec]) -> LiveSettings:
    """Hosts as tokenpool has them: each holds copies of its own, in its part of the memory of its node."""
    spec = specs[0]
    host_bytes = spec.node_bytes / min(len(specs), spec.devices_per_node)
    return LiveSettings(
        host_bytes=int(min(host_bytes, _ENDLESS_BYTES)),
        load_bytes_per_s=min(spec.disk_bytes_per_s, LOAD_BYTES_PER_S),
        hosts_per_node=spec.devices_per_node,
    )


def _make_policy(system: System) -> TurnPolicy:
    own = _SIM_POLICIES.get(system.policy)
    return own(**system.options) if own else load_turn_policy(system.policy, system.options)


def _pool(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    return System(name, (base,) * num_gpus, name, None, _ANY)


def _sllm(name: str, base: DeviceSpec, num_gpus: int, _: int, artifact_mode: bool) -> System:
    shortest_first = name == "sllm+"
    spec = replace(base, max_resident=1, can_prefetch=False, kv_lost=shortest_first)
    give_up_s = artifact.GIVE_UP_S if artifact_mode else math.inf
    policy = "shortest_first" if shortest_first else "first_come"

    def make_router(*_: object) -> Router:
        return FewestRequests() if shortest_first else Locality(_SLLM_QUEUE)

    return System(name, (spec,) * num_gpus, policy, make_router, _ANY, give_up_s=give_up_s)


def _aegaeon(name: str, base: DeviceSpec, num_gpus: int, prefill_gpus: int, _: bool) -> System:
    if not 0 < prefill_gpus < num_gpus:
        problem = f"must be from 1 to {num_gpus - 1} of {num_gpus} devices, not {show(prefill_gpus)}"
        raise ConfigError(problem, key="prefill_gpus")
    prefill = replace(base, role=Role.PREFILL, max_prefills=1, max_resident=2)
    decode = replace(base, role=Role.DECODE, max_resident=2, kv_follows_turn=True)
    specs = (prefill,) * prefill_gpus + (decode,) * (num_gpus - prefill_gpus)
    # Aegaeon's quotas take each switch for about 3 s, hidden or not, so its floor of 0.5 seldom counts. The plugin is
    # told what is left of a switch, so the floor would count nearly always, and turns would be of a few steps.
    return System(name, specs, "aegaeon", lambda *_: PrefillDecode(), _ANY, options={"min_alpha": 0.2})


def _mux(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    specs = (_with_prefixes(replace(base, can_prefetch=False)),) * num_gpus
    return System(name, specs, "round_robin", lambda specs, models: Static(specs, models, _MUX_KV_FRAC), _ANY)


def _dedicated(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    specs = (_with_prefixes(replace(base, max_resident=1, can_prefetch=False)),) * num_gpus
    return System(name, specs, "request_level", Static, _ANY)


def _with_prefixes(spec: DeviceSpec) -> DeviceSpec:
    """Engines whose weights stay keep KV of prompts on the device; requests that run take none of that room here."""
    return replace(spec, prefix_bytes=_MUX_KV_FRAC * spec.memory_bytes, prefix_on_device=True)


def _sleep(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    spec = replace(base, max_resident=1, can_prefetch=False, kv_lost=True, weights_go_out=True, switch_s=_SLEEP_FIXED_S)
    return System(name, (spec,) * num_gpus, "request_level", lambda *_: Locality(_SLLM_QUEUE), _ANY)


_SYSTEMS: Mapping[str, Callable[[str, DeviceSpec, int, int, bool], System]] = {
    "slack": _pool,
    "request_level": _pool,
    "round_robin": _pool,
    "sllm": _sllm,
    "sllm+": _sllm,
    "aegaeon": _aegaeon,
    "mux": _mux,
    "dedicated": _dedicated,
    "sleep": _sleep,
}
