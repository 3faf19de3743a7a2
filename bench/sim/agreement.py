# SPDX-License-Identifier: Apache-2.0
"""Does the simulator say what a real server then does? One trace, played and simulated, at several rates.

The trace is played against `tokenpool serve` as bench/serve_trace.py does it. After each play the server tells what
it has learnt: the coefficients of step and copy times of each model, its loop's overhead, and the mean time of a step.
The simulator gets these, the same requests and the same turn policy, and nothing of what was on time. The learnt
coefficients say what steps usually take, without the stalls of a busy machine; so the simulation is run once with them,
and again with all times scaled by the ratio of the mean steps, real and simulated.

    agreement_max_points   largest difference of token attainment, in points of percent, over all rates
    agreement_req_points   the same of whole requests

Not modelled: the client and the frontend, whose time is in that of tokens here, and the jitter of steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common, pool_under_test, trace_client, traces
from bench.parts.pool_under_test import Setup
from bench.parts.traces import TracedRequest
from tokenpool.config import SLO
from tokenpool.policy.slo import attainments
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload


@dataclass(frozen=True, slots=True)
class Pair:
    """One rate, real and simulated; shares in percent."""

    policy: str
    rate: float
    real_token_pct: float
    sim_token_pct: float
    usual_token_pct: float
    """Simulated with the learnt coefficients as they are."""
    real_request_pct: float
    sim_request_pct: float
    real_ttft_p50_s: float
    sim_ttft_p50_s: float
    step_ms: float
    """Mean, with what the host's loop adds."""
    stalls: float
    """Ratio of the mean steps, real and simulated with the learnt coefficients."""
    overhead_ms: float
    """Of the host's loop, per step."""
    costs: Mapping[str, Mapping[str, float]]
    """What the simulator was given, by model."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Results; see the module."""

    agreement_max_points: float
    agreement_req_points: float
    better: Mapping[str, str]
    pool: Mapping[str, Any]
    pairs: Sequence[Pair]


def run(
    *,
    policies: Sequence[str],
    rates: Sequence[float],
    trace: Path | None,
    models: int,
    requests: int,
    weight_mib: Sequence[float],
    device_frac: float,
    kv_mib: int,
    ttft_s: float,
    tpot_s: float,
    drain_s: float,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> Agreement:
    """Play and simulate the trace at all rates under all policies."""
    lengths = {"input_len": (32, 128), "output_len": (16, 96)}
    made = (
        traces.read(trace)
        if trace
        else traces.generate(seed=seed, models=models, requests=requests, skew=1.0, **lengths)
    )
    slo, pairs = SLO(ttft_s, tpot_s), []
    with common.scratch(logs) as (folder, log_folder, _):
        setup = pool_under_test.prepare(folder, made, weight_mib, device_frac, kv_mib, slo, None)
        for policy in policies:
            with pool_under_test.serve(setup, policy, log_folder / f"{policy}.log", start_limit_s) as server:
                for number, rate in enumerate(sorted(rates)):
                    at_rate = traces.at_rate(made, rate)
                    pairs.append(_pair(server, setup, policy, rate, at_rate, seed * 1000 + number, drain_s))
                    common.progress(str(pairs[-1]).partition(", costs")[0])
    return Agreement(
        agreement_max_points=max(abs(pair.real_token_pct - pair.sim_token_pct) for pair in pairs),
        agreement_req_points=max(abs(pair.real_request_pct - pair.sim_request_pct) for pair in pairs),
        better={"points": "lower"},
        pool=setup.describe(),
        pairs=pairs,
    )


def _pair(
    server: common.Server,
    setup: Setup,
    policy: str,
    rate: float,
    trace: Sequence[TracedRequest],
    seed: int,
    drain_s: float,
) -> Pair:
    before = pool_under_test.host_numbers(server)
    outcomes = trace_client.replay(server.port, trace, seed=seed, drain_s=drain_s)
    trace_client.wait_until_idle(server.port)
    after = pool_under_test.host_numbers(server)
    state = server.get("/v1/pool/state", key=pool_under_test.ADMIN_KEY)["host"]
    grown = {key: after[key] - before.get(key, 0) for key in ("steps", "step_seconds", "loop_overhead_s", "loops")}
    overhead_s = grown["loop_overhead_s"] / max(1, grown["loops"])
    costs = {name: _costs(model, overhead_s) for name, model in state["models"].items()}
    link_bytes_per_s = state["copy_costs"]["coefficients"]["to_device"][1]
    usual = simulate(trace, setup, costs, link_bytes_per_s, policy, drain_s)
    step_s = grown["step_seconds"] / max(1, grown["steps"]) + overhead_s
    stalls = step_s * usual.steps / (usual.busy_frac * usual.end_s)
    costs = {name: _scaled(cost, stalls) for name, cost in costs.items()}
    result = simulate(trace, setup, costs, link_bytes_per_s, policy, drain_s)
    shares = attainments(outcome.record(setup.slo) for outcome in outcomes)
    first = sorted(outcome.ttft_s() for outcome in outcomes if outcome.token_times_s)
    return Pair(
        policy=policy,
        rate=rate,
        real_token_pct=100 * shares.token,
        sim_token_pct=100 * result.token_attainment,
        usual_token_pct=100 * usual.token_attainment,
        real_request_pct=100 * shares.request,
        sim_request_pct=100 * result.request_attainment,
        real_ttft_p50_s=first[len(first) // 2],
        sim_ttft_p50_s=result.ttft_s(50),
        step_ms=1e3 * step_s,
        stalls=stalls,
        overhead_ms=1e3 * overhead_s,
        costs={name: cost._asdict() for name, cost in costs.items()},
    )


def _costs(model: Mapping[str, Any], overhead_s: float) -> ModelCosts:
    fitted = model["costs"]["coefficients"]
    return ModelCosts(
        weight_bytes=model["weight_bytes"],
        kv_bytes_per_token=model["kv_block_bytes"] / 32,  # --block-size of the models under test
        prefill_s=fitted["prefill_s"] + overhead_s,
        prefill_per_token_s=fitted["prefill_per_token_s"],
        prefill_per_token2_s=0.0,
        step_s=fitted["step_s"] + overhead_s,
        step_per_request_s=fitted["step_per_request_s"],
        step_per_token_s=fitted["step_per_token_s"],
    )


def _scaled(costs: ModelCosts, factor: float) -> ModelCosts:
    times = [name for name in ModelCosts._fields if name.endswith("_s")]
    return costs._replace(**{name: getattr(costs, name) * factor for name in times})


def simulate(
    trace: Sequence[TracedRequest],
    setup: Setup,
    costs: Mapping[str, ModelCosts],
    link_bytes_per_s: float,
    policy: str,
    drain_s: float,
):
    """The same requests on one simulated device of the same memory."""
    requests = [SimRequest(r.arrival_ms / 1e3, r.model, r.input_len, r.output_len) for r in trace]
    scheduler, options = pool_under_test.WITH_OPTIONS.get(policy, (policy, {}))
    spec = DeviceSpec(setup.device_mib << 20, link_bytes_per_s, max_batched_tokens=2048)
    cluster = Cluster(
        [spec], lambda: load_turn_policy(scheduler, options), FrontendRouter(), costs.__getitem__, setup.slo
    )
    return cluster.run(Workload(requests, {name: name for name in costs}), drain_s=drain_s)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--policies", type=lambda text: text.split(","), default=["slack"], help="default: %(default)s")
    add("--rates", type=_numbers, default=[3, 6, 8], help="per second (default: %(default)s)")
    add("--trace", type=Path, help="CSV arrival_ms,model,input_len,output_len, in place of a generated one")
    add("--models", type=int, default=12, help="of a generated trace (default: %(default)s)")
    add("--requests", type=int, default=150, help="of a generated trace (default: %(default)s)")
    add("--weight-mib", type=_numbers, default=[16, 32, 64], help="of the models in turn (default: %(default)s)")
    add("--device-frac", type=float, default=1 / 3, help="share of all weights that fits (default: 1/3)")
    add("--kv-mib", type=int, default=96, help="device memory beside that (default: %(default)s)")
    add("--ttft-s", type=float, default=1.0, help="SLO (default: %(default)s)")
    add("--tpot-s", type=float, default=0.1, help="SLO (default: %(default)s)")
    add("--drain-s", type=float, default=10.0, help="wait after the last arrival (default: %(default)s)")
    flags = parser.parse_args()
    common.report("sim_agreement", run, flags, ["agreement_max_points", "agreement_req_points"])


if __name__ == "__main__":
    main()
