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
from collections import Counter as Totals
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from tokenpool.cluster.pool_record import unpack
from tokenpool.cluster.session import Session
from tokenpool.cluster.values import ClusterView, Endpoints, SeatState
from tokenpool.errors import HostError, PoolError
from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.policy.routing import LOADS_PERIOD_S
from tokenpool.process.ending import HOST_END_S, KILL_S, let_finish, within
from tokenpool.process.keeper import Work, start_kept
from tokenpool.process.metric_files import forget_models
from tokenpool.serve.clustered.host_questions import HostQuestions
from tokenpool.serve.clustered.lease_keeper import LeaseKeeper
from tokenpool.serve.clustered.no_lending import NoLending
from tokenpool.serve.clustered.seat_follower import RETRY_S, SeatFollower
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.host_watch import HostWatch, follow_forecasts
from tokenpool.serve.pool.models import Models, PoolModel

logger = logging.getLogger(__name__)

_DECISIONS = metric("decisions").make()
_RETRY_CALLS_S = 60.0
_BEAT_S, _BEAT_LIMIT_S = 1.0, 5.0
_LEASE_LIMIT_S = 5.0
_UNLOAD_LIMIT_S = 120.0


class RayHosts(HostQuestions):
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
        super().__init__(session)
        self.loads: dict[str, Any] = {}
        """What hosts told last of their queues; an exception where none came."""
        self.leases: LeaseKeeper | None = None
        """This server's parts of tenants' limits; None where there is no tenant."""
        self.lending = NoLending()
        """See Hosts."""
        self.num_attachments = 0
        """How often hosts had forgotten this server, whose frontends then have themselves attached anew."""
        self._models = models
        self._make_follower = make_follower
        self._versions = dict(versions)
        self._num_frontends = num_frontends
        self._changing: set[str] = set()  # models that somebody adds or removes here
        self._working: dict[str, asyncio.Task[None]] = {}  # on models that others have added or remove, by name
        self._counted: Totals[tuple[int, str]] = Totals()
        self._tasks: list[asyncio.Task[None]] = []
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
            self.followers[model.name] = await self._new_follower(model, self._versions[model.name])
        self._tasks.append(start_kept("following the controller", self._follow))
        # What no host takes is `failed` by now; the controller tries it again.
        await asyncio.gather(*(self._until_served(name) for name in list(self.followers)), return_exceptions=True)
        if any(follower.is_served for follower in self.followers.values()):
            self._session.has_started = False

    def works(self) -> Mapping[str, Work]:
        """See Hosts."""
        return {
            "asking for queues": self._ask_loads,
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

    # -- the controller ------------------------------------------------------------------------------

    async def tell_as_this(self, method: str, *args: Any) -> Any:
        """Call the controller, which is told who calls; raises what the call raises."""
        return await self.tell(method, self._session.name, *args)

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

    async def _insist(self, method: str, *args: Any) -> Any:
        """Tell the controller, again while it is being restarted; raises the PoolError with which it refuses."""
        for _ in range(int(_RETRY_CALLS_S / RETRY_S)):
            try:
                return await self.tell_as_this(method, *args)
            except Exception as error:
                if isinstance(cause := getattr(error, "cause", None), PoolError):
                    raise cause from None
                logger.debug("controller does not hear %s: %s", method, error)
                await asyncio.sleep(RETRY_S)
        raise HostError("the controller does not answer")

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
        while True:
            try:
                view = await self.tell_as_this("watch", epoch, version)
                if view is None:
                    await self._join()
                    continue
            except Exception as error:
                if epoch >= 0 and not self.watch.stopping:
                    logger.warning("controller is away, serving goes on: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)
                continue
            epoch, version = view.epoch, view.version
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
            self.num_attachments += 1
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
        self._models.share_queues(max(1, len(view.peers)))
        for name, follower in self.followers.items():
            follower.apply(view.models.get(name), view.hosts, view.roles, view.overdue)
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

    # -- models of others ----------------------------------------------------------------------------

    def _follow_models(self, view: ClusterView) -> None:
        """Begin what other servers' changes ask for."""
        for name in self.followers.keys() | view.models.keys():
            follower, wanted = self.followers.get(name), view.models.get(name)
            for host, seat in wanted.seats.items() if wanted else ():
                is_others = follower is None or follower.version != seat.version
                if seat.state is SeatState.LEAVING and is_others:  # this server has never been there
                    self._work(f"{name} at {host}", self._say_left(name, host, seat.life))
            if name in self._changing:
                continue
            if follower is not None and (wanted is None or wanted.version not in (-1, follower.version)):
                self._work(name, self._forget(name))
            elif follower is None and wanted is not None and wanted.version >= 0 and name not in view.retiring:
                self._work(name, self._take_in(name))
            elif follower is not None and name in view.retiring:
                self._work(name, self._retire(name, view.retiring[name]))

    def _work(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something for a model, unless something is being done: whoever does it looks at the newest view then."""
        if name in self._working:
            work.close()
            return
        self._working[name] = asyncio.create_task(self._work_on(name, work))

    async def _work_on(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        seen = self.view
        try:
            await work
        except Exception:
            logger.exception("what other servers changed cannot be followed model=%s", name)
            seen = None
            await asyncio.sleep(RETRY_S * 10)
        del self._working[name]
        if self.view is not seen:
            self._look_again()

    def _look_again(self) -> None:
        if self.view is not None and not self.watch.stopping:
            self._follow_models(self.view)

    async def _say_left(self, name: str, host: str, life: str) -> None:
        await self.tell_as_this("left", name, host, life)

    async def _take_in(self, name: str) -> None:
        """Serve a model that another server has added."""
        for deployment in await self.tell("deployments", [name]):
            plan: ModelPlan = unpack(deployment.plan)
            model = self._models.add(plan)
            try:
                follower = await self._new_follower(model, deployment.version)
            except BaseException:
                self._models.remove(name)
                raise
            self.followers[name] = follower
            logger.info("another server has added model=%s", name)
            if (view := self.view) is not None:
                follower.apply(view.models.get(name), view.hosts, view.roles, view.overdue)

    async def _retire(self, name: str, drain_s: float) -> None:
        """Let requests finish of a model that another server removes, and wait until it is gone."""
        model = self._models[name]
        if not model.is_leaving:
            model.is_leaving = True
            model.app.move(Life.DRAINING)
            if model.error is not None:
                model.fail_requests()
            if model.client is not None:
                await let_finish(model.client, drain_s)
        await self._insist("drained", name)
        while self.view is not None and name in self.view.retiring:
            await asyncio.sleep(RETRY_S)

    async def _forget(self, name: str) -> None:
        model, follower = self._models[name], self.followers.pop(name)
        logger.info("another server has removed model=%s", name)
        series = self._models.remove(name)
        await follower.close()
        model.client = None
        await asyncio.to_thread(forget_models, series)

    # -- models of this server -----------------------------------------------------------------------

    async def _new_follower(self, model: PoolModel, version: int) -> SeatFollower:
        follower = self._make_follower(model, version, self)
        await follower.prepare()
        return follower

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
            deployment = replace(await follower.deployment(), origin=token_hex(8))
            follower.version = await self._insist("deploy", deployment)
            is_wanted, self.followers[name] = True, follower
            if (view := self.view) is not None:
                follower.apply(view.models.get(name), view.hosts, view.roles, view.overdue)
            await self._until_served(name)
            if not await self._insist("all_joined", name):
                logger.warning("not all servers serve it yet model=%s", name)
        except BaseException:
            if is_wanted:
                await self._insist("withdraw", name)
                await self.followers.pop(name).close()
            model.client = None
            raise
        finally:
            self._changing.discard(name)
            asyncio.get_running_loop().call_soon(self._look_again)

    async def retry(self, model: PoolModel) -> None:
        """See Hosts: nothing, the controller does."""

    async def retire(self, model: PoolModel, drain_s: float) -> None:
        """See Hosts."""
        self._changing.add(model.name)
        await self._insist("retire", model.name, drain_s)

    async def remove(self, model: PoolModel) -> None:
        """See Hosts."""
        name, follower = model.name, self.followers[model.name]
        await self._insist("drained", name)
        try:
            async with asyncio.timeout(_UNLOAD_LIMIT_S):
                while self.view is not None and name in self.view.models:
                    follower.changed.clear()
                    await follower.changed.wait()
        except TimeoutError:
            raise HostError(f"hosts still have model {name!r} after {_UNLOAD_LIMIT_S:g} s") from None
        del self.followers[name]
        self._changing.discard(name)
