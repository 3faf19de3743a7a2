# SPDX-License-Identifier: Apache-2.0
"""An open-loop client: sends each request of a trace at its time, whatever the server does, and notes every token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import uvloop

from bench.traces import TracedRequest
from tokenpool.config import SLO
from tokenpool.policy.slo import RequestRecord

_PLAIN_TOKENS = range(3, 512)  # of the models of the bench
_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
_LEAD_S = 0.5  # from the start to the trace's begin


@dataclass(slots=True)
class Outcome:
    """What the client saw of one request; times are wall-clock seconds."""

    request: TracedRequest
    arrival_s: float
    """When it was to be sent; due times count from here, also if the client was late."""
    sent_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    problem: str = ""
    """Why it did not end well."""

    def record(self, slo: SLO) -> RequestRecord:
        """For `attainments`. All tokens that a failed request did not get count as missed, its length being known."""
        failed_at_s = None
        if self.problem:  # when all of its tokens are due
            failed_at_s = self.arrival_s + slo.ttft_s + (self.request.output_len - 0.5) * slo.tpot_s
        return RequestRecord(self.arrival_s, slo, self.token_times_s, failed_at_s)

    def ttft_s(self) -> float | None:
        """Seconds to the first token; None without one."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None


def replay(port: int, trace: Sequence[TracedRequest], *, seed: int, drain_s: float) -> list[Outcome]:
    """Play a trace; requests that have not ended `drain_s` after the last arrival are given up."""
    return uvloop.run(_replay(port, trace, seed, drain_s))


async def _replay(port: int, trace: Sequence[TracedRequest], seed: int, drain_s: float) -> list[Outcome]:
    start_s, start = time.time() + _LEAD_S, asyncio.get_running_loop().time() + _LEAD_S
    outcomes = [Outcome(request, start_s + request.arrival_ms / 1e3) for request in trace]
    rng = random.Random(seed)
    bodies = [_body(request, rng) for request in trace]
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        url = f"http://127.0.0.1:{port}/v1/completions"
        tasks = [
            asyncio.create_task(_send(session, url, body, outcome, start + outcome.request.arrival_ms / 1e3))
            for body, outcome in zip(bodies, outcomes, strict=True)
        ]
        _, late = await asyncio.wait(tasks, timeout=_LEAD_S + trace[-1].arrival_ms / 1e3 + drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if not outcome.problem and len(outcome.token_times_s) != outcome.request.output_len:
            outcome.problem = "not done at the end"
    return outcomes


def _body(request: TracedRequest, rng: random.Random) -> bytes:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": usage}
    prompt = rng.choices(_PLAIN_TOKENS, k=request.input_len)  # no common prefix: no prefix cache helps
    return json.dumps({"model": request.model, "prompt": prompt, "max_tokens": request.output_len, **fixed}).encode()


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, outcome: Outcome, at: float) -> None:
    await asyncio.sleep(at - asyncio.get_running_loop().time())
    outcome.sent_s = time.time()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                outcome.problem = f"status {response.status}: {(await response.text())[:300]}"
                return
            await _read_events(response, outcome)
    except aiohttp.ClientError as error:
        outcome.problem = f"{type(error).__name__}: {error}"


async def _read_events(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    rest = b""
    async for chunk in response.content.iter_any():
        now_s = time.time()
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            count = _COUNT.search(event)  # so far; an event may bring several tokens
            if count is not None:
                new = int(count[1]) - len(outcome.token_times_s)
                outcome.token_times_s += [now_s] * new
            elif event != b"data: [DONE]":
                outcome.problem = event[:300].decode(errors="replace")


def counts(outcomes: Sequence[Outcome]) -> Mapping[str, int]:
    """How many requests ended well, and the others by the begin of what happened."""
    found: dict[str, int] = {}
    for outcome in outcomes:
        key = outcome.problem[:80] or "done"
        found[key] = found.get(key, 0) + 1
    return found


async def _wait_until_idle(url: str, limit_s: float) -> None:
    async with aiohttp.ClientSession() as session:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as response:
                    if (await response.json())["server_load"] == 0:
                        return
            await asyncio.sleep(0.2)
    raise TimeoutError(f"requests are still in flight {limit_s:g} s after their clients went away")


def wait_until_idle(port: int, limit_s: float = 60.0) -> None:
    """Wait until the server has no request any more; raises TimeoutError."""
    uvloop.run(_wait_until_idle(f"http://127.0.0.1:{port}/load", limit_s))
