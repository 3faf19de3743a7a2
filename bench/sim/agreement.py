# SPDX-License-Identifier: Apache-2.0
"""Does the simulator say what a real server then does? One trace, played and simulated, at several rates.

The trace is played against `tokenpool serve` as bench/serve_trace.py does it: on one host, and on a cluster of two
hosts, each with a device of that size and all models, between which the frontend's router chooses. After each play
the server tells what it has learnt: the coefficients of step and copy times of each model, its loop's overhead, and
the mean time of a step.
The simulator gets these, the same requests and the same turn policy, and nothing of what was on time. The learnt
coefficients say what steps usually take, without the stalls of a busy machine; so the simulation is run once with them,
and again with all times scaled by the ratio of the mean steps, real and simulated.

    agreement_max_points   largest difference of token attainment, in points of percent, over all plays
    agreement_req_points   the same of whole requests

Where hosts have learnt different coefficients of a model, the mean is taken, by their steps. Not modelled: the client
and the frontend, whose time is in that of tokens here, and the jitter of steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
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
from tokenpool.sim.result import SimResult
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

_TIMES = tuple(name for name in ModelCosts._fields if name.endswith("_s"))


@dataclass(frozen=True, slots=True)
class Pair:
    """One rate, real and simulated; shares in percent."""

    policy: str
    hosts: int
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
    hosts: Sequence[int],
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
    """Play and simulate the trace at all rates under all policies, on all numbers of hosts."""
    lengths = {"input_len": (32, 128), "output_len": (16, 96)}
    made = (
        traces.read(trace)
        if trace
        else traces.generate(seed=seed, models=models, requests=requests, skew=1.0, **lengths)
    )
    slo, pairs = SLO(ttft_s, tpot_s), []
    with common.scratch(logs) as (folder, log_folder, _):
        setup = pool_under_test.prepare(folder, made, weight_mib, device_frac, kv_mib, slo, None)
        for policy, num_hosts in product(policies, hosts):
            log = log_folder / f"{policy}_{num_hosts}.log"
            with _server(setup, policy, log, start_limit_s, num_hosts) as server:
                for number, rate in enumerate(sorted(rates)):
                    at_rate = traces.at_rate(made, rate)
                    play = _Play(server, setup, policy, num_hosts, drain_s)
                    pairs.append(play.pair(rate, at_rate, seed * 1000 + number))
                    common.progress(str(pairs[-1]).partition(", costs")[0])
    return Agreement(
        agreement_max_points=max(abs(pair.real_token_pct - pair.sim_token_pct) for pair in pairs),
        agreement_req_points=max(abs(pair.real_request_pct - pair.sim_request_pct) for pair in pairs),
        better={"points": "lower"},
        pool=setup.describe(),
        pairs=pairs,
    )


def _server(
    setup: Setup, policy: str, log: Path, start_limit_s: float, num_hosts: int
) -> AbstractContextManager[common.Server]:
    if num_hosts == 1:
        return pool_under_test.serve(setup, policy, log, start_limit_s)
    return pool_under_test.serve_on_hosts(setup, policy, log, start_limit_s, num_hosts)


@dataclass(frozen=True, slots=True)
class _Play:
    """A server, and what it is simulated as."""

    server: common.Server
    setup: Setup
    policy: str
    num_hosts: int
    drain_s: float

    def pair(self, rate: float, trace: Sequence[TracedRequest], seed: int) -> Pair:
        """Play and simulate the trace."""
        server = self.server
        before = pool_under_test.host_numbers(server)
        outcomes = trace_client.replay(server.port, trace, seed=seed, drain_s=self.drain_s)
        trace_client.wait_until_idle(server.port)
        after = pool_under_test.host_numbers(server)
        states = pool_under_test.host_states(server)
        grown = {key: after[key] - before.get(key, 0) for key in ("steps", "step_seconds", "loop_overhead_s", "loops")}
        overhead_s = grown["loop_overhead_s"] / max(1, grown["loops"])
        costs = learnt_costs(states, overhead_s)
        links = [state["copy_costs"]["coefficients"]["to_device"][1] for state in states]
        link_bytes_per_s = sum(links) / len(links)
        usual = self._simulate(trace, costs, link_bytes_per_s)
        step_s = grown["step_seconds"] / max(1, grown["steps"]) + overhead_s
        stalls = step_s * usual.steps / (usual.busy_frac * usual.end_s * self.num_hosts)
        costs = {name: _scaled(cost, stalls) for name, cost in costs.items()}
        result = self._simulate(trace, costs, link_bytes_per_s)
        shares = attainments(outcome.record(self.setup.slo) for outcome in outcomes)
        first = sorted(outcome.ttft_s() for outcome in outcomes if outcome.token_times_s)
        return Pair(
            policy=self.policy,
            hosts=self.num_hosts,
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

    def _simulate(
        self, trace: Sequence[TracedRequest], costs: Mapping[str, ModelCosts], link_bytes_per_s: float
    ) -> SimResult:
        return simulate(trace, self.setup, costs, link_bytes_per_s, self.policy, self.drain_s, self.num_hosts)


def learnt_costs(states: Sequence[Mapping[str, Any]], overhead_s: float) -> dict[str, ModelCosts]:
    """What hosts have learnt of each model, by name; means by the steps that each host ran of it."""
    found = {}
    for name in states[0]["models"]:
        each = [(_costs(state["models"][name], overhead_s), state["models"][name]["steps"]) for state in states]
        total = sum(steps for _, steps in each)
        weights = [steps / total if total else 1 / len(each) for _, steps in each]
        times = {x: sum(w * getattr(c, x) for (c, _), w in zip(each, weights, strict=True)) for x in _TIMES}
        found[name] = each[0][0]._replace(**times)
    return found


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
    return costs._replace(**{name: getattr(costs, name) * factor for name in _TIMES})


def simulate(
    trace: Sequence[TracedRequest],
    setup: Setup,
    costs: Mapping[str, ModelCosts],
    link_bytes_per_s: float,
    policy: str,
    drain_s: float,
    num_hosts: int = 1,
) -> SimResult:
    """The same requests on as many simulated devices of the same memory, behind the frontend's router."""
    requests = [SimRequest(r.arrival_ms / 1e3, r.model, r.input_len, r.output_len) for r in trace]
    scheduler, options = pool_under_test.WITH_OPTIONS.get(policy, (policy, {}))
    spec = DeviceSpec(setup.device_mib << 20, link_bytes_per_s, max_batched_tokens=2048)
    cluster = Cluster(
        [spec] * num_hosts, lambda: load_turn_policy(scheduler, options), FrontendRouter(), costs.__getitem__, setup.slo
    )
    return cluster.run(Workload(requests, {name: name for name in costs}), drain_s=drain_s)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--policies", type=lambda text: text.split(","), default=["slack"], help="default: %(default)s")
    add("--hosts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2], help="default: %(default)s")
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
