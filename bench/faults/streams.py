# SPDX-License-Identifier: Apache-2.0
"""Greedy streams that run while something dies, and what became of them: what the benches of faults share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.parts import common
from bench.parts.cluster_load import greedy_tokens, problem_of

ADMIN_KEY = "chaos-admin-0123456"
_STREAM_LIMIT_S = 600.0


@dataclass(slots=True)
class Stream:
    """One greedy completion and when its tokens came."""

    model: str
    prompt: Sequence[int]
    num_tokens: int
    server: int = 0
    """Which of the servers it is sent to."""
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    problem: str = ""
    port: int = 0
    """This end of its connection."""

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What its tokens depend on."""
        return self.model, tuple(self.prompt)

    @property
    def is_whole(self) -> bool:
        """Whether it ended well, with all its tokens."""
        return not self.problem and len(self.tokens) >= self.num_tokens

    def longest_pause_s(self, since_s: float = 0.0) -> float:
        """Longest time without a token that ended after `since_s`."""
        pairs = itertools.pairwise(self.times_s)
        return max((late - max(early, since_s) for early, late in pairs if late > since_s), default=0.0)

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        """Send it and read it to its end."""
        _current.set(self)
        try:
            async for ids in greedy_tokens(session, url, self.model, self.prompt, self.num_tokens):
                self.tokens += ids
                self.times_s += [time.monotonic()] * len(ids)
        except Exception as error:  # whatever ends a stream loses it
            self.problem = problem_of(error)


_current: ContextVar[Stream] = ContextVar("current")
"""Whose connection is being made."""

Expected = Mapping[tuple[str, tuple[int, ...]], Sequence[int]]
"""The right tokens of streams, by their keys."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of streams."""

    broken: int
    """Streams whose connection was to what was killed, and that ended with it."""
    lost: int
    """Other streams that ended with an error, or without all their tokens."""
    wrong: int
    """Streams with a token that is not the right one at its place, the broken ones included."""
    duplicated: int
    """Streams with more tokens than they asked for."""
    problems: Sequence[str]
    """What the lost ones were told, and where wrong ones left the right tokens; five of each."""


def judge(streams: Sequence[Stream], expected: Expected, is_dead: Callable[[Stream], bool]) -> Verdict:
    """Compare every stream with the right tokens; `is_dead` says whose connection was to what was killed."""
    broken = [s for s in streams if s.problem and is_dead(s)]
    lost = [s for s in streams if not s.is_whole and not (s.problem and is_dead(s))]
    wrong = [found for s in streams if (found := _wrong_at(s, expected[s.key]))]
    return Verdict(
        broken=len(broken),
        lost=len(lost),
        wrong=len(wrong),
        duplicated=sum(len(s.tokens) > s.num_tokens for s in streams),
        problems=[*sorted({s.problem or "too few tokens" for s in lost})[:5], *wrong[:5]],
    )


def _wrong_at(stream: Stream, right: Sequence[int]) -> str:
    """Where a stream has a token that is not the right one; empty if nowhere."""
    pairs = enumerate(zip(stream.tokens[: stream.num_tokens], right, strict=False))
    first = next(((i, got, want) for i, (got, want) in pairs if got != want), None)
    if first is None:
        return ""
    prompt = " ".join(map(str, stream.prompt[:4]))
    return f"{stream.model}, prompt {prompt} ...: token {first[0]} is {first[1]}, not {first[2]}"


def plain_answers(paths: Mapping[str, Path], args: Mapping[str, Any], plan: Sequence[Stream]) -> Expected:
    """What plain vLLM answers, which has one model at a time, in a process without tokenpool."""
    from tests.helpers.plain import Case, RequestSpec, run_plain

    asked = {(stream.model, str(i)): stream for i, stream in enumerate(plan)}
    cases = []
    for name, path in paths.items():
        own = [RequestSpec(i, list(s.prompt), s.num_tokens) for (model, i), s in asked.items() if model == name]
        cases.append(Case(name, str(path), dict(args), own))
    told = run_plain([case for case in cases if case.requests], plain_gemm=True)
    return {stream.key: told[model][i].tokens for (model, i), stream in asked.items()}


class Player(ABC):
    """Servers of one pool, and the streams that run on them."""

    def __init__(self, servers: Sequence[common.Server], streams: Sequence[Stream]) -> None:
        self.servers, self._plan = list(servers), streams

    async def state(self, server: int = 0) -> dict[str, Any]:
        """`/v1/pool/state` of one of them."""
        found: dict[str, Any] = await asyncio.to_thread(
            self.servers[server].get, "/v1/pool/state", key=ADMIN_KEY, limit_s=60.0
        )
        return found

    @abstractmethod
    async def healed(self) -> dict[str, Any]:
        """Wait until nothing is missing any more; returns the state. RuntimeError if that takes too long."""

    async def play(self, disturb: Callable[[list[Stream]], Awaitable[None]] | None = None) -> list[Stream]:
        """Run all streams at once, and `disturb` beside them."""
        streams = [Stream(s.model, s.prompt, s.num_tokens, s.server) for s in self._plan]
        limits = aiohttp.ClientTimeout(total=_STREAM_LIMIT_S)
        async with contextlib.AsyncExitStack() as stack:
            sessions = []
            for server in self.servers:
                connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_maker(server))
                made = aiohttp.ClientSession(timeout=limits, connector=connector)
                sessions.append((await stack.enter_async_context(made), f"http://127.0.0.1:{server.port}"))
            running = [asyncio.create_task(stream.run(*sessions[stream.server])) for stream in streams]
            if disturb is not None:
                await disturb(streams)
            await asyncio.gather(*running)
        return streams

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


def _maker(server: common.Server) -> Callable[[Any], socket.socket]:
    def make(address: Any) -> socket.socket:
        """A socket where the server is, whose port is known before anybody may have died."""
        with server.inside():
            sock = socket.socket(*address[:3])
            sock.bind(("127.0.0.1", 0))
        _current.get().port = sock.getsockname()[1]
        return sock

    return make
