# SPDX-License-Identifier: Apache-2.0
"""What a tenant that floods a model does to the time to first token of another tenant that uses it as before.

The polite tenant sends the same open-loop trace in every arm; a second tenant does what the arm says:

    alone         it sends nothing
    again         it sends nothing, once more: how far two equal arms are apart is the noise
    neighbour     it sends what its limit allows
    limited       it sends --flood times as much; what is over its limits is refused. It has used up the requests of a
                  minute that a tenant may send at once after a pause, so as much gets through as in `neighbour`
    fair          the same flood from a tenant without limits: only fair shares help
    unprotected   the same flood in a pool without tenants: first come, first served

    change_X_pct              by how much the polite tenant's p99 TTFT in arm X is above that in `alone`
    change_by_flooding_pct    `limited` against `neighbour`: what breaking its limit gains or spoils

The arms are played in turn, in rounds, on two servers that are idle otherwise; percentiles are over all rounds, and
`per_round` tells how far the rounds are apart. The second tenant is a process of its own that yields the cores to all
others, as if it were on another machine; frontend and engine share them, so the frontend's work for refused requests is
in the times. One model, one size of prompt: with long prompts of others in a step before its own,
a first token comes later by up to that step, whatever the queue does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, sized_models
from tokenpool.cli.bench import client as bench_client
from tokenpool.cli.bench.client import BenchRequest, Outcome, counts
from tokenpool.cli.bench.report import summary
from tokenpool.config import SLO
from tokenpool.tenant_config import hash_key

MODEL = "shared"
KEYS = {name: f"{name}-key-0123456789" for name in ("polite", "other", "free")}
ADMIN_KEY = "bench-admin-0123456"
ARMS = {
    "alone": ("tenants", ""),
    "again": ("tenants", ""),
    "neighbour": ("tenants", "other"),
    "limited": ("tenants", "other"),
    "fair": ("tenants", "free"),
    "unprotected": ("unprotected", "other"),
}
"""Which server each arm uses, and who the second tenant is there."""
DRAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class TenantFairness:
    """Results; see the module."""

    change_by_flooding_pct: float
    change_limited_pct: float
    change_fair_pct: float
    change_unprotected_pct: float
    change_neighbour_pct: float
    change_again_pct: float
    """The noise."""
    better: dict[str, str]
    ttft_p99_ms: dict[str, float]
    ttft_p90_ms: dict[str, float]
    ttft_p50_ms: dict[str, float]
    per_round: dict[str, list[float]]
    """p99 TTFT in ms of the polite tenant in each round."""
    arms: dict[str, dict[str, Any]]
    """Summary of each tenant's requests in each arm."""


def run(
    *,
    weight_mib: float,
    dtype: str,
    rounds: int,
    duration_s: float,
    rate: float,
    limit: int,
    max_concurrent: int,
    max_num_seqs: int,
    flood: float,
    input_len: int,
    output_len: int,
    slo: Sequence[float],
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> TenantFairness:
    """Play all arms `rounds` times."""
    played: dict[str, list[list[Outcome]]] = {arm: [] for arm in ARMS}
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = sized_models.make_all(folder, {MODEL: weight_mib})
        servers = {}
        for name in ("tenants", "unprotected"):
            pool_file = folder / f"{name}.yaml"
            engine = {"max_num_seqs": max_num_seqs, "dtype": dtype}
            pool = _pool(paths[MODEL], name, limit, max_concurrent, engine)
            pool_file.write_text(json.dumps(pool))  # JSON is YAML
            servers[name] = common.Server([*common.POOL, str(pool_file)], [MODEL], log_folder / f"{name}.log")
            stack.callback(servers[name].close)
        wait_until_ready(list(servers.values()), start_limit_s)
        elsewhere = stack.enter_context(yielding_process())
        for number in range(-1, rounds):  # the first one warms up
            # Half of the rounds go the other way round, so that no arm always follows a flood.
            for arm, (name, second) in list(ARMS.items())[:: 1 if number % 2 else -1]:
                per_s = 0.0 if not second else limit / 60 * (1 if arm == "neighbour" else flood)
                requests = _requests(second, number, duration_s, rate, per_s, (input_len, output_len), seed)
                if arm == "limited":
                    asyncio.run(_use_up(servers[name].port, second))
                outcomes = asyncio.run(_play(servers[name].port, requests, seed * 1000 + number, elsewhere))
                if number >= 0:
                    played[arm].append(outcomes)
                    p99 = _ttft_ms([outcomes])
                    others = counts([o for o in outcomes if o.request.tenant != "polite"], by_kind=True)
                    common.progress(f"round {number} {arm}: polite p99 TTFT {p99:.1f} ms, the other {others}")
    p99 = {arm: _ttft_ms(runs) for arm, runs in played.items()}

    def change(arm: str, base: str = "alone") -> float:
        return 100 * (p99[arm] / p99[base] - 1)

    return TenantFairness(
        change_by_flooding_pct=change("limited", "neighbour"),
        change_limited_pct=change("limited"),
        change_fair_pct=change("fair"),
        change_unprotected_pct=change("unprotected"),
        change_neighbour_pct=change("neighbour"),
        change_again_pct=change("again"),
        better={"pct": "lower"},
        ttft_p99_ms=p99,
        ttft_p90_ms={arm: _ttft_ms(runs, 90) for arm, runs in played.items()},
        ttft_p50_ms={arm: _ttft_ms(runs, 50) for arm, runs in played.items()},
        per_round={arm: [_ttft_ms([outcomes]) for outcomes in runs] for arm, runs in played.items()},
        arms={arm: _summaries(runs, SLO(*slo), duration_s) for arm, runs in played.items()},
    )


def yielding_process() -> ProcessPoolExecutor:
    """A process of its own that yields the cores to all others, as if it were on another machine."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(19,))


def wait_until_ready(servers: Sequence[common.Server], limit_s: float) -> None:
    """By the probe, which asks for no key; raises TimeoutError, and RuntimeError when a server has ended."""
    end_s = time.monotonic() + limit_s
    for server in servers:
        while True:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended, see {server.log}")
            with contextlib.suppress(OSError):  # 503 while it loads
                server.get("/ready?all=1")
                break
            if time.monotonic() > end_s:
                raise TimeoutError(f"not ready after {limit_s:g} s, see {server.log}")
            time.sleep(0.2)
    common.progress("servers are ready")


def _pool(path: Path, server: str, limit: int, max_concurrent: int, engine: dict[str, Any]) -> dict[str, Any]:
    flags = ["--max-model-len", "2048", *common.MODEL_FLAGS[2:]]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in engine.items()]
    pool = {
        "models": [{"name": MODEL, "model": str(path), "args": flags}],
        "device_memory": "512MiB",
        "page_size": "1MiB",
        "api_key": list(KEYS.values()),
        "admin_key": ADMIN_KEY,
        "admission": {"max_waiting": None},
    }
    if server == "unprotected":
        return pool
    del pool["api_key"]
    tenants = [{"name": name, "keys": hash_key(key)} for name, key in KEYS.items()]
    tenants[1] |= {"requests_per_minute": limit, "max_concurrent": max_concurrent}
    return pool | {"tenants": tenants}


def _requests(
    second: str,
    number: int,
    duration_s: float,
    rate: float,
    second_rate: float,
    lengths: tuple[int, int],
    seed: int,
) -> list[BenchRequest]:
    """Poisson arrivals of the polite tenant, the same in all arms of a round, and those of the second one."""
    requests = []
    for tenant, per_s in (("polite", rate), (second, second_rate)):
        rng = random.Random(f"{seed} {number} {tenant == 'polite'}")
        requests += [BenchRequest(at, MODEL, *lengths, tenant) for at in arrivals(rng, per_s, duration_s)]
    return sorted(requests)


def arrivals(rng: random.Random, rate: float, duration_s: float) -> list[float]:
    """Seconds at which requests come at random, `rate` per second; none at a rate of 0."""
    times: list[float] = []
    while rate and (at := (times[-1] if times else 0.0) + rng.expovariate(rate)) < duration_s:
        times.append(at)
    return times


async def _play(port: int, requests: list[BenchRequest], seed: int, elsewhere: Executor) -> list[Outcome]:
    """Send each tenant's requests, the second one's from the process `elsewhere`."""
    url = f"http://127.0.0.1:{port}"
    polite = [request for request in requests if request.tenant == "polite"]
    others = [request for request in requests if request.tenant != "polite"]
    await asyncio.wrap_future(elsewhere.submit(_replay, url, [], seed))  # it is up
    sent = asyncio.wrap_future(elsewhere.submit(_replay, url, others, seed))
    outcomes = await bench_client.replay(url, polite, seed=seed, drain_s=DRAIN_S, keys=KEYS)
    outcomes += await sent
    await bench_client.wait_until_idle(url, DRAIN_S, KEYS["polite"])
    return outcomes


def _replay(url: str, requests: list[BenchRequest], seed: int) -> list[Outcome]:
    if not requests:
        return []
    other_prompts = -1 - seed
    return asyncio.run(bench_client.replay(url, requests, seed=other_prompts, drain_s=DRAIN_S, keys=KEYS))


async def _use_up(port: int, tenant: str) -> None:
    """Send one request after the other until the tenant is over its requests per minute."""
    body = {"model": MODEL, "prompt": [1], "max_tokens": 1}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEYS[tenant]}"}) as session:
        for _ in range(10_000):
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                if answer.status == 429:
                    return
                answer.raise_for_status()
    raise RuntimeError(f"tenant {tenant} is not limited")


def _ttft_ms(runs: list[list[Outcome]], percent: int = 99) -> float:
    """A percentile of the polite tenant's times to the first token; a request without a token counts as endless."""
    ttfts = [o.ttft_s() for outcomes in runs for o in outcomes if o.request.tenant == "polite"]
    return 1e3 * float(np.percentile([np.inf if ttft is None else ttft for ttft in ttfts], percent))


def _summaries(runs: list[list[Outcome]], slo: SLO, duration_s: float) -> dict[str, Any]:
    found = {}
    for tenant in KEYS:
        outcomes = [o for outcomes in runs for o in outcomes if o.request.tenant == tenant]
        if outcomes:
            found[tenant] = summary(outcomes, slo, duration_s * len(runs))
    return found


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--weight-mib", type=float, default=32, help="of the model (default: %(default)s)")
    add("--dtype", default="bfloat16", help="of the model; float32 is faster without AVX-512 (default: %(default)s)")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--duration-s", type=float, default=15.0, help="of an arm in a round (default: %(default)s)")
    add("--rate", type=float, default=8.0, help="of the polite tenant, per second (default: %(default)s)")
    add("--limit", type=int, default=120, help="requests per minute of the other one (default: %(default)s)")
    add("--max-concurrent", type=int, default=2, help="requests at once of the other one (default: %(default)s)")
    add("--max-num-seqs", type=int, default=16, help="requests that run at a time (default: %(default)s)")
    add("--flood", type=float, default=20.0, help="times the limit that a flood is (default: %(default)s)")
    add("--input-len", type=int, default=64, help="prompt tokens (default: %(default)s)")
    add("--output-len", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    add("--slo", type=float, nargs=2, default=[0.5, 0.1], help="ttft and tpot in seconds (default: %(default)s)")
    flags = parser.parse_args()
    keys = ["change_by_flooding_pct", "change_limited_pct", "change_fair_pct", "change_unprotected_pct"]
    keys.append("change_again_pct")
    common.report("tenant_fairness", run, flags, keys)


if __name__ == "__main__":
    main()
