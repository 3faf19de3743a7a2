# SPDX-License-Identifier: Apache-2.0
"""Does a pool on a cluster lose anything when its processes die or its networks break? One fault after the other.

Three engine hosts, each on a Ray node of its own, two equal servers, the second with two frontends, and six tiny models
with two replicas, on memory for a few of them, so that models are switched all the time. Streams run at both servers
once undisturbed. Then they run again in each round, in which one thing dies or breaks. Each kind has its round, in an
order by the seed. A process is killed by SIGKILL, or stopped by SIGSTOP so that it hangs:

    host_prefill   an engine host process, before the first token of most streams
    host_decode    an engine host process, in the middle of the streams
    host_switch    an engine host process that has weights of a model on their way
    host_stopped   an engine host process, stopped: its supervisor has to find out and kill it
    host_actor     a HostActor, Ray's process that supervises a host, and with it the host
    node           a Ray node, by its raylet; one joins afterwards
    controller     the controller's process
    first_server   the server that started the pool; another one takes its place
    server         the other server, with its frontends; another one takes its place
    frontend       one of the frontends of that server
    head           Ray's head, which has a Redis, with all of Ray on its machine; it is started again afterwards
    cut_host       the network of a host's machine, until the streams have ended
    cut_server     the network of the first server's machine, for longer than `frontend_timeout`
    cut_between    the network between the first server and one host, until the streams have ended

The last four need machines of their own, made of Linux namespaces (root, iproute2) and redis-server. Where these cannot
be, the others run on Ray nodes of this machine, and the result names what is left out.

Every stream is compared token by token with plain vLLM, which has the same model alone, in a process without tokenpool.
A round ends when nothing is missing, no host has a request, and the books of the memory agree.

    broken         streams whose connection was to the frontend or server that was killed; they end with it
    lost           other streams that ended with an error, or without all their tokens
    wrong          streams with a token that is not plain vLLM's, the broken ones included, as far as they came
    duplicated     streams with more tokens than they asked for
    refused        of requests for a token, on new connections to a server that was not killed: not answered; a round
                   has what came instead in its `refusals`
    hangs          hosts that were stopped, each of which was killed and replaced
    recovery_p99_s 99th percentile, over streams that waited, of the longest pause after the fault; a stream waited if
                   that is longer than any pause of it in the undisturbed run
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from bench.faults.asking import Asker
from bench.faults.bed import NUM_HOSTS, Bed, Network, OneMachine, client_ports
from bench.faults.streams import ADMIN_KEY, Expected, Player, Stream, judge, plain_answers
from bench.parts import common
from bench.parts.ray_nodes import ENV

MODELS = ("llama", "qwen2", "qwen3", "gemma3", "llama", "qwen2")
MODEL_ARGS = {"max_model_len": 512, "enforce_eager": True, "dtype": "float32", "block_size": 32}
"""With float32, because with bfloat16 some CPUs round otherwise what is computed again (docs/cluster.md)."""
KINDS = ("host_prefill", "host_decode", "host_switch", "host_stopped", "host_actor", "node", "controller",
         "first_server", "server", "frontend", "head", "cut_host", "cut_server", "cut_between")  # fmt: skip
OF_NETWORKS = frozenset({"head", "cut_host", "cut_server", "cut_between"})
NUM_FRONTENDS = 2
"""Of the second server."""
FRONTEND_TIMEOUT_S = 4.0
_CUT_S = 2 * FRONTEND_TIMEOUT_S
_ENV = {**ENV, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip
_HEAL_LIMIT_S = 300.0
_NUM_REFUSALS = 20
"""So many a round keeps."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Whom a fault hit."""

    victim: str
    gone_pid: int = 0
    """Of an engine host process that must not be there in the end; 0 = none is to go."""
    server: int | None = None
    """Whose connections break."""
    ports: frozenset[int] | None = None
    """The other ends of those connections; None = all of that server, which is gone."""

    def is_dead(self, stream: Stream) -> bool:
        """Whether a stream's connection was to what was killed."""
        return stream.server == self.server and (self.ports is None or stream.port in self.ports)


@dataclass(frozen=True, slots=True)
class Round:
    """What one fault did."""

    kind: str
    victim: str
    hit_after_s: float
    tokens_before: int
    """Delivered when the fault came."""
    broken: int
    lost: int
    wrong: int
    duplicated: int
    problems: Sequence[str]
    asked: int
    refused: int
    refusals: Sequence[str]
    """Of the first ones: when it was asked after the fault, for how long, where, and what came instead."""
    waited: int
    """Streams that the fault held up."""
    pause_max_s: float
    heal_s: float
    """From the fault until nothing was missing any more."""


@dataclass(frozen=True, slots=True)
class Chaos:
    """See the module; seconds."""

    num_rounds: int
    lost: int
    wrong: int
    duplicated: int
    broken: int
    refused: int
    hangs: int
    recovery_p99_s: float
    streams_per_round: int
    tokens_per_stream: int
    undisturbed_s: float
    undisturbed_pause_max_s: float
    left_out: Mapping[str, str]
    """Kinds that cannot be tried on this machine, and why."""
    rounds: Sequence[Round]
    decisions: Mapping[str, int]
    """Of the last controller."""


class Rig(Player):
    """Two servers on a cluster and the streams that run on them."""

    def __init__(
        self, bed: Bed, serve: Callable[[int], common.Server], streams: Sequence[Stream], expected: Expected
    ) -> None:
        """`serve` starts the first server or another one, and returns once it is ready."""
        super().__init__([serve(0), serve(1)], streams)
        self.waits: list[float] = []
        self._bed, self._serve, self._expected = bed, serve, expected
        self._switching = ""
        """The host that was seen to move something."""

    async def healed(self) -> dict[str, Any]:
        """See Player; what the first server says."""
        deadline = time.monotonic() + _HEAL_LIMIT_S
        while missing := _missing(states := [await self.state(i) for i in range(len(self.servers))]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not healed: {missing}")
            await asyncio.sleep(0.5)
        for server in self.servers:
            await asyncio.to_thread(server.get, "/v1/pool/check", key=ADMIN_KEY, body={}, limit_s=60.0)
        return states[0]

    async def round(self, kind: str, usual_s: Sequence[float], rng: random.Random) -> Round:
        """Run the streams, do what `kind` says, and compare; `usual_s` are their longest pauses without it."""
        told = (await self.healed())["cluster"]["controller"]
        started_s = time.monotonic()
        seen: dict[str, Any] = {}

        async def disturb(streams: list[Stream]) -> None:
            await self._until_phase(kind, streams)
            seen["tokens"] = sum(len(stream.tokens) for stream in streams)
            seen["hit"] = hit = await self._strike(kind, told, rng)
            seen["hit_s"] = time.monotonic()
            seen["asker"] = asker = Asker(self._alive(hit))
            seen["asking"] = asyncio.create_task(asker.run())
            if kind == "cut_server":  # its clients wait for it
                await asyncio.sleep(_CUT_S)
                self._bed.mend()

        streams = await self.play(disturb)
        hit, hit_s = seen["hit"], seen["hit_s"]
        await self._mend(hit)
        after = await self.healed()
        heal_s = time.monotonic() - hit_s
        seen["asking"].cancel()
        with suppress(asyncio.CancelledError):  # an error of another kind would have ended the count unseen
            await seen["asking"]
        if hit.gone_pid in [host["pid"] for host in after["cluster"]["controller"]["hosts"].values()]:
            raise RuntimeError(f"{hit.victim} hangs and was not replaced")
        kept = [(s.longest_pause_s(hit_s), usual) for s, usual in zip(streams, usual_s, strict=True) if not s.problem]
        waits = [pause for pause, usual in kept if pause > usual]
        self.waits += waits
        return Round(
            kind=kind,
            victim=hit.victim,
            hit_after_s=round(hit_s - started_s, 3),
            tokens_before=seen["tokens"],
            **asdict(judge(streams, self._expected, hit.is_dead)),
            asked=seen["asker"].asked,
            refused=len(seen["asker"].refusals),
            refusals=seen["asker"].refusals[:_NUM_REFUSALS],
            waited=len(waits),
            pause_max_s=round(max(pause for pause, _ in kept), 3),
            heal_s=round(heal_s, 3),
        )

    async def _until_phase(self, kind: str, streams: list[Stream]) -> None:
        def num_tokens() -> int:
            return sum(len(stream.tokens) for stream in streams)

        total = sum(stream.num_tokens for stream in streams)
        while num_tokens() < (1 if kind == "host_prefill" else total // 4):
            await asyncio.sleep(0.002)
        self._switching = ""
        while kind == "host_switch" and num_tokens() < total // 2:
            for name, host in (await self.state())["hosts"].items():
                models = host.get("models", {}).values()
                if any(m["state"] in ("loading", "fetching") or m["kv"] not in ("in", "out") for m in models):
                    self._switching = name
                    return

    async def _strike(self, kind: str, controller: Mapping[str, Any], rng: random.Random) -> Hit:
        """Do what `kind` says."""
        hosts, bed = controller["hosts"], self._bed
        if kind == "controller":
            os.kill(controller["pid"], signal.SIGKILL)
            return Hit("controller")
        if kind in ("first_server", "server"):
            index = int(kind == "server")
            self.servers[index].process.kill()
            return Hit("the first server" if kind == "first_server" else "the other server", server=index)
        if kind == "frontend":
            told = rng.choice((await self.state(1))["frontends"])
            hit = Hit(f"frontend {told['index']}", server=1, ports=client_ports(told["pid"]))
            os.kill(told["pid"], signal.SIGKILL)
            return hit
        if kind == "node":
            return Hit(bed.kill_node(hosts, rng))
        if kind in OF_NETWORKS:
            assert isinstance(bed, Network)
            cut = {"cut_host": bed.cut_host, "cut_between": bed.part}
            if kind in cut:
                return Hit(cut[kind](hosts, rng))
            return Hit(bed.kill_head() if kind == "head" else bed.cut_server())
        name = (kind == "host_switch" and self._switching) or rng.choice(sorted(hosts))
        pid = hosts[name]["actor_pid" if kind == "host_actor" else "pid"]
        os.kill(pid, signal.SIGSTOP if kind == "host_stopped" else signal.SIGKILL)
        is_told = kind != "host_switch" or self._switching
        return Hit(name if is_told else f"{name}, no switch seen", gone_pid=hosts[name]["pid"])

    def _alive(self, hit: Hit) -> common.Server:
        """A server that was not killed, not as a whole."""
        is_gone = hit.server is not None and hit.ports is None
        return self.servers[1 - (hit.server or 0) if is_gone else hit.server or 0]

    async def _mend(self, hit: Hit) -> None:
        """Put back what does not come back by itself."""
        await asyncio.to_thread(self._bed.mend)
        if hit.server is not None and hit.ports is None:
            self.servers[hit.server].process.wait()
            self.servers[hit.server] = await asyncio.to_thread(self._serve, hit.server)


def _missing(states: Sequence[Mapping[str, Any]]) -> str:
    """What keeps the pool from being whole and idle, as its servers tell; empty if nothing does."""
    for index, state in enumerate(states):
        cluster, hosts = state["cluster"], state["hosts"].values()
        seats = {name: list(model["hosts"].values()) for name, model in state["models"].items()}
        models = [model for host in hosts for model in host.get("models", {}).values()]
        lacks = {
            "hosts": len(cluster["controller"].get("hosts", ())) != NUM_HOSTS or len(hosts) != NUM_HOSTS,
            "answers of hosts": any("models" not in host for host in hosts),
            "servers": len(cluster["servers"]) != len(states),
            "Ray's head": not cluster["head"]["up"],
            "replicas": any(held.count("serving") < 2 for held in seats.values()),
            "frontends": index == 1 and len(state["frontends"]) != NUM_FRONTENDS,
            "an end of requests": any(model["running"] or model["waiting"] for model in models),
        }
        if missing := [what for what, is_missing in lacks.items() if is_missing]:
            return f"server {index}: {', '.join(missing)}; {seats} {cluster}"
    return ""


def order_of(kinds: Sequence[str], rounds: int, rng: random.Random) -> list[str]:
    """`rounds` kinds, each of them as often as any other, or once more."""
    order: list[str] = []
    while len(order) < rounds:
        order += rng.sample(kinds, len(kinds))
    return order[:rounds]


def run(
    *, streams: int, tokens: int, prompt_len: int, device_memory: str, transport: str, kinds: Sequence[str],
    rounds: int | None, seed: int, start_limit_s: float, logs: Path | None,
) -> Chaos:  # fmt: skip
    """The whole bench."""
    why = Network.cannot_be()
    left_out = {kind: why for kind in kinds if why and kind in OF_NETWORKS}
    rng, kinds = random.Random(seed), [kind for kind in kinds if kind not in left_out]
    order = order_of(kinds, rounds or len(kinds), rng) if kinds else []
    common.progress(f"rounds: {', '.join(order)}; left out: {', '.join(left_out) or 'nothing'}")
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = common.make_models(folder / "models", MODELS)
        names = list(paths)
        prompts = enumerate(common.random_prompts(seed, streams, prompt_len))
        plan = [Stream(names[i % len(names)], prompt, tokens, i // len(names) % 2) for i, prompt in prompts]
        expected = plain_answers(paths, MODEL_ARGS, plan)
        common.progress("plain vLLM has answered")
        pool = {
            "models": [{"name": name, "model": str(path), "args": MODEL_ARGS} for name, path in paths.items()],
            "device_memory": device_memory, "host_memory": "512MiB", "page_size": "256KiB", "weights": "movable",
            "host_timeout": "5s", "admin_key": ADMIN_KEY,
            "cluster": {
                "hosts": NUM_HOSTS, "replicas": 2, "transport": transport, "host_timeout": "4s",
                "frontend_timeout": f"{FRONTEND_TIMEOUT_S:g}s",
            },
        }  # fmt: skip
        bed = Network(stack) if OF_NETWORKS.intersection(order) else OneMachine(stack)
        common.progress(f"Ray runs: {type(bed).__name__}")
        serve = _server_maker(pool, bed, folder, log_folder, stack, start_limit_s)
        return asyncio.run(_run(Rig(bed, serve, plan, expected), order, left_out, rng))


def _server_maker(
    pool: Mapping[str, Any], bed: Bed, folder: Path, logs: Path, stack: ExitStack, limit_s: float
) -> Callable[[int], common.Server]:
    names, numbers = [model["name"] for model in pool["models"]], iter(range(1000))

    def serve(index: int) -> common.Server:
        file = folder / f"pool-{index}.yaml"
        file.write_text(yaml.safe_dump({**pool, "frontends": NUM_FRONTENDS if index else 1}))
        words, log = (*common.POOL, str(file), "--cluster", bed.address), logs / f"server-{next(numbers)}.log"
        server = common.Server(words, names, log, **bed.place(index), **_ENV)
        stack.callback(server.close)
        common.wait_until_ready([server], limit_s)
        return server

    return serve


async def _run(rig: Rig, order: Sequence[str], left_out: Mapping[str, str], rng: random.Random) -> Chaos:
    undisturbed, undisturbed_s = await rig.undisturbed()
    if (first := judge(undisturbed, rig._expected, lambda stream: False)).wrong:
        raise RuntimeError(f"without a fault {first.wrong} streams are not plain vLLM's")
    usual_s = [stream.longest_pause_s() for stream in undisturbed]
    rounds: list[Round] = []
    for kind in order:
        rounds.append(await rig.round(kind, usual_s, rng))
        common.progress(f"{rounds[-1]}")
    told = await asyncio.to_thread(rig.servers[0].get, "/v1/pool/decisions", key=ADMIN_KEY, limit_s=60.0)
    actions = [decision["action"] for decision in told["decisions"]]
    totals = {key: sum(getattr(r, key) for r in rounds) for key in ("lost", "wrong", "duplicated", "broken", "refused")}
    return Chaos(
        num_rounds=len(rounds),
        **totals,
        hangs=sum(r.kind == "host_stopped" for r in rounds),
        recovery_p99_s=round(common.percentile(rig.waits, 99), 3) if len(rig.waits) > 1 else 0.0,
        streams_per_round=len(undisturbed),
        tokens_per_stream=undisturbed[0].num_tokens,
        undisturbed_s=round(undisturbed_s, 3),
        undisturbed_pause_max_s=round(max(usual_s), 3),
        left_out=left_out,
        rounds=rounds,
        decisions={action: actions.count(action) for action in sorted(set(actions))},
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--streams", type=int, default=120, help="at once, over six models (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of each stream (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=48, help="tokens (default: %(default)s)")
    parser.add_argument("--device-memory", default="12MiB", help="of each host (default: %(default)s)")
    parser.add_argument("--transport", default="auto", help="auto or tcp, of tokens (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults (default: all)")
    parser.add_argument("--rounds", type=int, help="one fault each (default: one for each kind)")
    keys = ("num_rounds", "lost", "wrong", "duplicated", "broken", "refused", "hangs", "recovery_p99_s")
    common.report("chaos", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
