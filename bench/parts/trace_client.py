# SPDX-License-Identifier: Apache-2.0
"""Plays traces of bench/parts/traces.py with the client of `tokenpool bench serve`."""

from __future__ import annotations

from collections.abc import Sequence

import uvloop

from bench.parts.traces import TracedRequest
from tokenpool.cli.bench import client as bench_client
from tokenpool.cli.bench.client import BenchRequest, Outcome, counts

__all__ = ["Outcome", "counts", "replay", "wait_until_idle"]


def replay(port: int, trace: Sequence[TracedRequest], *, seed: int, drain_s: float) -> list[Outcome]:
    """Play a trace; requests that have not ended `drain_s` after the last arrival are given up."""
    requests = [BenchRequest(r.arrival_ms / 1e3, r.model, r.input_len, r.output_len) for r in trace]
    outcomes = uvloop.run(bench_client.replay(f"http://127.0.0.1:{port}", requests, seed=seed, drain_s=drain_s))
    for outcome, request in zip(outcomes, trace, strict=True):
        outcome.request = request
    return outcomes


def wait_until_idle(port: int) -> None:
    """Wait until the server has no request any more; raises TimeoutError."""
    uvloop.run(bench_client.wait_until_idle(f"http://127.0.0.1:{port}"))
