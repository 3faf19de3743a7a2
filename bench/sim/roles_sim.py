# SPDX-License-Identifier: Apache-2.0
"""Mixed hosts against hosts split into prefill and decode, on simulated H100, prompt-heavy and output-heavy.

    python -m bench.sim.roles_sim --json bench/results/roles_sim.json

Eight devices, models of the kind qwen2.5-7b, all in the memory of every host; the same requests for each split. About
four models fit on a device at a time: with `--models 4` weights never move, with 24 they do. `live` begins with four
hosts of each role and lets the capacity policy change them. Handed-over KV goes through host memory, at 16 GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.policy.capacity import Role
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim import generate
from tokenpool.sim.costs import costs_of
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import gpu
from tokenpool.sim.live import LivePool, LiveSettings
from tokenpool.sim.workload import Workload

GPU, KIND, NUM_GPUS, LINK_BYTES_PER_S = "h100-80g", "qwen2.5-7b", 8, 16e9
_SLO = SLO(2.0, 0.05)
_LOADS = {"prompt_heavy": (6.0, 0.25, 14.4), "output_heavy": (0.25, 3.0, 4.8)}
"""Factors of prompt and answer lengths, and requests per second of all models together."""
_SPLITS = (2, 4, 6)


@dataclass(slots=True)
class RolesResult:
    prompt_heavy_mixed: float
    prompt_heavy_split_best: float
    prompt_heavy_live: float
    output_heavy_mixed: float
    output_heavy_split_best: float
    output_heavy_live: float
    """Tokens on time, 0 to 1; `split_best` is the best of all fixed numbers of prefill hosts."""
    runs: dict[str, Any] = field(default_factory=dict)


def simulate(workload: Workload, num_prefill: int, *, is_live: bool) -> dict[str, Any]:
    """Figures of one split; 0 prefill hosts = all are mixed."""
    costs = {model: costs_of(kind, GPU) for model, kind in workload.kinds.items()}
    base = DeviceSpec(gpu(GPU).pool_bytes, LINK_BYTES_PER_S, max_running=1024)
    roles = [Role.MIXED] * NUM_GPUS
    if num_prefill:
        roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * (NUM_GPUS - num_prefill)
    specs = [replace(base, role=role) for role in roles]
    settings = LiveSettings(host_bytes=2 << 40, is_everywhere=True)
    policy = LiveCapacity() if is_live else None
    pool = LivePool(specs, lambda: load_turn_policy("slack"), costs, _SLO, policy, settings)
    made = pool.run(workload, drain_s=60.0).to_json()
    changes = [[at_s, d.to_host, str(d.role), d.reason] for at_s, d in pool.decisions if d.action == "role"]
    return {**made, "role_changes": changes, "roles_at_end": [device.spec.role for device in pool.devices]}


def run(seed: int, models: int = 24, **_: object) -> RolesResult:
    runs: dict[str, Any] = {}
    shares: list[float] = []
    for name, (inputs, outputs, rate) in _LOADS.items():
        names = [f"m{i:02}" for i in range(models)]
        kinds = dict.fromkeys(names, KIND)
        lengths = {"input_scale": inputs, "output_scale": outputs}
        workload = generate.poisson(dict.fromkeys(names, rate / models), 90.0, seed, kinds=kinds, **lengths)
        arms = {"mixed": (0, False), **{f"split_{count}": (count, False) for count in _SPLITS}, "live": (4, True)}
        for arm, (count, is_live) in arms.items():
            made = runs[f"{name}_{arm}"] = simulate(workload, count, is_live=is_live)
            common.progress(f"{name}, {arm}: {made['token_deadline_pct']:.1f} % on time")
        on_time = {arm: runs[f"{name}_{arm}"]["token_deadline_pct"] / 100 for arm in arms}
        shares += [on_time["mixed"], max(on_time[f"split_{count}"] for count in _SPLITS), on_time["live"]]
    return RolesResult(*shares, runs)


def main() -> None:
    keys = [f"{name}_{arm}" for name in _LOADS for arm in ("mixed", "split_best", "live")]
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=24, help="(default: %(default)s)")
    common.report("roles_sim", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
