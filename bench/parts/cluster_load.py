# SPDX-License-Identifier: Apache-2.0
"""A pool on a Ray cluster of this machine, and timed streams on it: what the benches of a cluster share."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench.parts import common
from bench.parts.ray_nodes import ENV, RayNodes

ADMIN_KEY = "bench-admin-0123456"
MODEL_ARGS = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
_ENV = {**ENV, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENPOOL_LOG_LEVEL": "INFO"}  # fmt: skip


class StreamError(Exception):
    """What a server said instead of tokens, or after some."""


async def greedy_tokens(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], num_tokens: int
) -> AsyncIterator[list[int]]:
    """The ids of tokens as they come, to the end of the stream.

    Raises StreamError for another status than 200, and at the end for an error that came in the stream; what aiohttp
    raises for a connection that ends.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True}  # fmt: skip
    told: Any = None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise StreamError(f"status {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                told = chunk.get("error", told)
                if ids := [i for choice in chunk.get("choices", ()) for i in choice.get("token_ids") or ()]:
                    yield ids
    if told is not None:
        raise StreamError(str(told)[:200])


def problem_of(error: Exception) -> str:
    """A line for what ended a stream."""
    return str(error) if isinstance(error, StreamError) else f"{type(error).__name__}: {error}"


@dataclass(slots=True)
class Stream:
    """One greedy completion; times are those of `time.time`."""

    model: str
    prompt: Sequence[int]
    num_tokens: int
    arrival_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    """When each token came."""
    problem: str = ""

    async def run(self, session: aiohttp.ClientSession, port: int) -> None:
        """Send it and read it to its end."""
        self.arrival_s = time.time()
        try:
            async for ids in greedy_tokens(
                session, f"http://127.0.0.1:{port}", self.model, self.prompt, self.num_tokens
            ):
                self.times_s += [time.time()] * len(ids)
        except Exception as error:  # whatever ends a stream is counted
            self.problem = problem_of(error)

    @property
    def is_whole(self) -> bool:
        return not self.problem and len(self.times_s) == self.num_tokens


def start_cluster(
    stack: ExitStack, pool: Mapping[str, Any], folder: Path, log: Path, num_nodes: int, limit_s: float
) -> common.Server:
    """Start the nodes, one CPU each, and a server with its hosts there; waits until all models are served."""
    pool_file = folder / f"{log.stem}.yaml"
    pool_file.write_text(yaml.safe_dump({"admin_key": ADMIN_KEY, **pool}))
    nodes = stack.enter_context(RayNodes(num_nodes=num_nodes, cpus_per_node=1))
    names = [model["name"] for model in pool["models"]]
    words = (*common.POOL, str(pool_file), "--cluster", nodes.address)
    server = common.Server(words, names, log, **_ENV)
    stack.callback(server.close)
    common.wait_until_ready([server], limit_s)
    return server


def start_single(stack: ExitStack, pool: Mapping[str, Any], folder: Path, log: Path, limit_s: float) -> common.Server:
    """The same pool file without a cluster: one host."""
    pool_file = folder / f"{log.stem}.yaml"
    pool_file.write_text(yaml.safe_dump({"admin_key": ADMIN_KEY, **pool}))
    server = common.Server((*common.POOL, str(pool_file)), [m["name"] for m in pool["models"]], log, **_ENV)
    stack.callback(server.close)
    common.wait_until_ready([server], limit_s)
    return server


def decisions(server: common.Server) -> list[dict[str, Any]]:
    """What the controller decided so far, oldest first."""
    return server.get("/v1/pool/decisions", key=ADMIN_KEY, limit_s=60.0)["decisions"]


def state(server: common.Server) -> dict[str, Any]:
    """`/v1/pool/state`."""
    return server.get("/v1/pool/state", key=ADMIN_KEY, limit_s=60.0)
