# SPDX-License-Identifier: Apache-2.0
"""The server, the polite tenant and the looking on of the benches of hostile requests."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
from collections import Counter
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bench.parts import common, hostile_wire, sized_models
from bench.parts.hostile_arms import KEYS, Attack, Nothing
from bench.parts.hostile_bodies import EMBED, MODEL
from bench.parts.hostile_seen import Seen
from bench.parts.hostile_wire import Tally
from bench.tenant_fairness import arrivals
from tokenpool.cli.bench import client as bench_client
from tokenpool.cli.bench.client import BenchRequest, Outcome
from tokenpool.tenant_config import hash_key

POLITE, POLITE_KEY, ADMIN_KEY = "polite", "polite-key-0123456789", "hostile-admin-01234"
_SAMPLE_S = 5.0
_DRAIN_S = 180.0


def serve(folder: Path, logs: Path, weight_mib: float, dtype: str) -> common.Server:
    paths = sized_models.make_all(folder, {MODEL: weight_mib})
    embed = common.make_models(folder, ["embed"])["embed-0"]
    flags = [*common.MODEL_FLAGS[2:], f"--dtype={dtype}"]
    tenants: list[dict[str, Any]] = [
        {"name": POLITE, "keys": hash_key(POLITE_KEY)},
        {"name": "odd", "keys": hash_key(KEYS.odd), "requests_per_minute": 6_000, "max_concurrent": 16},
        {
            "name": "greedy", "keys": hash_key(KEYS.greedy),
            "requests_per_minute": 120, "tokens_per_minute": 3_000, "max_concurrent": 2,
        },
    ]  # fmt: skip
    pool = {
        "models": [
            {"name": MODEL, "model": str(paths[MODEL]), "args": ["--max-model-len=2048", "--max-num-seqs=16", *flags]},
            {"name": EMBED, "model": str(embed), "args": ["--max-model-len=512", "--runner=pooling", *flags]},
        ],
        "device_memory": "512MiB",
        "page_size": "1MiB",
        "admin_key": ADMIN_KEY,
        "view_key": KEYS.view,
        "metrics_key": KEYS.metrics,
        "tenants": tenants,
    }
    pool_file = folder / "pool.yaml"
    pool_file.write_text(json.dumps(pool))  # JSON is YAML
    env = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    return common.Server([*common.POOL, str(pool_file)], [MODEL, EMBED], logs / "hostile.log", **env)


def requests(draw: random.Random, duration_s: float, rate: float, lengths: tuple[int, int]) -> list[BenchRequest]:
    """Poisson arrivals of the polite tenant, the same in all arms of a round; at least one."""
    return [BenchRequest(at, MODEL, *lengths, POLITE) for at in (0.0, *arrivals(draw, rate, duration_s))]


async def watched(
    port: int, trace: list[BenchRequest], seed: int, elsewhere: Executor, attack: Attack, seen: Seen, arm: str
) -> tuple[list[Outcome], Tally]:
    """Play one arm and look at the server all the while."""
    before = await asyncio.to_thread(seen.look)

    async def sample() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            await asyncio.to_thread(seen.look)

    sampling = asyncio.create_task(sample())
    try:
        return await play(port, trace, seed, elsewhere, attack)
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        seen.count(arm, before, await asyncio.to_thread(seen.look))


async def play(
    port: int, trace: list[BenchRequest], seed: int, elsewhere: Executor, attack: Attack
) -> tuple[list[Outcome], Tally]:
    """Send the polite tenant's requests beside an attack; wait until all is over."""
    url = f"http://127.0.0.1:{port}"
    await asyncio.wrap_future(elsewhere.submit(Nothing()))  # its process is up
    sent = asyncio.wrap_future(elsewhere.submit(attack))
    outcomes = await bench_client.replay(url, trace, seed=seed, drain_s=_DRAIN_S, keys={POLITE: POLITE_KEY})
    tally = await sent
    await bench_client.wait_until_idle(url, _DRAIN_S, KEYS.metrics)
    return outcomes, tally


def used(server: common.Server) -> Counter[str]:
    """Tokens of the engine that the tenants beside the polite one have had so far."""
    used: Counter[str] = Counter()
    for name, told in server.get("/v1/pool/tenants", key=KEYS.view, limit_s=60.0)["tenants"].items():
        for usage in told["usage"].values() if name != POLITE else ():
            used.update(usage)
    return used


def start_sink(stack: ExitStack) -> int:
    """Start a process that refuses all; returns its port."""
    spawn = multiprocessing.get_context("spawn")
    told, tells = spawn.Pipe(duplex=False)
    process = spawn.Process(target=hostile_wire.serve_refusals, args=(tells,), daemon=True)
    process.start()
    stack.callback(process.kill)
    return int(told.recv())


def pids(server: common.Server) -> tuple[int, int]:
    """Frontend and engine host."""
    return server.process.pid, server.get("/v1/pool/state", key=ADMIN_KEY)["host_pid"]


def is_alive(server: common.Server, before: tuple[int, int], lengths: tuple[int, int]) -> int:
    if server.process.poll() is not None:
        return 0
    trace = [BenchRequest(0.0, MODEL, *lengths, POLITE)]
    keys, url = {POLITE: POLITE_KEY}, f"http://127.0.0.1:{server.port}"
    outcomes = asyncio.run(bench_client.replay(url, trace, seed=-2, drain_s=_DRAIN_S, keys=keys))
    with suppress(OSError, TimeoutError):
        asyncio.run(bench_client.wait_until_idle(url, _DRAIN_S, KEYS.metrics))
        server.get("/v1/pool/check", key=ADMIN_KEY, body={}, limit_s=60)
        return int(pids(server) == before and not outcomes[0].problem)
    return 0
