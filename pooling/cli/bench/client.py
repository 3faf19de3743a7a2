# SPDX-License-Identifier: Apache-2.0
"""An open-loop client: sends each request at its time, whatever the server does, and notes every token.

Requests are completions of random token ids, so their prompts have exactly the lengths asked for and no common prefix,
and their answers go on to the end of theirs (`ignore_eos`). Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from tokenpool.config import SLO
from tokenpool.policy.slo import RequestRecord

PLAIN_TOKENS = range(3, 512)
"""Ids of prompts: in the vocabulary of every model that we know of, and none of its special tokens."""

_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
_LEAD_S = 0.5  # from the start to the begin of the trace
_PROGRESS_S = 5.0


class BenchRequest(NamedTuple):
    """One request to be sent."""

    arrival_s: float
    """When, from the begin on."""
    model: str
    input_len: int
    output_len: int
    tenant: str = ""
    """Who sends it; its key is looked up by this name."""


@dataclass(slots=True)
class Outcome:
    """What the client saw of one request; times are wall-clock seconds."""

    request: Any
    """What was sent; has at least `input_len` and `output_len`."""
    arrival_s: float
    """When it was to be sent; due times count from here, also if the client was late."""
    sent_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    problem: str = ""
    """Why it did not end well; the part before the first colon is its kind."""

    def record(self, slo: SLO) -> RequestRecord:
        """For `attainments`. All tokens that a failed request did not get count as missed, its length being known."""
        failed_at_s = None
        if self.problem:  # when all of its tokens are due
            failed_at_s = self.arrival_s + slo.ttft_s + (self.request.output_len - 0.5) * slo.tpot_s
        return RequestRecord(self.arrival_s, slo, self.token_times_s, failed_at_s)

    def ttft_s(self) -> float | None:
        """Seconds to the first token; None without one."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    def tpot_s(self) -> float | None:
        """Mean seconds per further token; None with less than two."""
        count = len(self.token_times_s)
        return (self.token_times_s[-1] - self.token_times_s[0]) / (count - 1) if count > 1 else None


async def replay(
    url: str,
    requests: Sequence[BenchRequest],
    *,
    seed: int,
    drain_s: float,
    keys: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Send requests, in order of arrival, to the server at `url`; give up what has not ended `drain_s` after the last.

    `keys` are API keys by tenant. `seed` names the prompts: another one gives others, which no prefix cache knows.
    """
    start_s, start = time.time() + _LEAD_S, asyncio.get_running_loop().time() + _LEAD_S
    outcomes = [Outcome(request, start_s + request.arrival_s) for request in requests]
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        tasks = [
            asyncio.create_task(_send(session, url, outcome, start, f"{seed} {i}", keys or {}))
            for i, outcome in enumerate(outcomes)
        ]
        reporter = asyncio.create_task(_report(outcomes, progress)) if progress else None
        _, late = await asyncio.wait(tasks, timeout=_LEAD_S + requests[-1].arrival_s + drain_s)
        for task in [*late, *filter(None, [reporter])]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if not outcome.problem and len(outcome.token_times_s) != outcome.request.output_len:
            outcome.problem = "not done at the end"
    return outcomes


def _body(request: BenchRequest, seed: str) -> bytes:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": usage}
    prompt = random.Random(seed).choices(PLAIN_TOKENS, k=request.input_len)
    return json.dumps({"model": request.model, "prompt": prompt, "max_tokens": request.output_len, **fixed}).encode()


async def _send(
    session: aiohttp.ClientSession, url: str, outcome: Outcome, start: float, seed: str, keys: Mapping[str, str]
) -> None:
    loop, at = asyncio.get_running_loop(), start + outcome.request.arrival_s
    await asyncio.sleep(at - _LEAD_S - loop.time())
    body = _body(outcome.request, seed)  # no earlier: a long trace has gigabytes of prompts
    await asyncio.sleep(at - loop.time())
    outcome.sent_s = time.time()
    headers = {"Content-Type": "application/json"}
    if key := keys.get(outcome.request.tenant):
        headers["Authorization"] = f"Bearer {key}"
    try:
        async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
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
                outcome.problem = f"error in the stream: {event[:300].decode(errors='replace')}"


async def _report(outcomes: Sequence[Outcome], progress: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        sent = sum(outcome.sent_s > 0 for outcome in outcomes)
        done = sum(len(outcome.token_times_s) == outcome.request.output_len for outcome in outcomes)
        failed = sum(bool(outcome.problem) for outcome in outcomes)
        progress(f"{sent} of {len(outcomes)} sent, {done} done, {failed} failed")


def counts(outcomes: Sequence[Outcome], *, by_kind: bool = False) -> dict[str, int]:
    """How many requests ended well (`done`), and the others by what happened, or by its kind alone."""
    texts = (o.problem.partition(":")[0] if by_kind else o.problem[:80] for o in outcomes)
    return dict(Counter(text or "done" for text in texts))


async def wait_until_idle(url: str, limit_s: float = 60.0, key: str = "") -> None:
    """Wait until the server has no request any more; raises TimeoutError. `key` is any that it takes."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/load") as response:
                    if (await response.json())["server_load"] == 0:
                        return
            await asyncio.sleep(0.2)
    raise TimeoutError(f"requests are still in flight {limit_s:g} s after their clients went away")
