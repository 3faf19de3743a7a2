# SPDX-License-Identifier: Apache-2.0
"""Many small models in one pool, against one plain vLLM server for each of them, on the same cores.

Each side is started, measured and stopped alone, in passes of alternating order. Every ratio is pool / separate, the
median over passes:

    rss_ratio         resident memory of all processes (PSS) after one request to each model; lower is better
    ready_ratio       seconds until all models can be asked; the separate servers start all at once; lower is better
    throughput_ratio  tokens per second with two users per model, until all users are done; higher is better

Both sides have the same KV memory in sum. Architectures are inspected before the first pass, as after any earlier
start on the same machine. VLLM_CPU_OMP_THREADS_BIND and OMP_NUM_THREADS are left as the caller has them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common

KINDS = ("llama", "qwen2", "qwen3", "gemma3")
PROMPT_TOKENS = 64
USERS_PER_MODEL = 2
KV_MIB = 16  # per model
WEIGHT_MIB = 8  # per model: the pool's budget holds the weights too
SIDES = ("pool", "separate")


@dataclass(frozen=True, slots=True)
class Pass:
    """One side, from start to stop."""

    side: str
    ready_s: float
    ready_each_s: list[float]
    processes: int
    memory_bytes: dict[str, int]
    tokens_per_s: float
    itl_p50_ms: float
    itl_p99_ms: float
    ttft_p50_ms: float
    cpu_ms_per_token: float


@dataclass(frozen=True, slots=True)
class ManyModels:
    """Ratios pool / separate; see the module."""

    rss_ratio: float
    ready_ratio: float
    throughput_ratio: float
    pss_anon_ratio: float
    """As `rss_ratio` without what belongs to files, such as shared libraries."""
    cpu_per_token_ratio: float
    better: dict[str, str]
    passes: list[Pass]


def run(
    *, models: int, passes: int, tokens: int, requests: int, seed: int, start_limit_s: float, logs: Path | None
) -> ManyModels:
    """Measure both sides in `passes` passes; each user sends `requests` requests of `tokens` tokens."""
    done: list[Pass] = []
    with common.scratch(logs) as (folder, log_folder, _):
        paths = common.make_models(folder, [KINDS[i % len(KINDS)] for i in range(models)])
        pool_file = _write_pool_file(folder / "pool.yaml", paths)
        common.progress("inspecting architectures")
        command = [sys.executable, "-m", "tokenpool.cli.main", "validate", str(pool_file)]
        subprocess.run(command, check=True, capture_output=True)
        for number in range(passes):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                with ExitStack() as stack:
                    servers = _start(stack, side, paths, pool_file, log_folder / f"{side}-{number}")
                    done.append(_measure(side, servers, list(paths), tokens, requests, seed, start_limit_s))
                common.progress(str(done[-1]))
    return _summarize(done)


def _write_pool_file(file: Path, paths: dict[str, Path]) -> Path:
    entries = [{"name": n, "model": str(p), "args": list(common.MODEL_FLAGS)} for n, p in paths.items()]
    memory = {"device_memory": f"{(KV_MIB + WEIGHT_MIB) * len(paths)}MiB", "page_size": "1MiB"}
    file.write_text(json.dumps({"models": entries, **memory}))  # JSON is YAML
    return file


def _start(stack: ExitStack, side: str, paths: dict[str, Path], pool_file: Path, logs: Path) -> list[common.Server]:
    commands = {"pool": (list(paths), [*common.POOL, str(pool_file)])}
    if side == "separate":
        memory = ["--kv-cache-memory-bytes", str(KV_MIB << 20)]
        flags = [*common.MODEL_FLAGS, *memory, "--served-model-name"]
        commands = {n: ([n], [*common.PLAIN, "--model", str(path), *flags, n]) for n, path in paths.items()}
    servers = []
    for file_name, (names, words) in commands.items():
        servers.append(common.Server(words, names, logs / f"{file_name}.log"))
        stack.callback(servers[-1].close)
    return servers


def _measure(
    side: str,
    servers: list[common.Server],
    names: list[str],
    tokens: int,
    requests: int,
    seed: int,
    start_limit_s: float,
) -> Pass:
    ready_each_s = common.wait_until_ready(servers, start_limit_s)
    ready_s = max(ready_each_s) + servers[-1].started_s - servers[0].started_s
    ports = [servers[0].port] * len(names) if side == "pool" else [server.port for server in servers]

    def loads(users: int, per_user: int, max_tokens: int, first_seed: int) -> list[common.Load]:
        return [
            common.Load(
                port, name, common.random_prompts(first_seed + i, users * per_user, PROMPT_TOKENS), users, max_tokens
            )
            for i, (port, name) in enumerate(zip(ports, names, strict=True))
        ]

    common.measure(loads(1, 1, 16, seed * 10_000 + 5_000))
    processes = [process.pid for server in servers for process in server.tree()]
    memory_bytes = common.memory_of(processes)
    common.measure(loads(USERS_PER_MODEL, 1, 16, seed * 10_000 + 6_000))
    cpu_s = sum(server.cpu_s() for server in servers)
    wall_s, seen = common.measure(loads(USERS_PER_MODEL, requests, tokens, seed * 10_000))
    cpu_s = sum(server.cpu_s() for server in servers) - cpu_s
    num_tokens = sum(result.num_tokens for result in seen)
    itl_s = [value for result in seen for value in result.itl_s]
    return Pass(
        side=side,
        ready_s=ready_s,
        ready_each_s=ready_each_s,
        processes=len(processes),
        memory_bytes=memory_bytes,
        tokens_per_s=num_tokens / wall_s,
        itl_p50_ms=common.percentile(itl_s, 50) * 1e3,
        itl_p99_ms=common.percentile(itl_s, 99) * 1e3,
        ttft_p50_ms=statistics.median(value for result in seen for value in result.ttft_s) * 1e3,
        cpu_ms_per_token=cpu_s / num_tokens * 1e3,
    )


def _summarize(passes: list[Pass]) -> ManyModels:
    rows = [{**asdict(item), **item.memory_bytes} for item in passes]

    def ratio(key: str) -> float:
        pool, separate = ([float(row[key]) for row in rows if row["side"] == side] for side in SIDES)
        return statistics.median(a / b for a, b in zip(pool, separate, strict=True))

    return ManyModels(
        rss_ratio=ratio("pss"),
        ready_ratio=ratio("ready_s"),
        throughput_ratio=ratio("tokens_per_s"),
        pss_anon_ratio=ratio("pss_anon"),
        cpu_per_token_ratio=ratio("cpu_ms_per_token"),
        better={"rss_ratio": "lower", "ready_ratio": "lower", "throughput_ratio": "higher"},
        passes=passes,
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=8, help="number of models (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=2, help="of both sides (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="per request, at most 448 (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="per user (default: %(default)s)")
    common.report("many_models", run, parser.parse_args(), ["rss_ratio", "ready_ratio", "throughput_ratio"])


if __name__ == "__main__":
    main()
