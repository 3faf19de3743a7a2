# SPDX-License-Identifier: Apache-2.0
"""What one more model costs a pool that already runs: seconds and bytes of the 2nd ... Nth model.

A pool starts with one model; each further one is added by POST /v1/pool/models and asked once.

    extra_model_s   seconds of the POST, from send to answer, median over models; lower is better
    extra_model_mb  growth of the resident memory (PSS, 10**6 bytes) of frontend and host from before the POST to after
                    the model's first request, median over models; lower is better

Models cycle through six architectures, so with 8 models the last two are of an architecture that the host knows, the
five before are new to it. vLLM's cache on disk of what it found out about architectures is empty at the start; with
--warm-cache the user's own is used.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common

KINDS = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe")
PROMPT_TOKENS = 64
PAGES_PER_MODEL_MIB = 16
ADMIN_KEY = "bench-admin-0123456"


@dataclass(frozen=True, slots=True)
class ExtraModel:
    """The cost of one model; `memory` is that of frontend and host, `host` of the host alone; PSS in bytes."""

    name: str
    new_architecture: bool
    post_s: float
    host_build_s: float
    """The part of `post_s` that the host's loop was busy with this model and served no other."""
    first_request_s: float
    memory_after_post_bytes: int
    memory_bytes: int
    """With the first request; what `extra_model_mb` is made of."""
    anon_memory_bytes: int
    host_memory_after_post_bytes: int
    host_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Bringup:
    """Medians over the further models; see the module."""

    extra_model_s: float
    extra_model_mb: float
    host_build_s: float
    host_extra_model_mb: float
    known_architecture_s: float | None
    """`extra_model_s` of those whose architecture was in the host already; None with fewer than 7 models."""
    new_architecture_s: float
    first_model_ready_s: float
    first_model_memory_bytes: dict[str, int]
    better: dict[str, str]
    extra_models: list[ExtraModel]


def run(*, models: int, warm_cache: bool, seed: int, start_limit_s: float, logs: Path | None) -> Bringup:
    """Start a pool with one model and add `models` - 1 more."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = common.make_models(folder, [KINDS[i % len(KINDS)] for i in range(models)])
        flags = list(common.MODEL_FLAGS)
        entries: list[dict[str, Any]] = [{"name": n, "model": str(p), "args": flags} for n, p in paths.items()]
        memory = {"device_memory": f"{PAGES_PER_MODEL_MIB * models}MiB", "page_size": "1MiB"}
        pool_file = folder / "pool.yaml"
        pool_file.write_text(json.dumps({"models": entries[:1], "admin_key": ADMIN_KEY, **memory}))  # JSON is YAML
        env = {} if warm_cache else {"VLLM_CACHE_ROOT": str(folder / "cache")}
        server = common.Server([*common.POOL, str(pool_file)], [entries[0]["name"]], log_folder / "pool.log", **env)
        stack.callback(server.close)
        (ready_s,) = common.wait_until_ready([server], start_limit_s)
        _ask(server, entries[0]["name"], seed)
        first_memory = common.memory_of(process.pid for process in server.tree())
        extra = []
        for i, entry in enumerate(entries[1:], start=1):
            extra.append(_add(server, entry, i < len(KINDS), seed + i, start_limit_s))
            common.progress(str(extra[-1]))
    return _summarize(extra, ready_s, first_memory)


def _ask(server: common.Server, name: str, seed: int) -> float:
    prompts = common.random_prompts(seed, 1, PROMPT_TOKENS)
    return common.measure([common.Load(server.port, name, prompts, 1, 16)])[0]


def _add(server: common.Server, entry: dict[str, Any], is_new: bool, seed: int, limit_s: float) -> ExtraModel:
    host_pid = server.get("/v1/pool/state", key=ADMIN_KEY)["host_pid"]

    def memory() -> tuple[dict[str, int], int]:
        return common.memory_of(process.pid for process in server.tree()), common.memory_of([host_pid])["pss"]

    before, host_before = memory()
    start = time.perf_counter()
    added = server.get("/v1/pool/models", key=ADMIN_KEY, body=entry, limit_s=limit_s)
    post_s = time.perf_counter() - start
    after_post, host_after_post = memory()
    first_request_s = _ask(server, entry["name"], seed)
    after, host_after = memory()
    return ExtraModel(
        name=entry["name"],
        new_architecture=is_new,
        post_s=post_s,
        host_build_s=added["build_s"],
        first_request_s=first_request_s,
        memory_after_post_bytes=after_post["pss"] - before["pss"],
        memory_bytes=after["pss"] - before["pss"],
        anon_memory_bytes=after["pss_anon"] - before["pss_anon"],
        host_memory_after_post_bytes=host_after_post - host_before,
        host_memory_bytes=host_after - host_before,
    )


def _summarize(extra: list[ExtraModel], ready_s: float, first_memory: dict[str, int]) -> Bringup:
    known = [model.post_s for model in extra if not model.new_architecture]
    return Bringup(
        extra_model_s=statistics.median(model.post_s for model in extra),
        extra_model_mb=statistics.median(model.memory_bytes for model in extra) / 1e6,
        host_build_s=statistics.median(model.host_build_s for model in extra),
        host_extra_model_mb=statistics.median(model.host_memory_bytes for model in extra) / 1e6,
        known_architecture_s=statistics.median(known) if known else None,
        new_architecture_s=statistics.median(model.post_s for model in extra if model.new_architecture),
        first_model_ready_s=ready_s,
        first_model_memory_bytes=first_memory,
        better={"extra_model_s": "lower", "extra_model_mb": "lower"},
        extra_models=extra,
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=8, help="with the first, at least 2 (default: %(default)s)")
    parser.add_argument("--warm-cache", action="store_true", help="use the user's cache of architectures")
    common.report("bringup", run, parser.parse_args(), ["extra_model_s", "extra_model_mb"])


if __name__ == "__main__":
    main()
