# SPDX-License-Identifier: Apache-2.0
"""What the hosts and the controller of a cluster answer when a server asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tokenpool.cluster.session import Session
from tokenpool.cluster.values import ClusterView
from tokenpool.errors import HostError, PoolError
from tokenpool.serve.clustered.head_watch import HeadWatch
from tokenpool.serve.clustered.seat_follower import SeatFollower
from tokenpool.serve.pool.models import PoolModel
from tokenpool.wire.trace import chrome_traces

_CALL_LIMIT_S = 30.0
_LOOKS = ("state", "load", "progress", "metrics", "logs")
_LOOK_LIMIT_S = 5.0
"""For what is asked all the time; a host that builds a model answers late."""


class HostQuestions:
    """The part of `Hosts` that changes nothing."""

    def __init__(self, session: Session) -> None:
        self.followers: dict[str, SeatFollower] = {}
        """By model; one that is being added has none before it is prepared."""
        self.view: ClusterView | None = None
        """The last one."""
        self.head = HeadWatch(session.look_at_head)
        """Ray's, which requests do not need."""
        self.is_alone = False
        """Whether neither Ray's head nor a host has answered for a while."""
        self._session = session

    # -- the hosts -----------------------------------------------------------------------------------

    @property
    def overdue(self) -> frozenset[str]:
        """Hosts that nobody should count on now."""
        if self.view is None:
            return frozenset()
        return frozenset(self.view.hosts) if self.is_alone else self.view.overdue

    async def ask_as_one(self, method: str, *args: Any) -> Any:
        """Ask all hosts and make one answer of theirs: `load`, `check` or `progress`."""
        answers = await self.ask(method, *args)
        errors = [answer for answer in answers.values() if isinstance(answer, Exception)]
        if method == "check" and errors:
            raise errors[0]
        if method == "load":
            best: dict[str, Any] = {}
            for loads in answers.values():
                for name, load in {} if isinstance(loads, Exception) else loads.items():
                    if name not in best or load["first_token_in_s"] < best[name]["first_token_in_s"]:
                        best[name] = load
            return best
        if method == "progress":  # the build of one host stands for all
            builds = (answer for answer in answers.values() if answer and not isinstance(answer, Exception))
            return next(builds, None)
        return answers

    async def ask(self, method: str, *args: Any) -> dict[str, Any]:
        """Each host's answer, or the exception that came instead."""
        names = list(self.view.hosts) if self.view is not None else []
        calls = (self.ask_one(name, method, *args) for name in names)
        return dict(zip(names, await asyncio.gather(*calls, return_exceptions=True), strict=True))

    async def ask_one(self, name: str, method: str, *args: Any) -> Any:
        """What one host answers; raises what it raises."""
        try:
            async with asyncio.timeout(_LOOK_LIMIT_S if method in _LOOKS else _CALL_LIMIT_S):
                return await (await self._session.host(name)).call.remote(method, *args)
        except Exception as error:
            self._session.look_again(name, error)
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception):
                raise cause from error
            raise HostError(f"{name} does not answer {method}: {type(error).__name__}") from error

    async def tell(self, method: str, *args: Any) -> Any:
        """Call the controller; raises what the call raises."""
        return await self._session.tell(method, *args)

    # -- what is told --------------------------------------------------------------------------------

    async def report(self) -> dict[str, Any]:
        """See Hosts; every host's own state, and what the controller says."""
        answers = await self.ask("state")
        hosts = {n: {"error": str(a)} if isinstance(a, Exception) else a for n, a in answers.items()}
        cluster: dict[str, Any] = {}
        if (view := self.view) is not None:
            cluster = {"epoch": view.epoch, "revision": view.revision, "hosts": view.hosts, "roles": view.roles}
            cluster["draining"] = sorted(view.draining)
            if (count := view.host_count) is not None:
                cluster["host_count"] = {"min": count.least, "max": count.most, "pending": list(count.pending)}
                cluster["host_count"]["leaving"] = list(count.leaving)
            cluster["servers"] = [{"name": p.name, "address": p.address, "pid": p.pid} for p in view.peers]
        try:
            async with asyncio.timeout(_LOOK_LIMIT_S):
                described = await self.tell("describe")
        except Exception as error:  # it may be away
            described = {"error": type(error).__name__}
        cluster |= {"controller": described, "head": self.head.told()}
        return {"host_pid": None, "host_restarts": 0, "host": None, "cluster": cluster, "hosts": hosts}

    def report_on(self, model: PoolModel) -> dict[str, Any]:
        """See Hosts; where the model is."""
        follower, seats = self.followers.get(model.name), self.view.models.get(model.name) if self.view else None
        return {
            "hosts": follower.standing(seats) if follower and seats else {},
            "handed_over": follower.num_handed_over if follower else 0,
        }

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """See Hosts; each host as a process of its own."""
        answers = await self.ask("trace", last_s)
        events = {host: answer for host, answer in sorted(answers.items()) if not isinstance(answer, Exception)}
        return await asyncio.to_thread(chrome_traces, events)

    async def metrics(self) -> dict[str, str]:
        """See Hosts; a host that does not answer is not in it."""
        answers = await self.ask("metrics")
        return {host: answer for host, answer in answers.items() if not isinstance(answer, Exception)}

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """See Hosts; raises HostError while the controller is away."""
        decided: list[dict[str, Any]] = await self._ask_controller("decisions", limit)
        return decided

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """See Hosts."""
        answers = await self.ask("logs", dict(seen))
        return [
            line | {"process": host}
            for host, lines in answers.items()
            for line in ([] if isinstance(lines, Exception) else lines)
        ]

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Hosts."""
        models: list[str] = await self._ask_controller("drain", host, is_wanted)
        return models

    async def _ask_controller(self, method: str, *args: Any) -> Any:
        """What it answers; raises the PoolError with which it refuses, and HostError while it is away."""
        try:
            return await self.tell(method, *args)
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PoolError):
                raise cause from None
            raise HostError(f"the controller does not answer: {type(error).__name__}") from error

    async def check(self) -> None:
        """See Hosts."""
        await self.ask_as_one("check")
