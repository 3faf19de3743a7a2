# SPDX-License-Identifier: Apache-2.0
"""Does a pool hold for long? Mixed load on many models for half an hour, with everything that may leak.

12 tiny models on memory for a few of them; two tenants, one of which runs into its limits. Requests of mixed lengths
come at random, some clients hang up in the middle of a stream, and a thirteenth model is added and removed all the
time. Memory of the processes is read every 10 s. In the first third of the time the engine host is stopped twice by
SIGSTOP, so that it hangs and has to be found out, killed and replaced; what is refused until then is counted apart. At
the end the load stops and the books are checked.

The host keeps copies of cached KV in the host memory that it is given (`host_memory`). That part fills up in the first
minutes and is told apart.

    rss_slope_mib_per_h   of a straight line through the memory of all processes from when that part is full
    errors                answers that nobody asked for: neither 200, nor 429 of the tenant with limits, nor hung up,
                          nor 503 while the host was away
    hangs                 times that a host was stopped and replaced
    ledger_ok             1 if the books of the memory agree once the pool is idle, else 0
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import yaml

from bench.parts import common

ADMIN_KEY = "soak-admin-0123456"
POLITE, LIMITED = "soak-polite-key-0", "soak-limited-key"
KINDS = ("llama", "qwen2", "qwen3", "gemma3")
_NUM_MODELS = 12
_SAMPLE_S = 10.0
_EXTRA = "extra"
_HANG_UP_FRAC = 0.15
_HANGS = (1 / 12, 1 / 5)
"""When the host is stopped, in parts of the whole time."""
_HEAL_LIMIT_S = 300.0
_LEN_TOKENS = (3, 300)
_OUT_TOKENS = (1, 120)
_LINES = {
    "pss_mib": "memory of all processes (PSS)",
    "host_mib": "engine host",
    "frontend_mib": "frontend",
    "copies_mib": "copies of weights and KV in host_memory",
}


@dataclass(frozen=True, slots=True)
class Soak:
    """See the module; memory in MiB."""

    rss_slope_mib_per_h: float
    errors: int
    ledger_ok: int
    hangs: int
    answers: Mapping[str, int]
    tokens: int
    models_added: int
    samples: Sequence[Mapping[str, float]]
    """Seconds since the load began; proportional set size of all processes, of the frontend alone, and of the rest;
    copies that the host has in `host_memory`; requests and models added so far."""
    state: Mapping[str, Any]
    better: Mapping[str, str]


class _Load:
    def __init__(self, port: int, models: Sequence[str], rate_per_s: float, seed: int) -> None:
        self.answers: Counter[str] = Counter()
        self.tokens = 0
        self.models_added = 0
        self.is_away = False
        """Whether the host was stopped and has not been replaced."""
        self._base = f"http://127.0.0.1:{port}"
        self._models, self._rate_per_s = list(models), rate_per_s
        self._random = random.Random(seed)

    async def run(self, end_s: float, extra: Mapping[str, Any]) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:
            churn = asyncio.create_task(self._churn(session, end_s, extra))
            running: set[asyncio.Task[None]] = set()
            while time.monotonic() < end_s:
                await asyncio.sleep(self._random.expovariate(self._rate_per_s))
                task = asyncio.create_task(self._request(session))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(churn, *running)

    async def _request(self, session: aiohttp.ClientSession) -> None:
        draw = self._random
        key = LIMITED if draw.random() < 0.3 else POLITE
        body = {
            "model": draw.choice(self._models),
            "prompt": [draw.randrange(3, 512) for _ in range(draw.randint(*_LEN_TOKENS))],
            "max_tokens": draw.randint(*_OUT_TOKENS),
            "ignore_eos": True,
            "temperature": draw.choice([0.0, 1.0]),
            "stream": draw.random() < 0.7,
        }
        hang_up_after = draw.randint(1, 10) if body["stream"] and draw.random() < _HANG_UP_FRAC else None
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with session.post(f"{self._base}/v1/completions", json=body, headers=headers) as response:
                num_chunks = 0
                async for line in response.content:
                    num_chunks += line.startswith(b"data: {")
                    if num_chunks == hang_up_after:
                        self.answers["hung up"] += 1
                        return
                self.tokens += body["max_tokens"] if response.status == 200 else 0
                self._count(f"{response.status} {'limited' if key == LIMITED else 'polite'}", response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[type(error).__name__] += 1

    async def _churn(self, session: aiohttp.ClientSession, end_s: float, extra: Mapping[str, Any]) -> None:
        """Add a model, use it, remove it, again and again."""
        headers, admin = {"Authorization": f"Bearer {ADMIN_KEY}"}, f"{self._base}/v1/pool/models"
        while time.monotonic() < end_s:
            async with session.post(admin, json=extra, headers=headers) as response:
                self._count(f"add {response.status}", response.status)
            if response.status != 201:
                await asyncio.sleep(2)
                continue
            self.models_added += 1
            body = {"model": _EXTRA, "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
            async with session.post(f"{self._base}/v1/completions", json=body, headers=headers) as response:
                self._count(f"extra {response.status}", response.status)
            while True:
                async with session.delete(f"{admin}/{_EXTRA}?drain=10s", headers=headers) as response:
                    self._count(f"remove {response.status}", response.status)
                if response.status != 503 or time.monotonic() > end_s + _HEAL_LIMIT_S:
                    break
                await asyncio.sleep(2)
            with suppress(asyncio.TimeoutError):
                await asyncio.sleep(20)

    def _count(self, answer: str, status: int) -> None:
        self.answers["503 while the host was away" if status == 503 and self.is_away else answer] += 1

    @property
    def errors(self) -> int:
        """Answers that nobody asked for."""
        wanted = ("200 limited", "200 polite", "429 limited", "hung up", "add 201", "extra 200", "remove 200")
        wanted += ("503 while the host was away",)
        return sum(count for answer, count in self.answers.items() if answer not in wanted)


def run(*, minutes: float, rate: float, png: Path | None, seed: int, start_limit_s: float, logs: Path | None) -> Soak:
    """Serve and load for `minutes`."""
    with common.scratch(logs) as (folder, log_folder, stack):
        kinds = [KINDS[i % len(KINDS)] for i in range(_NUM_MODELS + 1)]
        *paths, extra = common.make_models(folder / "models", kinds).items()
        pool_file = folder / "pool.yaml"
        pool_file.write_text(yaml.safe_dump(_pool(dict(paths))))
        env = {"SOAK_POLITE": POLITE, "SOAK_LIMITED": LIMITED}
        names = [name for name, _ in paths]
        server = common.Server([*common.POOL, str(pool_file)], names, log_folder / "soak.log", **env)
        server.key = ADMIN_KEY
        stack.callback(server.close)
        common.wait_until_ready([server], start_limit_s)
        return _soak(server, {"name": _EXTRA, "model": str(extra[1]), "args": _args()}, minutes, rate, seed, png)


def _soak(
    server: common.Server, extra: Mapping[str, Any], minutes: float, rate: float, seed: int, png: Path | None
) -> Soak:
    load = _Load(server.port, sorted(server.models), rate, seed)
    samples: list[dict[str, float]] = []
    begun_s, hangs = time.monotonic(), 0

    async def sample() -> None:
        while True:
            await asyncio.sleep(0.1 if load.is_away else 0.0)
            if load.is_away:
                continue
            samples.append({"s": time.monotonic() - begun_s, **await asyncio.to_thread(_memory_mib, server)})
            samples[-1] |= {"requests": sum(load.answers.values()), "models_added": load.models_added}
            if len(samples) % 6 == 0:
                seen = " ".join(f"{name}={value:.0f}" for name, value in samples[-1].items())
                common.progress(f"{seen} {dict(load.answers)}")
            await asyncio.sleep(_SAMPLE_S)

    async def hang() -> None:
        nonlocal hangs
        for part in _HANGS:
            await asyncio.sleep(max(0.0, begun_s + part * 60 * minutes - time.monotonic()))
            await _stop_host(server, load)
            hangs += 1

    async def both() -> None:
        sampler, hanging = asyncio.create_task(sample()), asyncio.create_task(hang())
        await load.run(begun_s + 60 * minutes, extra)
        await hanging
        sampler.cancel()

    asyncio.run(both())
    ledger_ok = _is_clean(server)
    state = server.get("/v1/pool/state", key=ADMIN_KEY)["host"]
    state.pop("models", None)
    if png:
        _plot(samples, png)
    return Soak(
        rss_slope_mib_per_h=3600 * _slope(_settled(samples)),
        errors=load.errors,
        ledger_ok=ledger_ok,
        hangs=hangs,
        answers=dict(sorted(load.answers.items())),
        tokens=load.tokens,
        models_added=load.models_added,
        samples=samples,
        state=state,
        better={"rss_slope_mib_per_h": "lower", "errors": "lower", "ledger_ok": "higher"},
    )


async def _stop_host(server: common.Server, load: _Load) -> None:
    """Let the host hang and wait until another one serves all models; RuntimeError if none does."""
    before = await asyncio.to_thread(server.get, "/v1/pool/state", key=ADMIN_KEY)
    load.is_away = True
    os.kill(before["host_pid"], signal.SIGSTOP)
    end_s = time.monotonic() + _HEAL_LIMIT_S
    while time.monotonic() < end_s:
        await asyncio.sleep(0.5)
        now = await asyncio.to_thread(server.get, "/v1/pool/state", key=ADMIN_KEY, limit_s=30.0)
        if now["host_pid"] != before["host_pid"] and all(
            now["models"][name]["state"] == "ready" for name in server.models
        ):
            load.is_away = False
            return
    raise RuntimeError(f"no host has replaced the one that hangs: {now}")


def _memory_mib(server: common.Server) -> dict[str, float]:
    frontend, *rest = [common.memory_of([process.pid])["pss"] / 2**20 for process in server.tree()]
    held = server.get("/v1/pool/state", key=ADMIN_KEY)["host"]["host_memory"]["held_bytes"]
    copies = sum(sum(by_model.values()) for by_model in held.values()) / 2**20
    return {"pss_mib": frontend + sum(rest), "frontend_mib": frontend, "host_mib": sum(rest), "copies_mib": copies}


def _is_clean(server: common.Server) -> int:
    """Whether the pool comes to rest and its books agree."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        models = server.get("/v1/pool/state", key=ADMIN_KEY)["host"]["models"].values()
        if not any(model["running"] or model["waiting"] for model in models):
            with suppress(OSError):
                server.get("/v1/pool/check", key=ADMIN_KEY, body={})
                return 1
            return 0
        time.sleep(0.5)
    return 0


def _settled(samples: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The samples from when `host_memory` is full for good, which a new host fills anew; at least the last third."""
    full = 0.95 * max(sample["copies_mib"] for sample in samples)
    last_below = max((i for i, sample in enumerate(samples) if sample["copies_mib"] < full), default=0)
    return samples[min(last_below + 1, 2 * len(samples) // 3) :]


def _slope(samples: Sequence[Mapping[str, float]]) -> float:
    """MiB per second of the least-squares line."""
    mean_s = sum(sample["s"] for sample in samples) / len(samples)
    mean_mib = sum(sample["pss_mib"] for sample in samples) / len(samples)
    above = sum((sample["s"] - mean_s) * (sample["pss_mib"] - mean_mib) for sample in samples)
    return above / sum((sample["s"] - mean_s) ** 2 for sample in samples)


def _args() -> list[str]:
    return list(common.MODEL_FLAGS)


def _pool(paths: Mapping[str, Path]) -> dict[str, Any]:
    slo = {"ttft": "10s", "tpot": "500ms"}
    return {
        "models": [{"name": n, "model": str(p), "args": _args(), "slo": slo} for n, p in paths.items()],
        "device_memory": "12MiB",
        "host_memory": "256MiB",
        "page_size": "256KiB",
        "weights": "movable",
        "host_timeout": "5s",
        "admin_key": ADMIN_KEY,
        "tenants": [
            {"name": "polite", "keys": ["${SOAK_POLITE}"]},
            {"name": "limited", "keys": ["${SOAK_LIMITED}"], "requests_per_minute": 60, "max_concurrent": 3},
        ],
    }


def _plot(samples: Sequence[Mapping[str, float]], path: Path) -> None:
    """Memory over time; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        common.progress("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    minutes = [sample["s"] / 60 for sample in samples]
    for name, label in _LINES.items():
        axis.plot(minutes, [sample[name] for sample in samples], label=label)
    axis.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    other = axis.twinx()
    other.plot(minutes, [sample["requests"] for sample in samples], color="0.7", linestyle=":", label="requests")
    other.set_ylabel("requests")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw memory over time into this file")
    common.report("soak", run, parser.parse_args(), ["rss_slope_mib_per_h", "errors", "ledger_ok", "hangs"])


if __name__ == "__main__":
    main()
