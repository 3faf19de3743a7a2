# SPDX-License-Identifier: Apache-2.0
"""Two real hosts that do everything, against one that prefills and one that decodes, on two loads.

One model on both hosts of a cluster. `mixed` = each host takes half of the requests, from the first token to the last;
`split` = with `prefill_hosts: 1` all requests begin on one host and go, with their KV, to the other one after the first
token. The same closed loop of `--users` runs for each: prompt-heavy requests, then output-heavy ones.

    *_tokens_per_s  tokens of answers
    *_ttft_p50_s    from the request to its first token
    *_itl_p99_s     from one token to the next: what a prefill between them costs, and what the hand-over does

On CPU both hosts, the frontend, Ray and the load share the cores, so a hand-over is paid in tokens; and with one host
of each kind the one that has nothing to do cannot help. bench/sim/roles_sim.py shows larger pools.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp

from bench.parts import cluster_load, common, sized_models
from bench.parts.cluster_load import Stream

LOADS = {"prompt_heavy": (448, 24), "output_heavy": (32, 160)}
"""Tokens of prompts and of answers."""
ARMS = {
    "mixed": {"hosts": 2, "capacity": "fixed", "replicas": 2},
    "split": {"hosts": 2, "capacity": "live", "prefill_hosts": 1},
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one arm."""

    requests: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    handed_over: int
    """Requests that went on at the other host."""
    kv_blocks: int
    """Blocks of KV, of 32 tokens, that went with them."""
    lost: int


@dataclass(slots=True)
class Roles:
    mixed: dict[str, float] = field(default_factory=dict)
    split: dict[str, float] = field(default_factory=dict)
    """Entries of `runs` for the result line."""
    handed_over: int = 0
    lost: int = 0
    runs: dict[str, Any] = field(default_factory=dict)


async def _play(port: int, users: int, requests: int, prompt_len: int, num_tokens: int, seed: int) -> list[Stream]:
    streams = [Stream("m", prompt, num_tokens) for prompt in common.random_prompts(seed, requests, prompt_len)]
    waiting = iter(streams)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:

        async def user() -> None:
            for stream in waiting:
                await stream.run(session, port)

        await asyncio.gather(*(user() for _ in range(users)))
    return streams


def _measure(server: common.Server, users: int, requests: int, load: tuple[int, int], seed: int) -> Measured:
    before = _counted(server)
    start_s = time.monotonic()
    streams = asyncio.run(_play(server.port, users, requests, *load, seed))
    seconds = time.monotonic() - start_s
    whole = [stream for stream in streams if stream.is_whole]
    if len(whole) < 2:
        raise RuntimeError(f"no stream came whole: {streams[0].problem}")
    ttft = [stream.times_s[0] - stream.arrival_s for stream in whole]
    itl = [late - early for stream in whole for early, late in itertools.pairwise(stream.times_s)]
    percents = [common.percentile(values, percent) for values in (ttft, itl) for percent in (50, 99)]
    return Measured(
        len(streams),
        round(sum(len(stream.times_s) for stream in streams) / seconds, 2),
        *(round(value, 4) for value in percents),
        *(late - early for late, early in zip(_counted(server), before, strict=True)),
        len(streams) - len(whole),
    )


def _counted(server: common.Server) -> tuple[int, int]:
    state = cluster_load.state(server)
    blocks = [host["kv_exchange"]["imported_blocks"] for host in state["hosts"].values()]
    return state["models"]["m"]["handed_over"], sum(blocks)


def run(*, mib: float, users: int, requests: int, seed: int, start_limit_s: float, logs: Path | None) -> Roles:
    """The whole bench."""
    result = Roles()
    with common.scratch(logs) as (folder, log_folder, _):
        path = sized_models.make_all(folder / "models", {"m": mib})["m"]
        memory = f"{round(1.3 * mib) + 160}MiB"
        pool = {
            "models": [{"name": "m", "model": str(path), "args": cluster_load.MODEL_ARGS}], "device_memory": memory,
            "host_memory": memory, "page_size": "1MiB", "weights": "movable",
        }  # fmt: skip
        for arm, cluster in ARMS.items():
            with ExitStack() as stack:
                log = log_folder / f"{arm}.log"
                server = cluster_load.start_cluster(stack, pool | {"cluster": cluster}, folder, log, 2, start_limit_s)
                _until_both(server)
                _measure(server, users, 2 * users, (64, 8), seed + 1)  # the first requests take longer
                for load, lengths in LOADS.items():
                    measured = _measure(server, users, requests, lengths, seed)
                    common.progress(f"{arm} {load}: {measured}")
                    _note(result, arm, load, measured)
    return result


def _until_both(server: common.Server) -> None:
    """Wait until both hosts serve the model."""
    deadline = time.monotonic() + 300
    while list(cluster_load.state(server)["models"]["m"]["hosts"].values()) != ["serving"] * 2:
        if time.monotonic() > deadline:
            raise TimeoutError("the second host does not serve the model")
        time.sleep(0.2)
    time.sleep(1.0)  # the frontend joins it


def _note(result: Roles, arm: str, load: str, measured: Measured) -> None:
    row = {key: getattr(measured, key) for key in Measured.__dataclass_fields__}
    result.runs[f"{arm}_{load}"] = row
    line = result.mixed if arm == "mixed" else result.split
    line |= {f"{load}_{key}": row[key] for key in ("tokens_per_s", "ttft_p50_s", "itl_p99_s")}
    result.handed_over += measured.handed_over
    result.lost += measured.lost


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--mib", type=float, default=64, help="size of the model (default: %(default)s)")
    parser.add_argument("--users", type=int, default=6, help="requests at a time (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=36, help="of each load (default: %(default)s)")
    keys = [f"{arm}_{load}_{key}" for load in LOADS for key in ("tokens_per_s", "ttft_p50_s", "itl_p99_s")
            for arm in ARMS]  # fmt: skip
    common.report("roles", run, parser.parse_args(), [*keys, "handed_over", "lost"])


if __name__ == "__main__":
    main()
