# SPDX-License-Identifier: Apache-2.0
"""What a model pays for a place in a pool on a GPU, and what turns cost when several models have work.

Two servers of models of real shape with random weights: a pool of `--models` models that all fit, and plain vLLM with
one. Both stay up; the load goes to one at a time, in rounds of alternating order.

    throughput_ratio_cN  tokens per second at N users of one model, pool / plain, as in bench/one_model_tax.py
    itl_p99_ratio_cN     99th percentile of the time between two token events, pool / plain
    idle_share           1 - tokens per second of all models with `--users` users each / those of one model alone: the
                         same steps are made in both, so what is lost is time in which the device waits between turns

Medians over rounds. On a CPU (`--device cpu`) tiny models take the place: that shows that the bench runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import one_model_tax as tax
from bench.gpu import rig
from bench.parts import common

KV_MIB = {"cuda": 4096, "cpu": 64}
"""Of each side, for all its models."""


@dataclass(frozen=True, slots=True)
class Turns:
    """One round of all models beside one of one model alone; tokens per second."""

    one: float
    all: float


@dataclass(frozen=True, slots=True)
class GpuTax:
    """Results; see the module."""

    gpu: dict[str, Any]
    throughput_ratio: dict[str, float]
    itl_p99_ratio: dict[str, float]
    idle_share: float
    turns: list[Turns]
    one_model: tax.OneModelTax
    """All that bench/one_model_tax.py tells."""


def run(
    *,
    device: str,
    shape: str,
    models: int,
    users: int,
    rounds: int,
    tokens: int,
    requests: int,
    graphs: bool,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> GpuTax:
    """Measure both; each user sends `requests` requests of `tokens` tokens in a round."""
    if device == "cuda":
        rig.require_cuda()
    names = [f"m{index}" for index in range(models)]
    with common.scratch(logs) as (folder, log_folder, stack):
        if device == "cuda":
            path, weight_mib = rig.make_model(folder / shape, shape), rig.weight_bytes(shape) >> 20
            flags = rig.model_flags(graphs)
        else:
            path, weight_mib, flags = *common.make_models(folder, ["llama"]).values(), 8, list(common.MODEL_FLAGS)
        words = {
            "pool": _pool_words(folder, path, names, flags, device, weight_mib),
            "plain": _plain_words(path, names[0], flags, device),
        }
        servers, ready_s = {}, {}
        for side in tax.SIDES:  # one after the other, so that each gets the whole machine to start
            served = names if side == "pool" else names[:1]
            servers[side] = common.Server(words[side], served, log_folder / f"{side}.log")
            stack.callback(servers[side].close)
            (ready_s[side],) = common.wait_until_ready([servers[side]], start_limit_s)
            common.progress(f"{side} ready after {ready_s[side]:.1f} s")
        for side in tax.SIDES:
            for name in servers[side].models:
                tax._load(servers, side, name, users, -1, seed=seed - 1, tokens=16, requests=2)
        runs, turns = [], []
        for number in range(rounds):
            for users_of_one in tax.CONCURRENCIES:
                for side in tax.SIDES if number % 2 == 0 else tax.SIDES[::-1]:
                    run_seed = seed * 10_000 + number * 100 + users_of_one  # the same prompts for both sides
                    made = tax._load(servers, side, names[0], users_of_one, number, run_seed, tokens, requests)
                    common.progress(f"round {number} c{users_of_one} {side}: {made.tokens_per_s:.0f} tokens/s")
                    runs.append(made)
            turns.append(_take_turns(servers["pool"], names, users, tokens, requests, seed * 10_000 + number))
            common.progress(f"round {number}: one {turns[-1].one:.0f}, all {turns[-1].all:.0f} tokens/s")
    one_model = tax._summarize(runs, ready_s)
    of_users = [f"c{count}" for count in tax.CONCURRENCIES]
    return GpuTax(
        gpu=rig.describe_gpu() if device == "cuda" else {},
        throughput_ratio={key: getattr(one_model, f"throughput_ratio_{key}") for key in of_users},
        itl_p99_ratio=one_model.itl_p99_ratio,
        idle_share=1 - statistics.median(pair.all / pair.one for pair in turns),
        turns=turns,
        one_model=one_model,
    )


def _take_turns(
    server: common.Server, names: Sequence[str], users: int, tokens: int, requests: int, seed: int
) -> Turns:
    def load(name: str, index: int) -> common.Load:
        prompts = common.random_prompts(seed + 1000 * index, users * requests, tax.PROMPT_TOKENS)
        return common.Load(server.port, name, prompts, users, tokens)

    alone_s, (alone,) = common.measure([load(names[0], 0)])
    all_s, seen = common.measure([load(name, index) for index, name in enumerate(names)])
    return Turns(alone.num_tokens / alone_s, sum(result.num_tokens for result in seen) / all_s)


def _pool_words(
    folder: Path, path: Path, names: Sequence[str], flags: Sequence[str], device: str, weight_mib: int
) -> list[str]:
    page_mib = rig.PAGE_BYTES >> 20 if device == "cuda" else 1
    pages = len(names) * (-(-weight_mib // page_mib) + 2) + KV_MIB[device] // page_mib
    config = {
        "models": [{"name": name, "model": str(path), "args": list(flags)} for name in names],
        "device_memory": f"{pages * page_mib}MiB",
        "page_size": f"{page_mib}MiB",
        "weights": "fixed",
        "scheduling": {"policy": "round_robin"},
    }
    pool_file = folder / "pool.yaml"
    pool_file.write_text(json.dumps(config))  # JSON is YAML
    return [*common.POOL, str(pool_file)]


def _plain_words(path: Path, name: str, flags: Sequence[str], device: str) -> list[str]:
    memory = ["--kv-cache-memory-bytes", str(KV_MIB[device] << 20)]
    if device == "cuda":  # what must be free beside the pool; the size of the KV cache is the one above
        memory += ["--gpu-memory-utilization", "0.3"]
    return [*common.PLAIN, "--model", str(path), "--served-model-name", name, *flags, *memory]


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--shape", choices=list(rig.SHAPES), default="8b", help="on a GPU (default: %(default)s)")
    add("--models", type=int, default=3, help="of the pool (default: %(default)s)")
    add("--users", type=int, default=8, help="of each model when all have work (default: %(default)s)")
    add("--rounds", type=int, default=5, help="pairs of runs per number of users (default: %(default)s)")
    add("--tokens", type=int, default=128, help="per request, at most 448 (default: %(default)s)")
    add("--requests", type=int, default=2, help="per user and run (default: %(default)s)")
    add("--graphs", action=argparse.BooleanOptionalAction, default=True, help="capture CUDA graphs (default: on)")
    keys = [f"{name}_ratio_c{count}" for name in ("throughput", "itl_p99") for count in tax.CONCURRENCIES]
    common.report("gpu_one_model_tax", run, parser.parse_args(words), [*keys, "idle_share"])


if __name__ == "__main__":
    main()
