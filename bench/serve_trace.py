# SPDX-License-Identifier: Apache-2.0
"""How much traffic for more models than the device holds is served on time, by turn policy.

One open-loop trace over many models, played at several rates against `tokenpool serve` with movable weights and device
memory for a third of them. The same requests come at every rate, only faster, and again until --least-s are filled:
else a high rate would be a short burst. Each policy has a server of its own; the rates follow one another on it, from
idle to idle.

Without --rates the limit of each policy is looked for, whatever the machine: from --first-rate the rate is doubled as
long as 90 % of the tokens are on time, or halved until they are; then the gap is halved --halvings times. Policies may
be played at different rates then.

    rate90_POLICY   requests per second up to which at least 90 % of all tokens come by their due time, which is
                    arrival + ttft + i * tpot; interpolated between two rates; 0 if even the lowest is too much. If the
                    highest rate still passes, it is that rate and named in `passed_all`: the limit was not found.

The other two shares of pooling/policy/slo.py, times to the first token, switches and bytes are in the JSON.

Timer boundaries. Arrivals are those of the trace: when the client sends late (`send_lag_p99_s`), the server gets no
time for it. A token counts when the client has read the event that brings it, so sockets, the frontend and the client
are in the times; all share the cores with the host. Requests that fail, or have not ended --drain-s after the last
arrival, miss all tokens that they did not get. In ttft, a request without a token counts with the time that it was
waited for.

Not to be concluded: what a GPU would do. The device is host memory, a copy costs few steps here and dozens there; small
models with tight SLOs stand in for that. A queue that grows without bound at a rate is only seen as far as it grows
while the trace is played. One seed is one trace: small differences mean nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, pool_under_test, trace_client, traces
from bench.parts.trace_client import Outcome
from bench.parts.traces import TracedRequest
from tokenpool.config import SLO
from tokenpool.policy.slo import attainments

GOAL = 0.9
_LEAST_RATE, _MOST_RATE = 1 / 16, 256.0
"""Where the search for a limit ends."""


@dataclass(frozen=True, slots=True)
class Played:
    """The trace at one rate under one policy."""

    policy: str
    rate: float
    seconds: float
    token_attainment: float
    request_attainment: float
    time_weighted_attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tokens: int
    ended: dict[str, int]
    """Requests by how they ended."""
    send_lag_p99_s: float
    """How much later than the trace says the client sent."""
    switches: float
    """Turns handed from one model to another."""
    switches_waited: float
    """Those for which weights or KV had to come in while nothing stepped."""
    switch_s: float
    """Seconds waited for them."""
    evictions: float
    """Of weights."""
    step_ms: float
    """Mean engine step."""
    load_average: float
    """Of the last minute, when the run ended: above 3 or so somebody else uses the cores, and runs do not compare."""
    host: dict[str, float]
    """By how much each number of the host's state grew."""


@dataclass(frozen=True, slots=True)
class ServeTrace:
    """Results; see the module."""

    rate90: dict[str, float]
    passed_all: list[str]
    """Policies under which the highest rate still reached 90 %."""
    better: dict[str, str]
    trace: dict[str, Any]
    pool: dict[str, Any]
    runs: list[Played]
    example: dict[str, Any] | None
    """With --show: the request whose first token was late under request_level and in time under slack."""


def run(
    *,
    policies: Sequence[str],
    rates: Sequence[float] | None,
    first_rate: float,
    halvings: int,
    least_s: float,
    show: float | None,
    trace: Path | None,
    models: int,
    requests: int,
    skew: float,
    input_len: Sequence[int],
    output_len: Sequence[int],
    weight_mib: Sequence[float],
    device_frac: float,
    kv_mib: int,
    link_mib_per_s: float | None,
    ttft_s: float,
    tpot_s: float,
    drain_s: float,
    out: Path,
    png: Path | None,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> ServeTrace:
    """Play the trace under all `policies`, at all `rates` or at those that lead to the limit of each."""
    made = traces.read(trace) if trace else _generate(seed, models, requests, skew, input_len, output_len)
    if trace is None:
        traces.write(out.with_suffix(".csv"), made)
    slo, runs, shown = SLO(ttft_s, tpot_s), [], {}
    with common.scratch(logs) as (folder, log_folder, _):
        setup = pool_under_test.prepare(folder, made, weight_mib, device_frac, kv_mib, slo, link_mib_per_s)
        for policy in policies:
            with pool_under_test.serve(setup, policy, log_folder / f"{policy}.log", start_limit_s) as server:
                seeds = itertools.count(seed * 1000)  # other prompts at each rate: no prefix cache helps

                def share_at(rate: float, policy: str = policy, server: common.Server = server, seeds=seeds) -> float:
                    played, outcomes = _play(
                        server, policy, _trace_at(made, rate, least_s), rate, slo, drain_s, next(seeds)
                    )
                    common.progress(_line(played))
                    runs.append(played)
                    if rate == show:
                        shown[policy] = outcomes
                        _save_trace(server, outcomes, out.with_name(f"{out.stem}_{policy}_trace.json"), slo)
                    return played.token_attainment

                for rate in sorted({*(rates or ()), *([show] if show else ())}):
                    share_at(rate)
                if not rates:
                    find_limit(share_at, GOAL, first_rate, halvings)
                server.get("/v1/pool/check", key=pool_under_test.ADMIN_KEY, body={})
    runs.sort(key=lambda played: (policies.index(played.policy), played.rate))
    curves = {p: [(played.rate, played.token_attainment) for played in runs if played.policy == p] for p in policies}
    if png:
        _plot(runs, policies, png)
    compared = {"request_level", "slack"} <= shown.keys()
    example = find_example(shown["request_level"], shown["slack"], slo) if compared else None
    if compared:
        common.progress(f"late under request_level, in time under slack: {example}")
    return ServeTrace(
        rate90={policy: rate_at(curve, GOAL) for policy, curve in curves.items()},
        passed_all=[policy for policy, curve in curves.items() if curve[-1][1] >= GOAL],
        better={"rate90": "higher", "attainment": "higher", "ttft": "lower"},
        trace=_describe(made, trace),
        pool=setup.describe(),
        runs=runs,
        example=example,
    )


def _generate(
    seed: int, models: int, requests: int, skew: float, input_len: Sequence[int], output_len: Sequence[int]
) -> list[TracedRequest]:
    (in_low, in_high), (out_low, out_high) = input_len, output_len
    return traces.generate(
        seed=seed,
        models=models,
        requests=requests,
        skew=skew,
        input_len=(in_low, in_high),
        output_len=(out_low, out_high),
    )


def _trace_at(made: Sequence[TracedRequest], rate: float, least_s: float) -> list[TracedRequest]:
    return traces.at_rate(traces.at_least(made, math.ceil(rate * least_s)), rate)


def _play(
    server: common.Server,
    policy: str,
    trace: Sequence[TracedRequest],
    rate: float,
    slo: SLO,
    drain_s: float,
    seed: int,
) -> tuple[Played, list[Outcome]]:
    before, start_s = pool_under_test.host_numbers(server), time.time()
    outcomes = trace_client.replay(server.port, trace, seed=seed, drain_s=drain_s)
    end_s = time.time()
    trace_client.wait_until_idle(server.port)
    after = pool_under_test.host_numbers(server)
    grown = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    shares = attainments(outcome.record(slo) for outcome in outcomes)
    ttft_s = [end_s - o.arrival_s if o.ttft_s() is None else o.ttft_s() for o in outcomes]
    return Played(
        policy=policy,
        rate=rate,
        seconds=end_s - start_s,
        token_attainment=shares.token,
        request_attainment=shares.request,
        time_weighted_attainment=shares.time_weighted,
        ttft_p50_s=statistics.median(ttft_s),
        ttft_p99_s=common.percentile(ttft_s, 99),
        tokens=sum(len(outcome.token_times_s) for outcome in outcomes),
        ended=dict(trace_client.counts(outcomes)),
        send_lag_p99_s=common.percentile([max(0.0, o.sent_s - o.arrival_s) for o in outcomes], 99),
        switches=grown.get("switches", 0),
        switches_waited=grown.get("residency.switches", 0),
        switch_s=grown.get("residency.visible_seconds", 0),
        evictions=grown.get("residency.weight_evictions", 0),
        step_ms=grown.get("step_seconds", 0) / max(1, grown.get("steps", 0)) * 1e3,
        load_average=os.getloadavg()[0],
        host=grown,
    ), outcomes


def _line(played: Played) -> str:
    return (
        f"{played.policy} {played.rate:g}/s: on time {played.token_attainment:.1%} of tokens, "
        f"{played.request_attainment:.1%} of requests, first after {played.ttft_p50_s:.2f} s "
        f"(p99 {played.ttft_p99_s:.2f} s), {played.switches:.0f} switches, "
        f"{played.switches_waited:.0f} of them waited for, {played.switch_s:.1f} s, "
        f"steps {played.step_ms:.1f} ms, {played.ended}"
    )


def find_limit(share_at: Callable[[float], float], goal: float, first_rate: float, halvings: int) -> None:
    """Ask for the share at rates that close in on the highest one that reaches `goal`, from both sides.

    The rate is doubled, or halved, from `first_rate` on until the goal lies between two rates, and no further than
    from 1/16 to 256; then the middle of the gap is tried `halvings` times.
    """
    good, bad = 0.0, math.inf
    rate = first_rate
    while not (good and bad < math.inf):
        if share_at(rate) >= goal:
            good, rate = rate, 2 * rate
        else:
            bad, rate = rate, rate / 2
        if not _LEAST_RATE <= rate <= _MOST_RATE:
            return
    for _ in range(halvings):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if share_at(middle) >= goal else (good, middle)


def rate_at(curve: Sequence[tuple[float, float]], goal: float) -> float:
    """The highest rate with at least `goal`, on the lines between (rate, attainment) in the order of rates; else 0."""
    found = 0.0
    for index, (rate, share) in enumerate(curve):
        if share < goal:
            continue
        found = rate
        if index + 1 < len(curve) and curve[index + 1][1] < goal:
            next_rate, next_share = curve[index + 1]
            found += (next_rate - rate) * (share - goal) / (share - next_share)
    return found


def find_example(late: Sequence[Outcome], in_time: Sequence[Outcome], slo: SLO) -> dict[str, Any] | None:
    """Of requests whose first token is late in one run and in time in the other, the one that gains most."""
    found = [
        {
            "request": index,
            "model": a.request.model,
            "arrival_s": a.request.arrival_ms / 1e3,
            "input_len": a.request.input_len,
            "output_len": a.request.output_len,
            "ttft_limit_s": slo.ttft_s,
            "ttft_request_level_s": a.ttft_s(),
            "ttft_slack_s": b.ttft_s(),
        }
        for index, (a, b) in enumerate(zip(late, in_time, strict=True))
        if a.token_times_s and b.token_times_s and a.ttft_s() > slo.ttft_s >= b.ttft_s()
    ]
    return max(found, key=lambda row: row["ttft_request_level_s"] - row["ttft_slack_s"], default=None)


def _save_trace(server: common.Server, outcomes: Sequence[Outcome], path: Path, slo: SLO) -> None:
    """Save what the device did in the run as a Chrome trace, with what the client saw of each request."""
    since_s = time.time() - outcomes[0].arrival_s + 1
    try:
        answer = server.get(f"/v1/pool/trace?seconds={since_s:.0f}s", key=pool_under_test.ADMIN_KEY, limit_s=60)
    except OSError as error:
        common.progress(f"no trace from the server: {error}")
        answer = {"traceEvents": []}
    answer["requests"] = [
        {
            "request": index,
            "model": outcome.request.model,
            "arrival_us": round(outcome.arrival_s * 1e6),
            "first_due_us": round((outcome.arrival_s + slo.ttft_s) * 1e6),
            "first_token_us": round(outcome.token_times_s[0] * 1e6) if outcome.token_times_s else None,
            "last_token_us": round(outcome.token_times_s[-1] * 1e6) if outcome.token_times_s else None,
            "problem": outcome.problem,
        }
        for index, outcome in enumerate(outcomes)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer) + "\n")
    common.progress(f"trace of the run: {path}, {len(answer['traceEvents'])} events")


def _describe(trace: Sequence[TracedRequest], file: Path | None) -> dict[str, Any]:
    per_model: dict[str, int] = {}
    for request in trace:
        per_model[request.model] = per_model.get(request.model, 0) + 1
    return {
        "file": str(file) if file else None,
        "requests": len(trace),
        "input_tokens": sum(request.input_len for request in trace),
        "output_tokens": sum(request.output_len for request in trace),
        "requests_per_model": dict(sorted(per_model.items())),
    }


def _plot(runs: Sequence[Played], policies: Sequence[str], path: Path) -> None:
    """Draw the three shares over the rate, one line per policy; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        common.progress("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {"token": "tokens on time", "request": "requests on time", "time_weighted": "time-weighted"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axis, (share, title) in zip(axes, shares.items(), strict=True):
        for policy in policies:
            points = [(p.rate, 100 * getattr(p, f"{share}_attainment")) for p in runs if p.policy == policy]
            axis.plot(*zip(*points, strict=True), marker="o", label=policy)
        axis.axhline(100 * GOAL, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="requests per second", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("%")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    names = ["slack", "aegaeon", "request_level", "round_robin"]
    add("--policies", type=lambda text: text.split(","), default=names, help="default: %(default)s")
    add("--rates", type=_numbers, help="per second (default: those that lead to the limit of each policy)")
    add("--first-rate", type=float, default=2.0, help="where the search for a limit begins (default: %(default)s)")
    add("--halvings", type=int, default=2, help="of the gap around a limit (default: %(default)s)")
    add("--least-s", type=float, default=20.0, help="the trace is repeated to last so long (default: %(default)s)")
    add("--show", type=float, help="save the device's trace and compare requests at this rate, which is played too")
    add("--trace", type=Path, help="CSV arrival_ms,model,input_len,output_len, in place of a generated one")
    add("--models", type=int, default=12, help="of a generated trace (default: %(default)s)")
    add("--requests", type=int, default=50, help="of a generated trace (default: %(default)s)")
    add("--skew", type=float, default=1.0, help="of the models' popularity, 0 = all alike (default: %(default)s)")
    add("--input-len", type=int, nargs=2, default=[32, 128], help="shortest and longest (default: %(default)s)")
    add("--output-len", type=int, nargs=2, default=[16, 96], help="shortest and longest (default: %(default)s)")
    add("--weight-mib", type=_numbers, default=[16, 32, 64], help="of the models in turn (default: %(default)s)")
    add("--device-frac", type=float, default=1 / 3, help="share of all weights that fits (default: 1/3)")
    add("--kv-mib", type=int, default=96, help="device memory beside that (default: %(default)s)")
    add("--link-mib-per-s", type=float, help="hold copies to this speed, as a slower bus would (default: memory speed)")
    add("--ttft-s", type=float, default=1.0, help="SLO (default: %(default)s)")
    add("--tpot-s", type=float, default=0.1, help="SLO (default: %(default)s)")
    add("--drain-s", type=float, default=10.0, help="wait after the last arrival (default: %(default)s)")
    add("--png", type=Path, help="draw attainment over rate into this file")
    flags = parser.parse_args()
    flags.out = flags.json or Path("serve_trace.json")
    common.report("serve_trace", run, flags, [f"rate90_{name}" for name in flags.policies])


if __name__ == "__main__":
    main()
