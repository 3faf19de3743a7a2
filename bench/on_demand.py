# SPDX-License-Identifier: Apache-2.0
"""A catalogue of models of which few are loaded at a time: how soon does it answer, and what does a cold model cost?

    python bench/on_demand.py --models 1000 --json bench/results/on_demand_cpu.json

One server on this machine whose models are all loaded on demand, at most --max-loaded at a time. Their names are many,
their checkpoints a few tiny ones. Requests stream a few tokens each; whom they are for is drawn by Zipf's law, and they
come from --users at a time, each of which waits for its answer, until --requests were sent or --minutes are over. A
second server with one model is started before, to know what a frontend takes without a catalogue.

    start_to_first_answer_s     from the start of the process to the end of the first answer, whose model was cold
    cold_first_token_s          median, of the first request to each model
    warm_first_token_s          median, of all others; some of their models were cold again, too
    frontend_kb_per_cold_model  growth of the frontend's own memory (PSS of no file) per model, before any request
    loads                       models that were loaded
    requests, lost              requests sent, and those without all their tokens
    memory_growth               frontend and host at the end, over what they took after a third of the time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import yaml

from bench.parts import common

_KINDS = ("llama", "qwen2", "qwen3", "gemma3")
_KEY = "on-demand-view-0123456"
_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip
_TOKENS = 4
_REQUEST_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class OnDemand:
    """See the module."""

    start_to_first_answer_s: float
    cold_first_token_s: float
    warm_first_token_s: float
    frontend_kb_per_cold_model: float
    loads: int
    requests: int
    lost: int
    memory_growth: float
    cold_first_token_p99_s: float
    memory_bytes: list[int]
    """Of frontend and host together (PSS), at the end of each tenth of the requests or of the time."""
    failures: list[str]
    """What the first lost ones said."""


def run(
    *, models: int, requests: int, minutes: float, max_loaded: int, users: int, zipf: float, seed: int,
    start_limit_s: float, logs: Path | None,
) -> OnDemand:  # fmt: skip
    """Measure; see the module."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = list(common.make_models(folder, _KINDS).values())
        memory: dict[int, int] = {}
        for count in (1, models):
            pool_file = _write_pool_file(folder / f"pool-{count}.yaml", paths, count, max_loaded)
            names = [f"m{i}" for i in range(count)]
            server = common.Server([*common.POOL, str(pool_file)], names, log_folder / f"server-{count}.log", **_ENV)
            stack.callback(server.close)
            _wait_until(server, start_limit_s)
            memory[count] = common.memory_of([server.process.pid])["pss_anon"]
            if count != models:
                server.close()
        asyncio.run(_first_answer(server.port, "m0", start_limit_s))
        start_s = time.monotonic() - server.started_s
        trace = _Trace(server, random.Random(seed), models, requests, minutes * 60, zipf)
        asyncio.run(trace.play(users))
        loads = next(
            int(float(line.split()[-1]))
            for line in _text(server, "/metrics").splitlines()
            if line.startswith("tokenpool:demand_loads_total")
        )
    third = trace.memory[len(trace.memory) // 3]
    return OnDemand(
        start_to_first_answer_s=start_s,
        cold_first_token_s=statistics.median(trace.cold_s),
        warm_first_token_s=statistics.median(trace.warm_s),
        frontend_kb_per_cold_model=(memory[models] - memory[1]) / 1024 / (models - 1),
        loads=loads,
        requests=trace.sent,
        lost=len(trace.failures),
        memory_growth=trace.memory[-1] / third,
        cold_first_token_p99_s=common.percentile(trace.cold_s, 99),
        memory_bytes=trace.memory,
        failures=trace.failures[:10],
    )


def _write_pool_file(path: Path, paths: Sequence[Path], count: int, max_loaded: int) -> Path:
    flags = dict(
        zip(("max_model_len", "enforce_eager", "dtype", "block_size"), (512, True, "bfloat16", 32), strict=True)
    )
    pool: dict[str, Any] = {
        "models": [{"name": f"m{i}", "model": str(paths[i % len(paths)]), "args": flags} for i in range(count)],
        "load": "on_demand",
        "max_loaded": min(count, max_loaded),
        "device_memory": f"{16 * max_loaded}MiB",
        "host_memory": "1GiB",
        "page_size": "1MiB",
        "view_key": _KEY,
    }
    path.write_text(yaml.safe_dump(pool, sort_keys=False))
    return path


def _text(server: common.Server, path: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=60) as response:
        text: str = response.read().decode()
    return text


def _wait_until(server: common.Server, limit_s: float) -> None:
    """Wait until the server wants requests; raises RuntimeError if it ends and TimeoutError."""
    while time.monotonic() - server.started_s < limit_s:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{server.log.read_text(errors='replace')[-4000:]}")
        try:
            server.get("/ready")
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"not ready after {limit_s:g} s, see {server.log}")


async def _first_answer(port: int, model: str, limit_s: float) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=limit_s)) as session:
        await _ask(session, port, model)


async def _ask(session: aiohttp.ClientSession, port: int, model: str) -> float:
    """Stream one answer; returns the seconds to its first token, raises RuntimeError if it is not whole."""
    body = {"model": model, "prompt": "hello", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
    begin_s, first_s, tokens, is_whole = time.perf_counter(), 0.0, 0, False
    async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{model}: status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                is_whole = True
            elif line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(f"{model}: {event}")
                first_s = first_s or time.perf_counter() - begin_s
                tokens += len(event["choices"])
    if not is_whole or not tokens:
        raise RuntimeError(f"{model}: the stream ends after {tokens} events")
    return first_s


class _Trace:
    """Plays the requests and keeps what they saw."""

    def __init__(
        self, server: common.Server, rng: random.Random, models: int, requests: int, limit_s: float, zipf: float
    ) -> None:
        weights = list(accumulate(1 / (rank + 1) ** zipf for rank in range(models)))
        names = [f"m{i}" for i in range(models)]
        rng.shuffle(names)
        self._asked = iter(rng.choices(names, cum_weights=weights, k=requests))
        self._server = server
        self._requests = requests
        self._limit_s = limit_s
        self._begin_s = time.monotonic()
        self._known = {"m0"}
        self.sent = 0
        self.cold_s: list[float] = []
        self.warm_s: list[float] = []
        self.failures: list[str] = []
        self.memory: list[int] = []

    async def play(self, users: int) -> None:
        """Send requests, as `users` who each wait for an answer before the next one."""
        limits = aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
            await asyncio.gather(*(self._user(session) for _ in range(users)))

    async def _user(self, session: aiohttp.ClientSession) -> None:
        for model in self._asked:
            if self._done() >= 1:
                return
            self.sent += 1
            into = self.warm_s if model in self._known else self.cold_s
            self._known.add(model)
            try:
                into.append(await _ask(session, self._server.port, model))
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            if self._done() * 10 >= len(self.memory) + 1:
                tree = [process.pid for process in self._server.tree()]
                self.memory.append(common.memory_of(tree)["pss"])
                common.progress(f"{self.sent} requests, {len(self.failures)} lost, {self.memory[-1] >> 20} MiB")

    def _done(self) -> float:
        """The share of the requests, or of the time, that is over."""
        return max(self.sent / self._requests, (time.monotonic() - self._begin_s) / self._limit_s)


def main() -> None:
    """Run from the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="at most (default: %(default)s)")
    parser.add_argument("--max-loaded", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--users", type=int, default=8, help="who ask at the same time (default: %(default)s)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the law (default: %(default)s)")
    flags: argparse.Namespace = parser.parse_args()
    keys = ["start_to_first_answer_s", "cold_first_token_s", "frontend_kb_per_cold_model", "loads", "requests", "lost"]
    common.report("on_demand", run, flags, keys)


if __name__ == "__main__":
    main()
