# SPDX-License-Identifier: Apache-2.0
"""`tokenpool sim`: serve a request file in simulated time, and say what was on time. Imports no vLLM.

tokenpool sim --requests week.csv --gpus 16 --gpu h100-80g --policy slack --ttft 10 --tpot 0.1
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from tokenpool.cli.output import write_json
from tokenpool.cli.parser import Parser
from tokenpool.cli.sim_inputs import add_inputs, read_inputs, slo_of
from tokenpool.errors import ConfigError, show
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.sim.compared import artifact
from tokenpool.sim.compared.systems import charged_models, live_settings, run_system, system
from tokenpool.sim.gpus import gpu
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.live import POOL_POLICIES, LivePool
from tokenpool.sim.planner import check_costs
from tokenpool.units import parse_bytes


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool sim` to the tree."""
    parser = commands.add_parser(
        "sim", help=summary, description="Serve a request file in simulated time and print what was on time."
    )
    add_inputs(parser, "--requests")
    add = parser.add_argument
    share = "of the GPUs, for aegaeon (default: %(default)s)"
    memory = "of a node of 8 devices, for weights (default: %(default)s)"
    capacity = "of slack and the like: models stay where they begin, or are moved (default: live)"
    fail = "lose a device then, for slack and the like"
    add("--gpus", type=int, required=True, metavar="N", help="devices; a tensor parallel group counts as one")
    add("--policy", required=True, metavar="NAME", help="slack, aegaeon, sllm, ...; see docs/simulation.md")
    add("--prefill-gpus", type=int, default=6, metavar="N", help=share)
    add("--artifact-mode", action="store_true", help="costs and rules of the simulator in Aegaeon's artifact")
    add("--capacity", choices=("static", "live"), help=capacity)
    add("--host-memory", default="2TB", metavar="SIZE", help=memory)
    add("--fail", action="append", default=[], metavar="SECONDS:DEVICE", help=fail)


def run(flags: argparse.Namespace) -> int:
    """Simulate and print the result; raises ConfigError for settings and files that cannot be."""
    is_pool = flags.policy in POOL_POLICIES and not flags.artifact_mode
    if flags.capacity and not is_pool:
        raise ConfigError(
            f"goes with the policies {', '.join(POOL_POLICIES)}, without --artifact-mode", key="--capacity"
        )
    if flags.fail and not is_pool:
        raise ConfigError(f"goes with the policies {', '.join(POOL_POLICIES)}", key="--fail")
    workload, costs = read_inputs(flags, flags.requests)
    if flags.artifact_mode:
        known = ", ".join(sorted(artifact.KINDS))
        for model, kind in workload.kinds.items():
            if kind not in artifact.KINDS:
                raise ConfigError(f"no such kind in the artifact: {show(kind)}; known: {known}", key=model)
        costs = {kind: artifact.costs(kind) for kind in workload.kinds.values()}
    else:
        check_costs(workload, costs, gpu(flags.gpu))
    per_gb = 2**30 if flags.artifact_mode else 1e9  # the artifact's GB
    link, charges = flags.link_gbs * per_gb, None
    if not flags.artifact_mode:
        charges = HostCosts(host_bytes=parse_bytes(flags.host_memory, "--host-memory"))
    args = flags.policy, flags.gpus, flags.gpu, link, flags.prefill_gpus, flags.artifact_mode
    made = system(*args, charges=charges)
    if is_pool:
        pool = LivePool.of(
            made.specs,
            flags.policy,
            charged_models(made, workload, costs.__getitem__),
            slo_of(flags),
            None if flags.capacity == "static" else LiveCapacity(),
            live_settings(made.specs),
            [_failure(text, flags.gpus) for text in flags.fail],
        )
        result = {**pool.run(workload).to_json(), **pool.moves_to_json()}
    else:
        result = run_system(made, workload, costs.__getitem__, slo_of(flags)).to_json()
    print(f"{len(workload.requests)} requests for {len(workload.kinds)} models on {flags.gpus} x {flags.gpu}")
    print(f"  tokens on time                 {result['token_deadline_pct']:6.2f} %")
    print(f"  models with 90 % / the worst    {result['models_90_pct']:5.1f} % / {result['worst_model_pct']:.1f} %")
    print(f"  requests with all on time      {result['request_all_tokens_pct']:6.2f} %")
    print(f"  time-weighted (artifact)       {result['artifact_slo_pct']:6.2f} %")
    print(f"  first token, p50 / p99         {result['ttft_p50_s']:.2f} s / {result['ttft_p99_s']:.2f} s")
    print(f"  failed / not finished          {result['n_failed']} / {result['n_unfinished']}")
    print(f"  busy / waiting / link in use   {_percents(result)}")
    if is_pool:
        print(f"  moves                          {len(result['moves'])}, {result['moved_bytes'] / 1e9:.0f} GB copied")
    write_json(flags.json, result)
    return 0


def _failure(text: str, num_gpus: int) -> tuple[float, int]:
    seconds, _, device = text.partition(":")
    try:
        at_s, index = float(seconds), int(device)
    except ValueError:
        raise ConfigError(f"expected SECONDS:DEVICE such as 60:0, not {show(text)}", key="--fail") from None
    if not (0 <= at_s and 0 <= index < num_gpus):
        raise ConfigError(f"{show(text)}: there are devices 0 to {num_gpus - 1}, and times from 0 on", key="--fail")
    return at_s, index


def _percents(result: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * result[key]:.0f} %" for key in ("busy_frac", "waited_frac", "link_frac"))
