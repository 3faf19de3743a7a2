# SPDX-License-Identifier: Apache-2.0
"""Engine hosts that are spread over a Ray cluster, where its controller decides which of them has which model.

The pool is nobody's: this server follows what the controller shows, models that other servers add and remove included.
The controller may die at any time: requests go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import Counter as Totals
from collections.abc import Callable, Mapping
from dataclasses import replace
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from tokenpool.cluster.session import Session
from tokenpool.cluster.values import ClusterView, Endpoints
from tokenpool.errors import HostError
from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.policy.routing import LOADS_PERIOD_S
from tokenpool.process.ending import HOST_END_S, KILL_S, within
from tokenpool.process.keeper import Work, start_kept
from tokenpool.serve.clustered.cluster_models import ClusterModels
from tokenpool.serve.clustered.lease_keeper import LeaseKeeper
from tokenpool.serve.clustered.no_lending import NoLending
from tokenpool.serve.clustered.seat_follower import RETRY_S, SeatFollower, deployment_of
from tokenpool.serve.pool.demand import LOADS, UNLOADS
from tokenpool.serve.pool.host_watch import follow_forecasts
from tokenpool.serve.pool.models import Models, PoolModel

logger = logging.getLogger(__name__)

_DECISIONS = metric("decisions").make()
_COUNTED = {"demand_load": LOADS, "cold": UNLOADS}
"""Decisions that have a metric of their own."""
_RETRY_CALLS_S = 60.0
_BEAT_S, _BEAT_LIMIT_S = 1.0, 5.0
_LEASE_LIMIT_S = 5.0
_UNLOAD_LIMIT_S = 120.0
"""For hosts to unload a model, once other servers have had the time of its drain."""
_ALONE_LOOK_S, _ALONE_SAY_S, _ALONE_LIMIT_S = 2.0, 10.0, 60.0
_BARE_LIMIT_S = 10 * _ALONE_LIMIT_S
"""Without a host none is lost that has requests, so that there is time for the head to come back."""
_ALONE_STEP_S = 10.0
"""What one look counts at most: this process may have been stopped, and not the others."""
_LAST_WORD_S = 1.0
"""For several frontends to hear that no model is served any more, and to tell whoever waits."""


class RayHosts(ClusterModels):
    """See `Hosts`."""

    def __init__(
        self,
        models: Models,
        session: Session,
        make_follower: Callable[[PoolModel, int, RayHosts], SeatFollower],
        versions: Mapping[str, int] = MappingProxyType({}),
        num_frontends: int = 1,
    ) -> None:
        """`make_follower` makes what follows a model's seats, given its version; `versions` are those at the start."""
        super().__init__(models, session, make_follower, versions)
        self.loads: dict[str, Any] = {}
        """What hosts told last of their queues; an exception where none came."""
        self.leases: LeaseKeeper | None = None
        """This server's parts of tenants' limits; None where there is no tenant."""
        self.lending = NoLending()
        """See Hosts."""
        self._num_frontends = num_frontends
        self._counted: Totals[tuple[int, str]] = Totals()
        self._drained_by_s: dict[str, float] = {}  # when all servers have had the time for what they have of a model
        self._tasks: list[asyncio.Task[None]] = []
        self._viewed = asyncio.Event()

    # -- life ----------------------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        """See Hosts; a host that is away comes back."""
        return True

    @property
    def is_alive(self) -> bool:
        """See Hosts; where hosts come when requests wait, none need be there."""
        if self.view is None:
            return False
        return self._needs_none or bool(self.view.hosts.keys() - self.overdue)

    @property
    def _needs_none(self) -> bool:
        """Whether there is no host because none is needed, or none has come yet."""
        return self.view is not None and not self.view.hosts and self.view.host_count is not None

    @property
    def has_started(self) -> bool:
        """See Hosts; models that are loading say so themselves."""
        return True

    @property
    def is_eldest(self) -> bool:
        """Whether no server of the pool has been there for longer."""
        return self.view is not None and [peer.name for peer in self.view.peers[:1]] == [self._session.name]

    async def may_listen(self) -> None:
        """See Hosts: while models load, as soon as this server may let tenants' requests in."""
        if self.leases is not None:
            await self.leases.until_some(_LEASE_LIMIT_S)

    async def start(self) -> None:
        """See Hosts."""
        await self._until_joined()
        self._tasks = [start_kept("telling that this server is there", self._beat)]
        for model in self._models.values():
            if model.rule.at_start:
                self.followers[model.name] = await self._new_follower(model, self.versions[model.name])
        self._tasks.append(start_kept("following the controller", self._follow))
        self._tasks.append(start_kept("telling what waits", self._tell_uses))
        # What no host takes is `failed` by now; the controller tries it again.
        await asyncio.gather(*(self._until_served(name) for name in list(self.followers)), return_exceptions=True)
        is_served = any(follower.is_served for follower in self.followers.values())
        if is_served or any(model.is_on_demand and model.error is None for model in self._models.values()):
            self._session.has_started = False

    def works(self) -> Mapping[str, Work]:
        """See Hosts."""
        return {
            "asking for queues": self._ask_loads,
            "watching Ray's head": self.head.follow,
            "looking for hosts": self._watch_alone,
            "asking for forecasts": lambda: follow_forecasts(self._models.apps, lambda: self.ask_as_one),
        }

    def freeze(self) -> None:
        """See Hosts; views are still followed, for requests go on."""

    async def stop(self) -> None:
        """Leave the pool, and end what Ray has here."""
        for task in (*self._tasks, *self._working.values()):
            task.cancel()
        await within(HOST_END_S + KILL_S, "leaving the pool", self._session.leave())

    async def _ask_loads(self) -> None:
        """Ask hosts for their queues and where weights are, while a model has several to choose from."""
        while True:
            await asyncio.sleep(LOADS_PERIOD_S)
            shared = [follower for follower in self.followers.values() if len(follower.hosts) > 1]
            if shared:
                self.loads = await self.ask("load")
                for follower in shared:
                    follower.learn(self.loads)

    async def _watch_alone(self) -> None:
        """End this server when Ray's head is away and no host is left: whoever started it finds out, and its clients.

        Ray ends hosts when its head has been away for as long as their nodes were told, and nobody tells of it then.
        New requests are refused before that; what was accepted waits, because it may be this server that is cut off.
        Where there was no host, because none was needed, none comes without the head either: that has a longer limit,
        and requests wait as for any first host.
        """
        alone_s, looked_s, is_bare = 0.0, time.monotonic(), self._needs_none
        while alone_s < (_BARE_LIMIT_S if is_bare else _ALONE_LIMIT_S):
            await asyncio.sleep(_ALONE_LOOK_S)
            was_bare, is_bare = is_bare, self._needs_none
            has_none = not (self.head.is_up or (not is_bare and await self._is_answered()))
            now_s = time.monotonic()
            alone_s = alone_s + min(now_s - looked_s, _ALONE_STEP_S) if has_none and is_bare is was_bare else 0.0
            looked_s = now_s
            self._show_alone(alone_s >= _ALONE_SAY_S and not is_bare)
        which = "there has been no engine host" if is_bare else "no engine host has answered"
        await self._end_alone(HostError(f"Ray's head is away, and {which} for {alone_s:.0f} s"))

    def _show_alone(self, is_alone: bool) -> None:
        if is_alone == self.is_alone:
            return
        self.is_alone = is_alone
        news = (
            "neither Ray's head nor a host answers: no new requests" if is_alone else "hosts or Ray's head answer again"
        )
        logger.warning(news)
        for follower in self.followers.values():
            self._apply_to(follower)

    async def _end_alone(self, reason: HostError) -> None:
        logger.critical("%s: this server ends", reason)
        self._session.fault = reason
        for model in self._models.values():
            if model.app.state != Life.COLD:
                model.give_up(reason)
        await asyncio.sleep(_LAST_WORD_S)
        os.kill(os.getpid(), signal.SIGTERM)

    async def _is_answered(self) -> bool:
        return any(not isinstance(got, Exception) for got in (await self.ask("progress")).values())

    # -- the controller ------------------------------------------------------------------------------

    async def answer(self, method: str, *args: Any) -> Any:
        """What followers of seats tell: hosts where they listen, the controller everything else."""
        return await (self.attach(*args) if method == "attach" else self.tell_as_this(method, *args))

    async def attach(self, model: str, host: str, life: str, endpoints: Endpoints, index: int = 0) -> None:
        """Let a model's engine on a host serve the frontend with that index too, which listens at `endpoints`."""
        if self.view is None or self.view.hosts.get(host) != life:
            raise HostError(f"{host} has a new process: {life} is gone")
        await self.ask_one(host, "attach_at", model, self._session.first_index + index, *endpoints)

    async def detach(self, index: int) -> None:
        """Let all hosts forget the frontend with that index."""
        await self.ask("detach_frontend", self._session.first_index + index)

    async def _beat(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_BEAT_LIMIT_S):
                    leases = await self.tell_as_this("beat", self.leases.claims() if self.leases else {})
                if leases and self.leases:
                    self.leases.take(leases)
            except Exception as error:  # the next view says more
                logger.debug("controller does not hear this server: %s", error)
            await asyncio.sleep(_BEAT_S)

    async def _follow(self) -> None:
        epoch = version = -1
        is_away = False
        while True:
            try:
                view = await self.tell_as_this("watch", epoch, version)
                if view is None:
                    await self._join()
                    continue
            except Exception as error:
                if epoch >= 0 and not is_away and not self.watch.stopping:
                    logger.warning("controller is away, serving goes on: %s", type(error).__name__)
                    is_away = True
                await asyncio.sleep(RETRY_S)
                continue
            if is_away:
                logger.warning("controller is back")
            epoch, version, is_away = view.epoch, view.version, False
            try:
                self._apply(view)
            except Exception:  # the next view is complete, too
                logger.exception("view not applied")
            if view.is_ending:  # from now on the controller answers at once
                await asyncio.sleep(RETRY_S)

    async def _until_joined(self) -> None:
        for _ in range(int(_RETRY_CALLS_S / RETRY_S)):
            try:
                await self._join()
                return
            except Exception as error:
                logger.debug("the controller does not let this server join: %s", error)
                await asyncio.sleep(RETRY_S)
        raise HostError("the controller does not answer")

    async def _join(self) -> None:
        is_new = await self.tell("join", self._session.peer(self._num_frontends))
        if is_new and self.view is not None:
            logger.warning("the pool has given this server up: it joins anew")
            for follower in self.followers.values():
                follower.attach_anew()
        for follower in self.followers.values():
            follower.say_joined()

    def _apply(self, view: ClusterView) -> None:
        if view.is_ending and not self.watch.stopping:
            logger.warning("the pool ends, and this server with it")
            os.kill(os.getpid(), signal.SIGTERM)
        self.view = view
        for action, count in view.num_decisions.items():
            new = count - self._counted[view.epoch, action]
            self._counted[view.epoch, action] = count
            _DECISIONS.labels(action).inc(max(0, new))
            if action in _COUNTED:
                _COUNTED[action].inc(max(0, new))
        self._models.share_queues(max(1, len(view.peers)))
        for name, follower in self.followers.items():
            follower.apply(view.models.get(name), view.hosts, view.roles, self.overdue)
        self._viewed.set()
        self._look_again()

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

    # -- models of this server -----------------------------------------------------------------------

    async def _until_served(self, name: str) -> None:
        """Wait for the first host of a model; raises what the hosts said when none takes it."""
        follower = self.followers[name]
        while not follower.is_served:
            if follower.error is not None:
                raise follower.error
            follower.changed.clear()
            await follower.changed.wait()

    async def add(self, model: PoolModel) -> None:
        """See Hosts; returns when all servers serve it, or had some time for that."""
        name, is_wanted = model.name, False
        self._changing.add(name)
        try:
            follower = await self._new_follower(model, -1)
            deployment = await asyncio.to_thread(deployment_of, model.plan, -1, model.rule)
            follower.version = await self._insist("deploy", replace(deployment, origin=token_hex(8)))
            is_wanted, self.followers[name], self.versions[name] = True, follower, follower.version
            self._apply_to(follower)
            await self._until_served(name)
            if not await self._insist("all_joined", name):
                logger.warning("not all servers serve it yet model=%s", name)
        except BaseException:
            try:
                if is_wanted:
                    await self._insist("withdraw", name)
            finally:  # while the controller is away the model stays, as one that another server has added
                if is_wanted:
                    del self.versions[name]
                    await self.followers.pop(name).close()
                model.client = None
            raise
        finally:
            self._changing.discard(name)
            self._look_soon()

    async def retry(self, model: PoolModel) -> None:
        """See Hosts: nothing, the controller does."""

    async def retire(self, model: PoolModel, drain_s: float) -> None:
        """See Hosts."""
        self._changing.add(model.name)
        self._drained_by_s[model.name] = time.monotonic() + drain_s
        await self._insist("retire", model.name, drain_s)

    async def remove(self, model: PoolModel) -> None:
        """See Hosts."""
        name = model.name
        left_s = max(0.0, self._drained_by_s.pop(name, 0.0) - time.monotonic())  # which others may need
        await self._insist("drained", name)
        try:
            async with asyncio.timeout(left_s + _UNLOAD_LIMIT_S):
                while self.view is not None and name in self.view.models:
                    self._viewed.clear()
                    await self._viewed.wait()
        except TimeoutError:
            limit_s = left_s + _UNLOAD_LIMIT_S
            raise HostError(f"hosts still have model {name!r} after {limit_s:.0f} s") from None
        self.followers.pop(name, None)
        self.versions.pop(name, None)
        self._changing.discard(name)
