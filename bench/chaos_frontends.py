# SPDX-License-Identifier: Apache-2.0
"""Does anybody notice when one of several frontends is killed, but for the clients that were connected to it?

    python -m bench.chaos_frontends --json bench/results/chaos_frontends_cpu.json

One server on this machine, `frontends: N`, six tiny models on memory for a few of them. The streams run once
undisturbed; then, once per round, they run again, and in the middle of them one frontend after the other is killed by
SIGKILL. Connections break with the frontend that accepted them; that is counted, by the connections it had:

    broken         streams whose connection was to the killed frontend
    lost           other streams that ended with an error, or without all their tokens
    wrong          complete streams whose tokens are not those of the undisturbed run
    duplicated     streams with more tokens than they asked for
    refused        of the requests that were sent, each on a new connection, until the frontend was back: not answered
    back_max_s     from the kill until all frontends were there again and the host had nothing left to do
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import yaml

from bench import chaos
from bench.parts import common

_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip
_HEAL_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill did; see the module."""

    index: int
    tokens_before: int
    """Delivered when the frontend was killed."""
    broken: int
    lost: int
    wrong: int
    duplicated: int
    asked: int
    refused: int
    back_s: float
    problems: Sequence[str]


@dataclass(frozen=True, slots=True)
class ChaosFrontends:
    """See the module."""

    broken: int
    lost: int
    wrong: int
    duplicated: int
    refused: int
    back_max_s: float
    streams_per_round: int
    tokens_per_stream: int
    kills: Sequence[Kill]


class Rig(chaos.Rig):
    """A server with several frontends."""

    def __init__(self, server: common.Server, streams: Sequence[chaos.Stream], num_frontends: int) -> None:
        super().__init__(server, None, streams)
        self._num_frontends = num_frontends
        self.asked = self.refused = 0
        """Requests on new connections since the last kill, and those of them that were not answered."""

    async def healed(self) -> dict[str, Any]:
        """Wait until all frontends are there and no request is; returns the state."""
        deadline = time.monotonic() + _HEAL_LIMIT_S
        while True:
            state = await self.state()
            busy = [m for m in state["host"]["models"].values() if m["running"] or m["waiting"]]
            if state["ready"] and len(state["frontends"]) == self._num_frontends and not busy:
                return state
            if time.monotonic() > deadline:
                raise RuntimeError(f"not healed: {state['frontends']} {busy}")
            await asyncio.sleep(0.2)

    async def kill(self, index: int, undisturbed: Sequence[chaos.Stream]) -> Kill:
        """Run the streams and kill one frontend."""
        state = await self.healed()
        pid = next(frontend["pid"] for frontend in state["frontends"] if frontend["index"] == index)
        seen: dict[str, Any] = {}

        async def disturb(streams: list[chaos.Stream]) -> None:
            total = sum(stream.num_tokens for stream in streams)
            while sum(len(stream.tokens) for stream in streams) < total // 4:
                await asyncio.sleep(0.005)
            seen["ports"] = {c.raddr.port for c in psutil.Process(pid).net_connections("tcp") if c.raddr}
            seen["tokens"] = sum(len(stream.tokens) for stream in streams)
            os.kill(pid, signal.SIGKILL)
            seen["killed_s"] = time.monotonic()
            seen["asking"] = asyncio.create_task(self._ask())

        streams = await self.play(disturb)
        await self.healed()
        back_s = time.monotonic() - seen["killed_s"]
        seen["asking"].cancel()
        expected = {(s.model, tuple(s.prompt)): s.tokens for s in undisturbed}
        broken = [s for s in streams if s.port in seen["ports"] and s.problem]
        others = [s for s in streams if s not in broken]
        whole = [s for s in others if not s.problem and len(s.tokens) >= s.num_tokens]
        return Kill(
            index=index,
            tokens_before=seen["tokens"],
            broken=len(broken),
            lost=len(others) - len(whole),
            wrong=sum(s.tokens != expected[s.model, tuple(s.prompt)] for s in whole)
            + sum(s.tokens != expected[s.model, tuple(s.prompt)][: len(s.tokens)] for s in broken),
            duplicated=sum(len(s.tokens) > s.num_tokens for s in streams),
            asked=self.asked,
            refused=self.refused,
            back_s=round(back_s, 3),
            problems=sorted({s.problem for s in others if s.problem})[:5],
        )

    async def _ask(self) -> None:
        """Ask on new connections, one after the other."""
        self.asked = self.refused = 0
        while True:
            try:
                await asyncio.to_thread(self.server.get, "/v1/models")
            except OSError:
                self.refused += 1
            self.asked += 1
            await asyncio.sleep(0.02)


def run(
    *, streams: int, tokens: int, prompt_len: int, frontends: int, device_memory: str, rounds: int, seed: int,
    start_limit_s: float, logs: Path | None,
) -> ChaosFrontends:  # fmt: skip
    """The whole bench."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = common.make_models(folder / "models", chaos.KINDS)
        names = list(paths)
        args = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
        pool = {
            "models": [{"name": name, "model": str(path), "args": args} for name, path in paths.items()],
            "device_memory": device_memory, "host_memory": "512MiB", "page_size": "256KiB", "weights": "movable",
            "admin_key": chaos.ADMIN_KEY, "frontends": frontends,
        }  # fmt: skip
        pool_file = folder / "pool.yaml"
        pool_file.write_text(yaml.safe_dump(pool))
        server = common.Server((*common.POOL, str(pool_file)), names, log_folder / "server.log", **_ENV)
        stack.callback(server.close)
        common.wait_until_ready([server], start_limit_s)
        prompts = common.random_prompts(seed, streams, prompt_len)
        plan = [chaos.Stream(names[i % len(names)], prompt, tokens) for i, prompt in enumerate(prompts)]
        return asyncio.run(_run(Rig(server, plan, frontends), frontends, rounds, random.Random(seed)))


async def _run(rig: Rig, frontends: int, rounds: int, rng: random.Random) -> ChaosFrontends:
    undisturbed, _ = await rig.undisturbed()
    kills = []
    for _ in range(rounds):
        kills.append(await rig.kill(rng.randrange(frontends), undisturbed))
        common.progress(f"{kills[-1]}")
    totals = {key: sum(getattr(k, key) for k in kills) for key in ("broken", "lost", "wrong", "duplicated", "refused")}
    return ChaosFrontends(
        **totals,
        back_max_s=max(kill.back_s for kill in kills),
        streams_per_round=len(undisturbed),
        tokens_per_stream=undisturbed[0].num_tokens,
        kills=kills,
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--streams", type=int, default=200, help="at once, over six models (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of each stream (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=48, help="tokens (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=3, help="processes (default: %(default)s)")
    parser.add_argument("--device-memory", default="8MiB", help="of the host (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="one kill each (default: %(default)s)")
    keys = ("broken", "lost", "wrong", "duplicated", "refused", "back_max_s")
    common.report("chaos_frontends", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
