# SPDX-License-Identifier: Apache-2.0
"""Systems to compare, ours and others, as sets of devices, a turn policy and a router.

    run_system(system("aegaeon", 16, "h100-80g", 16e9), workload, kind_costs, SLO(10, 0.1))

Each is what its publication describes, reduced to what the simulator models. `artifact_mode` takes the devices of the
simulator in Aegaeon's artifact; the costs to go with it are `artifact.costs`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.policy.capacity import Role
from tokenpool.policy.turns import TurnPolicy, load_turn_policy
from tokenpool.sim.cluster import Cluster, Router
from tokenpool.sim.compared import artifact
from tokenpool.sim.compared.baseline_policies import FirstCome, ShortestFirst
from tokenpool.sim.compared.baseline_routers import FewestRequests, Locality, PrefillDecode, Static
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import gpu as gpu_spec
from tokenpool.sim.result import SimResult
from tokenpool.sim.router import PlacementRouter, homes_for
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
_SLLM_QUEUE = 4
"""Requests on a device beyond which ServerlessLLM brings the model in elsewhere.

Source: the artifact's `V02Policy(R=1, QS=4)`.
"""
_MAX_CHOICES = 64
"""With more devices, a model may be served by a few of them only."""
_SIM_POLICIES: Mapping[str, Callable[..., TurnPolicy]] = {"first_come": FirstCome, "shortest_first": ShortestFirst}


@dataclass(frozen=True, slots=True)
class System:
    """Everything about a system but its models and requests."""

    name: str
    specs: tuple[DeviceSpec, ...]
    policy: str
    """A turn policy plugin, or one of those that exist only here: `first_come`, `shortest_first`."""
    make_router: Callable[[tuple[DeviceSpec, ...], Mapping[str, ModelCosts]], Router]
    """Takes the devices, and the costs of all models by name."""
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
) -> System:
    """Describe a system of `num_gpus` devices; a tensor parallel group is one device.

        slack       tokenpool: mixed devices, placement by load and residency, the turn policy `slack`
        request_level, round_robin    the same with these turn policies
        sllm        ServerlessLLM: request-level, to a device that has the model, else the least recently used
        sllm+       to the device with the fewest requests, the shortest rest first by an oracle; what it interrupts is
                    computed anew
        aegaeon     `prefill_gpus` of the devices prefill and the others decode, with the plugin `aegaeon`
        mux         models fixed to devices as memory allows, all resident, a step each in turn; others are refused
        dedicated   one model per device; others are refused
        sleep       vLLM's sleep mode, level 1: request-level; both models' weights are copied at a switch

    Raises ConfigError for an unknown name or GPU, and for numbers of devices that cannot be.
    """
    check_setting(name in _SYSTEMS, "system", f"no such system: {show(name)}; known are {', '.join(_SYSTEMS)}")
    check_setting(num_gpus >= 1, "num_gpus", f"must be at least 1, not {show(num_gpus)}")
    check_setting(0 < link_bytes_per_s < math.inf, "link_bytes_per_s", f"must be above 0, not {show(link_bytes_per_s)}")
    base = DeviceSpec(gpu_spec(gpu).pool_bytes, link_bytes_per_s)
    if artifact_mode:
        # It charges copies to a device only.
        base = replace(base, memory_bytes=artifact.MEMORY_BYTES, out_bytes_per_s=math.inf)
    return _SYSTEMS[name](name, base, num_gpus, prefill_gpus, artifact_mode)


def run_system(system: System, workload: Workload, costs: KindCosts, slo: SLO) -> SimResult:
    """Serve a workload; `costs` takes the kind of a model."""
    by_kind = functools.cache(costs)
    models = {model: by_kind(kind) for model, kind in workload.kinds.items()}
    router = system.make_router(system.specs, models)
    make_policy = functools.partial(_make_policy, system)
    cluster = Cluster(system.specs, make_policy, router, models.__getitem__, slo, give_up_s=system.give_up_s)
    for device in cluster.devices:
        if isinstance(device.policy, ShortestFirst):
            device.policy.device = device
    if isinstance(router, Static):
        for model, index in router.placement.items():
            cluster.devices[index].preload(model)
    return cluster.run(workload)


def _make_policy(system: System) -> TurnPolicy:
    own = _SIM_POLICIES.get(system.policy)
    return own(**system.options) if own else load_turn_policy(system.policy, system.options)


def _pool(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    def make_router(specs: tuple[DeviceSpec, ...], models: Mapping[str, ModelCosts]) -> Router:
        if num_gpus <= _MAX_CHOICES:
            return PlacementRouter()
        # A model's host copy cannot be everywhere; what traffic there will be is not known.
        return PlacementRouter(homes_for(dict.fromkeys(models, 0.05), models, num_gpus))

    return System(name, (base,) * num_gpus, name, make_router)


def _sllm(name: str, base: DeviceSpec, num_gpus: int, _: int, artifact_mode: bool) -> System:
    shortest_first = name == "sllm+"
    spec = replace(base, max_resident=1, can_prefetch=False, kv_lost=shortest_first)
    give_up_s = artifact.GIVE_UP_S if artifact_mode else math.inf
    policy = "shortest_first" if shortest_first else "first_come"

    def make_router(*_: object) -> Router:
        return FewestRequests() if shortest_first else Locality(_SLLM_QUEUE)

    return System(name, (spec,) * num_gpus, policy, make_router, give_up_s=give_up_s)


def _aegaeon(name: str, base: DeviceSpec, num_gpus: int, prefill_gpus: int, _: bool) -> System:
    if not 0 < prefill_gpus < num_gpus:
        problem = f"must be from 1 to {num_gpus - 1} of {num_gpus} devices, not {show(prefill_gpus)}"
        raise ConfigError(problem, key="prefill_gpus")
    prefill = replace(base, role=Role.PREFILL, max_prefills=1, max_resident=2)
    decode = replace(base, role=Role.DECODE, max_resident=2, kv_follows_turn=True)
    specs = (prefill,) * prefill_gpus + (decode,) * (num_gpus - prefill_gpus)
    # Aegaeon's quotas take each switch for about 3 s, hidden or not, so its floor of 0.5 seldom counts. The plugin is
    # told what is left of a switch, so the floor would count nearly always, and turns would be of a few steps.
    return System(name, specs, "aegaeon", lambda *_: PrefillDecode(), {"min_alpha": 0.2})


def _mux(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    specs = (replace(base, can_prefetch=False),) * num_gpus
    return System(name, specs, "round_robin", lambda specs, models: Static(specs, models, _MUX_KV_FRAC))


def _dedicated(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    specs = (replace(base, max_resident=1, can_prefetch=False),) * num_gpus
    return System(name, specs, "request_level", Static)


def _sleep(name: str, base: DeviceSpec, num_gpus: int, *_: object) -> System:
    spec = replace(base, max_resident=1, can_prefetch=False, kv_lost=True, weights_go_out=True, switch_s=_SLEEP_FIXED_S)
    return System(name, (spec,) * num_gpus, "request_level", lambda *_: Locality(_SLLM_QUEUE))


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
