# SPDX-License-Identifier: Apache-2.0
"""Does a pool on a cluster lose anything when processes are killed? Streams on all models, one kill after the other.

Three Ray nodes on this machine with one engine host each, six tiny models with two replicas, on memory for a few of
them, so that models are switched all the time. The streams run once undisturbed; then for each fault they run again,
and while they run a process is killed by SIGKILL, or stopped by SIGSTOP so that it hangs:

    host_prefill   an engine host, before the first token of most streams
    host_decode    an engine host, in the middle of the streams
    host_switch    an engine host that has weights of a model on their way
    host_stopped   an engine host, stopped in the middle of the streams; its supervisor has to find out and kill it
    supervisor     the Ray actor that supervises a host, and with it the host
    controller     the controller, in the middle of the streams
    raylet         a whole node, as far as Ray can tell; a new one joins afterwards

One of several frontends is killed by `bench.chaos_frontends`, without Ray.

    lost           streams that ended with an error, or without all their tokens
    wrong          complete streams whose tokens are not those of the undisturbed run
    duplicated     streams with more tokens than they asked for
    hangs          hosts that were stopped, each of which was killed and replaced
    recovery_p99_s 99th percentile, over streams that waited, of the longest pause after the kill; a stream waited if
                   that is longer than any pause of it in the undisturbed run
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp
import yaml

from bench.parts import common
from bench.parts.ray_nodes import ENV, RayNodes

ADMIN_KEY = "chaos-admin-0123456"
KINDS = ("llama", "qwen2", "qwen3", "gemma3", "llama", "qwen2")
NUM_NODES = 3
FAULTS = ("host_prefill", "host_decode", "host_switch", "host_stopped", "supervisor", "controller", "raylet")
HOST_TIMEOUT = "5s"
_ENV = {**ENV, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip
_STREAM_LIMIT_S = 600.0
_HEAL_LIMIT_S = 300.0


@dataclass(slots=True)
class Stream:
    """One greedy completion and when its tokens came."""

    model: str
    prompt: Sequence[int]
    num_tokens: int
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    problem: str = ""
    port: int = 0
    """This end of its connection."""

    def longest_pause_s(self, since_s: float = 0.0) -> float:
        """Longest time without a token that ended after `since_s`."""
        pairs = itertools.pairwise(self.times_s)
        return max((late - max(early, since_s) for early, late in pairs if late > since_s), default=0.0)


@dataclass(frozen=True, slots=True)
class Round:
    """What one fault did."""

    fault: str
    victim: str
    killed_after_s: float
    tokens_before: int
    """Delivered when the process was killed."""
    lost: int
    wrong: int
    duplicated: int
    waited: int
    """Streams that the fault held up."""
    pause_max_s: float
    heal_s: float
    """From the kill until all models had all their replicas again."""
    problems: Sequence[str]


@dataclass(frozen=True, slots=True)
class Chaos:
    """See the module; seconds."""

    lost: int
    wrong: int
    duplicated: int
    hangs: int
    recovery_p99_s: float
    streams_per_round: int
    tokens_per_stream: int
    undisturbed_s: float
    undisturbed_pause_max_s: float
    rounds: Sequence[Round]
    decisions: Mapping[str, int]


class Rig:
    """A server on the cluster and the streams that run on it."""

    def __init__(self, server: common.Server, nodes: RayNodes | None, streams: Sequence[Stream]) -> None:
        self.server, self.nodes, self._plan = server, nodes, streams

    async def state(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.server.get, "/v1/pool/state", key=ADMIN_KEY, limit_s=60.0)

    async def healed(self) -> dict[str, Any]:
        """Wait until every model has two replicas or more and the controller answers; returns the state."""
        deadline = time.monotonic() + _HEAL_LIMIT_S
        while True:
            state = await self.state()
            serving = [list(m["hosts"].values()) for m in state["models"].values()]
            whole = all(seats.count("serving") >= 2 for seats in serving)
            if whole and len(state["cluster"]["controller"].get("hosts", ())) == NUM_NODES:
                return state
            if time.monotonic() > deadline:
                raise RuntimeError(f"not healed: {state['models']} {state['cluster']}")
            await asyncio.sleep(0.5)

    async def play(self, disturb: Callable[[list[Stream]], Awaitable[None]] | None = None) -> list[Stream]:
        """Run all streams at once, and `disturb` beside them."""
        streams = [Stream(s.model, s.prompt, s.num_tokens) for s in self._plan]
        limits = aiohttp.ClientTimeout(total=_STREAM_LIMIT_S)
        async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
            running = [asyncio.create_task(self._stream(session, stream)) for stream in streams]
            if disturb is not None:
                await disturb(streams)
            await asyncio.gather(*running)
        return streams

    async def _stream(self, session: aiohttp.ClientSession, stream: Stream) -> None:
        body = {"model": stream.model, "prompt": stream.prompt, "max_tokens": stream.num_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
        url = f"http://127.0.0.1:{self.server.port}/v1/completions"
        try:
            async with session.post(url, json=body) as response:
                if (connection := response.connection) is not None and connection.transport is not None:
                    stream.port = connection.transport.get_extra_info("sockname")[1]
                if response.status != 200:
                    stream.problem = f"status {response.status}: {(await response.text())[:200]}"
                    return
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        stream.problem = str(chunk["error"])[:200]
                    for choice in chunk.get("choices", ()):
                        ids = choice.get("token_ids") or ()
                        stream.tokens += ids
                        stream.times_s += [time.monotonic()] * len(ids)
        except Exception as error:  # whatever ends a stream loses it
            stream.problem = f"{type(error).__name__}: {error}"

    async def undisturbed(self) -> tuple[list[Stream], float]:
        """Run the streams, after a run to warm up; returns them and the seconds. RuntimeError if one is not whole."""
        await self.healed()
        await self.play()
        started_s = time.monotonic()
        streams = await self.play()
        took_s = time.monotonic() - started_s
        bad = [stream.problem or len(stream.tokens) for stream in streams if len(stream.tokens) != stream.num_tokens]
        if bad:
            raise RuntimeError(f"the undisturbed run is not whole: {bad[:5]}")
        return streams, took_s

    async def round(self, fault: str, undisturbed: Sequence[Stream], rng: random.Random) -> Round:
        """Run the streams, kill what `fault` says, and compare."""
        state = await self.healed()
        seen: dict[str, Any] = {}
        started_s = time.monotonic()

        async def disturb(streams: list[Stream]) -> None:
            await self._until_phase(fault, streams)
            seen["tokens"] = sum(len(stream.tokens) for stream in streams)
            seen["victim"], seen["pid"] = self._kill(fault, state["cluster"]["controller"], rng)
            seen["killed_s"] = time.monotonic()

        streams = await self.play(disturb)
        if fault == "raylet" and self.nodes is not None:
            await asyncio.to_thread(self.nodes.add)
        after = await self.healed()
        if seen["pid"] in [host["pid"] for host in after["cluster"]["controller"]["hosts"].values()]:
            raise RuntimeError(f"{seen['victim']} hangs and was not replaced")
        killed_s = seen["killed_s"]
        pauses = [s.longest_pause_s(killed_s) for s in streams]
        usual = [s.longest_pause_s() for s in undisturbed]
        waits = [pause for pause, before in zip(pauses, usual, strict=True) if pause > before]
        self.waits = waits
        complete = [s for s in streams if not s.problem and len(s.tokens) >= s.num_tokens]
        expected = {(s.model, tuple(s.prompt)): s.tokens for s in undisturbed}
        return Round(
            fault=fault,
            victim=seen["victim"],
            killed_after_s=round(killed_s - started_s, 3),
            tokens_before=seen["tokens"],
            lost=len(streams) - len(complete),
            wrong=sum(s.tokens != expected[s.model, tuple(s.prompt)] for s in complete),
            duplicated=sum(len(s.tokens) > s.num_tokens for s in streams),
            waited=len(waits),
            pause_max_s=round(max(pauses), 3),
            heal_s=round(time.monotonic() - killed_s, 3),
            problems=sorted({s.problem for s in streams if s.problem})[:5],
        )

    async def _until_phase(self, fault: str, streams: list[Stream]) -> None:
        total = sum(stream.num_tokens for stream in streams)
        if fault == "host_prefill":
            while not any(stream.tokens for stream in streams):
                await asyncio.sleep(0.001)
            return
        while sum(len(stream.tokens) for stream in streams) < total // 4:
            await asyncio.sleep(0.005)
        while fault == "host_switch" and sum(len(stream.tokens) for stream in streams) < total // 2:
            hosts = (await self.state())["hosts"].items()
            for name, host in hosts:
                moving = [m for m in host.get("models", {}).values() if m["state"] in ("loading", "fetching")]
                if moving or any(m["kv"] not in ("in", "out") for m in host.get("models", {}).values()):
                    self._switching = name
                    return

    _switching = ""
    """The host that was seen to move something."""

    def _kill(self, fault: str, controller: Mapping[str, Any], rng: random.Random) -> tuple[str, int]:
        """Do what `fault` says; returns whom it hit, and the pid of an engine host that must not be there later."""
        hosts = controller["hosts"]
        name = rng.choice(sorted(hosts))
        if fault == "host_switch" and self._switching:
            name = self._switching
        if fault == "raylet" and self.nodes is not None:
            parents = {_parent(host["actor_pid"]): host_name for host_name, host in hosts.items()}
            index = next(i for i, pid in reversed(list(enumerate(self.nodes.raylets))) if pid in parents)
            self.nodes.kill(index)
            return f"node of {parents[self.nodes.raylets[index]]}", 0
        if fault == "controller":
            os.kill(controller["pid"], signal.SIGKILL)
            return "controller", 0
        pid = hosts[name]["actor_pid" if fault == "supervisor" else "pid"]
        os.kill(pid, signal.SIGSTOP if fault == "host_stopped" else signal.SIGKILL)
        return name if fault != "host_switch" or self._switching else f"{name}, no switch seen", hosts[name]["pid"]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def run(
    *, streams: int, tokens: int, prompt_len: int, device_memory: str, transport: str, faults: Sequence[str], seed: int,
    start_limit_s: float, logs: Path | None,
) -> Chaos:  # fmt: skip
    """The whole bench."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = common.make_models(folder / "models", KINDS)
        names = list(paths)
        args = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
        pool = {
            "models": [{"name": name, "model": str(path), "args": args} for name, path in paths.items()],
            "device_memory": device_memory, "host_memory": "512MiB", "page_size": "256KiB", "weights": "movable",
            "host_timeout": HOST_TIMEOUT, "admin_key": ADMIN_KEY,
            "cluster": {"hosts": NUM_NODES, "replicas": 2, "transport": transport},
        }  # fmt: skip
        pool_file = folder / "pool.yaml"
        pool_file.write_text(yaml.safe_dump(pool))
        nodes = stack.enter_context(RayNodes(num_nodes=NUM_NODES, cpus_per_node=1))
        words = (*common.POOL, str(pool_file), "--cluster", nodes.address)
        server = common.Server(words, names, log_folder / "server.log", **_ENV)
        stack.callback(server.close)
        common.wait_until_ready([server], start_limit_s)
        rng = random.Random(seed)
        prompts = common.random_prompts(seed, streams, prompt_len)
        plan = [Stream(names[i % len(names)], prompt, tokens) for i, prompt in enumerate(prompts)]
        return asyncio.run(_run(Rig(server, nodes, plan), faults, rng))


async def _run(rig: Rig, faults: Sequence[str], rng: random.Random) -> Chaos:
    undisturbed, undisturbed_s = await rig.undisturbed()
    rounds, waits = [], []
    for fault in faults:
        rounds.append(await rig.round(fault, undisturbed, rng))
        waits += rig.waits
        common.progress(f"{rounds[-1]}")
    decisions = (await asyncio.to_thread(rig.server.get, "/v1/pool/decisions", key=ADMIN_KEY))["decisions"]
    actions = [decision["action"] for decision in decisions]
    return Chaos(
        lost=sum(r.lost for r in rounds),
        wrong=sum(r.wrong for r in rounds),
        duplicated=sum(r.duplicated for r in rounds),
        hangs=sum(r.fault == "host_stopped" for r in rounds),
        recovery_p99_s=round(common.percentile(waits, 99), 3) if len(waits) > 1 else 0.0,
        streams_per_round=len(undisturbed),
        tokens_per_stream=undisturbed[0].num_tokens,
        undisturbed_s=round(undisturbed_s, 3),
        undisturbed_pause_max_s=round(max(s.longest_pause_s() for s in undisturbed), 3),
        rounds=rounds,
        decisions={action: actions.count(action) for action in sorted(set(actions))},
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--streams", type=int, default=200, help="at once, over six models (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of each stream (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=48, help="tokens (default: %(default)s)")
    parser.add_argument("--device-memory", default="6MiB", help="of each host (default: %(default)s)")
    parser.add_argument("--transport", default="auto", help="auto or tcp, of tokens (default: %(default)s)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="in this order")
    flags = parser.parse_args()
    common.report("chaos", run, flags, ("lost", "wrong", "duplicated", "hangs", "recovery_p99_s"))


if __name__ == "__main__":
    main()
