# SPDX-License-Identifier: Apache-2.0
"""Engine hosts that are spread over a Ray cluster, where its controller decides which of them has which model.

The controller may die at any time: requests go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter as Totals
from collections.abc import Callable, Mapping
from secrets import token_hex
from typing import Any

from tokenpool.cluster.session import Session
from tokenpool.cluster.values import ClusterView, Deployment
from tokenpool.errors import HostError, PoolError
from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.policy.routing import LOADS_PERIOD_S
from tokenpool.process.ending import HOST_END_S, KILL_S, within
from tokenpool.process.keeper import Work, start_kept
from tokenpool.serve.clustered.no_lending import NoLending
from tokenpool.serve.clustered.seat_follower import SeatFollower
from tokenpool.serve.pool.host_watch import HostWatch, follow_forecasts
from tokenpool.serve.pool.models import Models, PoolModel
from tokenpool.wire.trace import chrome_traces

logger = logging.getLogger(__name__)

_DECISIONS = metric("decisions").make()
_RETRY_S = 0.2
_CALL_LIMIT_S = 30.0
_LOOKS = ("state", "load", "progress", "metrics", "logs")
_LOOK_LIMIT_S = 5.0
"""For what is asked all the time; a host that builds a model answers late."""
_RETRY_CALLS_S = 60.0
_RAY_END_S = 4.0
_UNLOAD_LIMIT_S = 120.0


class RayHosts:
    """See `Hosts`."""

    def __init__(
        self, models: Models, session: Session, make_follower: Callable[[PoolModel, int, RayHosts], SeatFollower]
    ) -> None:
        """`make_follower` makes what follows the seats of a model, given the revision of the pool that it is of."""
        self.followers: dict[str, SeatFollower] = {}
        """By model; one that is being added has none before it is prepared."""
        self.view: ClusterView | None = None
        """The last one."""
        self.loads: dict[str, Any] = {}
        """What hosts told last of their queues; an exception where none came."""
        self.lending = NoLending()
        """See Hosts."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called when they have ended."""
        self._models = models
        self._session = session
        self._make_follower = make_follower
        self._revision = 1
        self._frontend = token_hex(4)
        self._deployments: dict[str, Deployment] = {}
        self._counted: Totals[tuple[int, str]] = Totals()
        self._following: asyncio.Task[None] | None = None
        self.watch = HostWatch(models.apps, lambda: self.ask_as_one)

    # -- life ----------------------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        """See Hosts; a host that is away comes back."""
        return True

    @property
    def is_alive(self) -> bool:
        """See Hosts."""
        return self.view is not None and bool(self.view.hosts.keys() - self.view.overdue)

    @property
    def has_started(self) -> bool:
        """See Hosts; models that are loading say so themselves."""
        return True

    async def may_listen(self) -> None:
        """See Hosts: at once, while models load."""

    async def start(self) -> None:
        """See Hosts."""
        for model in self._models.values():
            await self._want(model)
        self._following = start_kept("following the controller", self._follow)
        # What no host takes is `failed` by now; the controller tries it again.
        await asyncio.gather(*(self._until_served(name) for name in list(self.followers)), return_exceptions=True)

    def works(self) -> Mapping[str, Work]:
        """See Hosts."""
        return {
            "following nodes": self._session.follow_nodes,
            "asking for queues": self._ask_loads,
            "asking for forecasts": lambda: follow_forecasts(self._models.apps, lambda: self.ask_as_one),
        }

    def freeze(self) -> None:
        """See Hosts; views are still followed, for requests go on."""

    async def stop(self) -> None:
        """End all hosts, and what Ray has here."""
        ending = self._session.stop(max(1.0, HOST_END_S - _RAY_END_S))
        await within(HOST_END_S + KILL_S, "stopping the hosts", ending)
        if self._following is not None:
            self._following.cancel()
        self.on_stop()

    async def _ask_loads(self) -> None:
        """Ask hosts for their queues and where weights are, while a model has several to choose from."""
        while True:
            await asyncio.sleep(LOADS_PERIOD_S)
            shared = [follower for follower in self.followers.values() if len(follower.hosts) > 1]
            if shared:
                self.loads = await self.ask("load")
                for follower in shared:
                    follower.learn(self.loads)

    # -- the hosts -----------------------------------------------------------------------------------

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
                return await self._session.hosts[name].call.remote(method, *args)
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception):
                raise cause from error
            raise HostError(f"{name} does not answer {method}: {type(error).__name__}") from error

    # -- the controller ------------------------------------------------------------------------------

    async def tell(self, method: str, *args: Any) -> Any:
        """Call the controller; raises what the call raises."""
        return await getattr(self._session.controller, method).remote(*args)

    async def _insist(self, method: str, *args: Any) -> None:
        """Tell the controller, again while it is being restarted."""
        for _ in range(int(_RETRY_CALLS_S / _RETRY_S)):
            try:
                await self.tell(method, *args)
                return
            except Exception as error:
                logger.debug("controller does not hear %s: %s", method, error)
                await asyncio.sleep(_RETRY_S)
        raise HostError("the controller does not answer")

    async def _follow(self) -> None:
        epoch = version = -1
        while True:
            try:
                view = await self.tell("watch", self._frontend, epoch, version)
                if view is None:
                    wanted = list(self._deployments.values())
                    await self.tell("attach", self._frontend, self._revision, wanted)
                    continue
            except Exception as error:
                if epoch >= 0 and not self.watch.stopping:
                    logger.warning("controller is away, serving goes on: %s", type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                continue
            epoch, version = view.epoch, view.version
            try:
                self._apply(view)
            except Exception:  # the next view is complete, too
                logger.exception("view not applied")

    def _apply(self, view: ClusterView) -> None:
        self.view = view
        for action, count in view.num_decisions.items():
            new = count - self._counted[view.epoch, action]
            self._counted[view.epoch, action] = count
            _DECISIONS.labels(action).inc(max(0, new))
        for name, follower in self.followers.items():
            follower.apply(view.models.get(name), view.hosts, view.roles, view.overdue)

    def show(self, follower: SeatFollower) -> None:
        """Let the router know whether a model takes requests."""
        model = self._models.get(follower.plan.spec.name)
        if model is None or model.app.state == Life.DRAINING:
            return
        if follower.is_served:
            model.answer_with(follower.client)
            model.served()
        elif follower.error is not None and model.error is None:
            model.fail(follower.error, tried_by="the controller")
        elif model.app.state == Life.READY:
            model.suspend()

    # -- models --------------------------------------------------------------------------------------

    async def _want(self, model: PoolModel) -> None:
        follower = self._make_follower(model, self._revision, self)
        await follower.prepare()
        self._deployments[model.name] = await follower.deployment()
        self.followers[model.name] = follower

    async def _until_served(self, name: str) -> None:
        """Wait for the first host of a model; raises what the hosts said when none takes it."""
        follower = self.followers[name]
        while not follower.is_served:
            if follower.error is not None:
                raise follower.error
            follower.changed.clear()
            await follower.changed.wait()

    async def add(self, model: PoolModel) -> None:
        """See Hosts."""
        self._revision += 1
        await self._want(model)
        try:
            await self._insist("deploy", self._deployments[model.name], self._revision)
            await self._until_served(model.name)
        except BaseException:
            await self._withdraw(model.name)
            await self.followers.pop(model.name).close()
            model.client = None
            raise

    async def retry(self, model: PoolModel) -> None:
        """See Hosts: nothing, the controller does."""

    async def _withdraw(self, name: str) -> None:
        self._revision += 1
        self._deployments.pop(name, None)
        await self._insist("withdraw", name, self._revision)

    async def remove(self, model: PoolModel) -> None:
        """See Hosts."""
        follower = self.followers[model.name]
        await self._withdraw(model.name)
        try:
            async with asyncio.timeout(_UNLOAD_LIMIT_S):
                while self.view is not None and model.name in self.view.models:
                    follower.changed.clear()
                    await follower.changed.wait()
        except TimeoutError:
            raise HostError(f"hosts still have model {model.name!r} after {_UNLOAD_LIMIT_S:g} s") from None
        del self.followers[model.name]

    # -- what is told --------------------------------------------------------------------------------

    async def report(self) -> dict[str, Any]:
        """See Hosts; every host's own state, and what the controller says."""
        answers = await self.ask("state")
        hosts = {n: {"error": str(a)} if isinstance(a, Exception) else a for n, a in answers.items()}
        cluster: dict[str, Any] = {}
        if (view := self.view) is not None:
            cluster = {"epoch": view.epoch, "revision": view.revision, "hosts": view.hosts, "roles": view.roles}
            cluster["draining"] = sorted(view.draining)
        try:
            async with asyncio.timeout(_LOOK_LIMIT_S):
                described = await self.tell("describe")
        except Exception as error:  # it may be away
            described = {"error": type(error).__name__}
        cluster["controller"] = described
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
