# SPDX-License-Identifier: Apache-2.0
"""How long is a stream without tokens when its engine host is killed, and what is that time made of?

    python -m bench.restart --json bench/results/restart_cpu.json

One server on this machine with tiny models and one host. A stream runs on one of the models; in the middle of it the
host is killed by SIGKILL, once per round, another model's turn each time. A round ends when all models are served
again. The stream has to end with the tokens that it has undisturbed. Before each kill the host has lived so long that
its death counts as the first one: others wait longer and longer.

    recovery_p50_s, recovery_p99_s   from the kill until the stream's next token
    imports_s    median, from the start of the new host's process until its imports are done
    noticed_s    median, from the kill until the new host's process is there
    build_s      median, of the engine that the stream waits for
    rest_s       median, what is left of the recovery: the host's own start, connections, tokens computed again
    all_s        median, from the kill until all models are served
    lost, wrong  streams without all their tokens, or with others
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from bench.faults.streams import ADMIN_KEY, Player, Stream
from bench.parts import common

_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip
_KINDS = ("llama", "qwen2", "qwen3", "gemma3")
_HEAL_LIMIT_S = 300.0
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill did; see the module."""

    model: str
    recovery_s: float
    noticed_s: float
    imports_s: float
    build_s: float
    all_s: float
    lost: int
    wrong: int
    problem: str


@dataclass(frozen=True, slots=True)
class Restart:
    """See the module."""

    recovery_p50_s: float
    recovery_p99_s: float
    imports_s: float
    noticed_s: float
    build_s: float
    rest_s: float
    all_s: float
    lost: int
    wrong: int
    kills: Sequence[Kill]


class Rig(Player):
    """A server and the stream of one model."""

    def __init__(self, server: common.Server, model: str, prompt: Sequence[int], tokens: int) -> None:
        super().__init__([server], [Stream(model, prompt, tokens)])
        self._model = model

    async def healed(self) -> dict[str, Any]:
        """Wait until all models are served; returns the state."""
        deadline = time.monotonic() + _HEAL_LIMIT_S
        while True:
            state = await self.state()
            if state["ready"] and (state["host"] or {}).get("models", {}).keys() >= self.servers[0].models:
                return state
            if time.monotonic() > deadline:
                raise RuntimeError(f"not healed: {state['models']}")
            await asyncio.sleep(_LOOK_S)

    async def kill(self, expected: Stream, rest_s: float) -> Kill:
        """Run the stream and kill the host in the middle of it, once it is `rest_s` old."""
        state = await self.healed()
        await asyncio.sleep(max(0.0, rest_s - state["host"]["uptime_s"]))
        pid = state["host_pid"]
        seen: dict[str, float] = {}

        async def disturb(streams: list[Stream]) -> None:
            while len(streams[0].tokens) < streams[0].num_tokens // 8:
                await asyncio.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            seen["killed_s"], seen["killed_at"] = time.monotonic(), time.time()
            await self.healed()
            seen["all_s"] = time.monotonic() - seen["killed_s"]

        (stream,) = await self.play(disturb)
        state = await self.healed()
        born_at = time.time() - _age_s(state["host_pid"])
        host_at = time.time() - state["host"]["uptime_s"] - state["host"]["age_s"]
        after = [when for when in stream.times_s if when > seen["killed_s"] + 0.2]  # what was on its way comes at once
        return Kill(
            model=self._model,
            recovery_s=round(after[0] - seen["killed_s"], 3) if after else 0.0,
            noticed_s=round(born_at - seen["killed_at"], 3),
            imports_s=round(host_at - born_at, 3),
            build_s=state["host"]["models"][self._model]["build_s"],
            all_s=round(seen["all_s"], 3),
            lost=int(bool(stream.problem) or len(stream.tokens) < stream.num_tokens or not after),
            wrong=int(stream.tokens != expected.tokens),
            problem=stream.problem,
        )


def _age_s(pid: int) -> float:
    """Seconds since a process was made, to 10 ms."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run(
    *, models: int, kills: int, rest_s: float, tokens: int, template: bool, frontends: int, seed: int,
    start_limit_s: float, logs: Path | None,
) -> Restart:  # fmt: skip
    """The whole bench."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = common.make_models(folder / "models", [_KINDS[i % len(_KINDS)] for i in range(models)])
        names = list(paths)
        args = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
        pool = {
            "models": [{"name": name, "model": str(path), "args": args} for name, path in paths.items()],
            "device_memory": f"{16 * models}MiB", "page_size": "1MiB", "admin_key": ADMIN_KEY,
            "frontends": frontends,
        } | ({} if template else {"host_template": False})  # fmt: skip
        pool_file = folder / "pool.yaml"
        pool_file.write_text(yaml.safe_dump(pool))
        server = common.Server((*common.POOL, str(pool_file)), names, log_folder / "server.log", **_ENV)
        stack.callback(server.close)
        (ready_s,) = common.wait_until_ready([server], start_limit_s)
        common.progress(f"ready after {ready_s:.1f} s")
        return asyncio.run(_run(server, names, kills, rest_s, tokens, seed))


async def _run(
    server: common.Server, names: Sequence[str], kills: int, rest_s: float, tokens: int, seed: int
) -> Restart:
    (prompt,) = common.random_prompts(seed, 1, 48)
    rng, told = random.Random(seed), []
    order = [name for _ in range(kills) for name in rng.sample(names, len(names))][:kills]
    rigs = {name: Rig(server, name, prompt, tokens) for name in order}
    undisturbed = {name: (await rig.undisturbed())[0][0] for name, rig in rigs.items()}
    for name in order:
        told.append(await rigs[name].kill(undisturbed[name], rest_s))
        common.progress(f"{told[-1]}")
    recovery_s = [kill.recovery_s for kill in told]
    medians = {
        key: statistics.median(getattr(kill, key) for kill in told)
        for key in ("noticed_s", "imports_s", "build_s", "all_s")
    }
    rests_s = [kill.recovery_s - kill.noticed_s - kill.imports_s - kill.build_s for kill in told]
    return Restart(
        recovery_p50_s=round(statistics.median(recovery_s), 3),
        recovery_p99_s=round(common.percentile(recovery_s, 99), 3),
        rest_s=round(statistics.median(rests_s), 3),
        lost=sum(kill.lost for kill in told),
        wrong=sum(kill.wrong for kill in told),
        kills=told,
        **medians,
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=12, help="tiny ones (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=24, help="2 or more (default: %(default)s)")
    parser.add_argument("--rest-s", type=float, default=21, help="least age of a host (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="of the stream (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--template", action=argparse.BooleanOptionalAction, default=True, help="keep a template")
    keys = ("recovery_p50_s", "recovery_p99_s", "imports_s", "noticed_s", "build_s", "rest_s", "all_s", "lost", "wrong")
    common.report("restart", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
