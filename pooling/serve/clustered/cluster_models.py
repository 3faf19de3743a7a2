# SPDX-License-Identifier: Apache-2.0
"""The models of a clustered pool at one of its servers: follows what the controller shows, whoever has asked for it.

Models come and go by this server and by others; those that are loaded on demand get awake and cold again. Of one that
is cold nothing is followed: what waits for it is told to the controller, and what its hosts need is made when it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from secrets import token_hex
from typing import Any

from tokenpool.cluster.pool_record import unpack
from tokenpool.cluster.session import Session
from tokenpool.cluster.values import ClusterView, ModelView, SeatState, Use
from tokenpool.errors import HostError, PoolError
from tokenpool.model_life import Life
from tokenpool.process.ending import let_finish
from tokenpool.process.metric_files import forget_models
from tokenpool.serve.clustered.host_questions import HostQuestions
from tokenpool.serve.clustered.seat_follower import RETRY_S, SeatFollower, deployment_of, packed
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.host_watch import HostWatch
from tokenpool.serve.pool.model_use import use_of
from tokenpool.serve.pool.models import Models, PoolModel

logger = logging.getLogger(__name__)

_RETRY_CALLS_S = 60.0
_USES_PERIOD_S, _REST_PERIOD_S, _GAP_S = 0.5, 0.1, 0.05
"""Between two words of what this server has of models: usually, while one of them rests, and at least."""


class ClusterModels(HostQuestions):
    """See the module; lives on the pool's event loop."""

    def __init__(
        self,
        models: Models,
        session: Session,
        make_follower: Callable[[PoolModel, int, Any], SeatFollower],
        versions: Mapping[str, int],
    ) -> None:
        """`make_follower` makes what follows a model's seats, given its version; `versions` are those at the start."""
        super().__init__(session)
        self.versions = dict(versions)
        """Of each model that this server knows."""
        self.watch = HostWatch(models.apps, lambda: self.ask_as_one)
        self._models = models
        self._make_follower = make_follower
        self._changing: set[str] = set()  # models that somebody adds or removes here
        self._working: dict[str, asyncio.Task[None]] = {}  # on what others have changed, by what it is

    # -- the controller ------------------------------------------------------------------------------

    async def tell_as_this(self, method: str, *args: Any) -> Any:
        """Call the controller, which is told who calls; raises what the call raises."""
        return await self.tell(method, self._session.name, *args)

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

    def _follow_models(self, view: ClusterView) -> None:
        """Begin what a view asks for."""
        for name in self.versions.keys() | view.models.keys():
            known, seen, follower = self.versions.get(name), view.models.get(name), self.followers.get(name)
            for host, seat in seen.seats.items() if seen else ():
                is_others = follower is None or follower.version != seat.version
                if seat.state is SeatState.LEAVING and is_others:  # this server has never been there
                    self._work(f"{name} at {host}", self._say_left(name, host, seat.life))
            if name in self._changing:
                continue
            if known is not None and (seen is None or seen.version not in (-1, known)):
                self._work(name, self._forget(name))
            elif known is None and seen is not None and seen.version >= 0 and name not in view.retiring:
                self._work(name, self._take_in(name))
            elif known is not None and name in view.retiring:
                self._work(name, self._retire(name, view.retiring[name]))
            elif known is not None and seen is not None:
                self._follow_life(self._models[name], follower, seen)

    def _work(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something for a model, unless something is being done: whoever does it looks at the newest view then."""
        if what in self._working:
            work.close()
            return
        self._working[what] = asyncio.create_task(self._work_on(what, work))

    async def _work_on(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        seen = self.view
        try:
            await work
        except Exception:
            logger.exception("what the controller shows cannot be followed model=%s", what)
            seen = None
            await asyncio.sleep(RETRY_S * 10)
        del self._working[what]
        if self.view is not seen:
            self._look_again()

    def _look_again(self) -> None:
        if self.view is not None and not self.watch.stopping:
            self._follow_models(self.view)

    def _look_soon(self) -> None:
        """Look again once what is being done has ended."""
        asyncio.get_running_loop().call_soon(self._look_again)

    async def _say_left(self, name: str, host: str, life: str) -> None:
        await self.tell_as_this("left", name, host, life)

    # -- models of others ----------------------------------------------------------------------------

    async def _take_in(self, name: str) -> None:
        """Know a model that another server has added."""
        for deployment in await self.tell("deployments", [name]):
            plan: ModelPlan = unpack(deployment.plan)
            self._models.add(plan)
            self.versions[name] = deployment.version
            logger.info("another server has added model=%s", name)
            self._look_soon()

    async def _retire(self, name: str, drain_s: float) -> None:
        """Let requests finish of a model that another server removes, and wait until it is gone."""
        model = self._models[name]
        if not model.is_leaving:
            model.is_leaving, model.app.is_resting = True, False
            model.app.move(Life.DRAINING)
            if model.error is not None:
                model.fail_requests()
            await let_finish(model, drain_s)
        await self._insist("drained", name)
        while self.view is not None and name in self.view.retiring:
            await asyncio.sleep(RETRY_S)

    async def _forget(self, name: str) -> None:
        model, follower = self._models[name], self.followers.pop(name, None)
        del self.versions[name]
        logger.info("another server has removed model=%s", name)
        series = self._models.remove(name)
        if follower is not None:
            await follower.close()
        model.client = None
        await asyncio.to_thread(forget_models, series)

    # -- models on demand ----------------------------------------------------------------------------

    def _follow_life(self, model: PoolModel, follower: SeatFollower | None, seen: ModelView) -> None:
        """Begin what is to be done for a model that is awake, rests or is cold."""
        if seen.is_cold and follower is None:
            self._show_cold(model, seen.error)
        elif seen.is_cold:
            if model.client is None or model.has_finished:  # else it is loaded again for what is left
                self._work(model.name, self._chill(model))
        elif seen.rest:
            self._rest(model)
        elif follower is None:
            self._work(model.name, self._begin(model))
        elif model.app.is_resting:
            self._rest_no_more(model, follower)

    async def _begin(self, model: PoolModel) -> None:
        """Follow the seats of a model that is awake."""
        try:
            follower = await self._new_follower(model, self.versions[model.name])
        except Exception as error:
            if model.error is None:
                model.fail(error, tried_by="this server")
            raise
        if model.app.state in (Life.COLD, Life.FAILED):
            model.error, model.app.reason = None, ""
            model.app.move(Life.LOADING)
        self.followers[model.name] = follower
        self._apply_to(follower)

    async def _new_follower(self, model: PoolModel, version: int) -> SeatFollower:
        follower = self._make_follower(model, version, self)
        await follower.prepare()
        return follower

    def birth_of(self, name: str) -> int:
        """See SeatFollower; 0 for a model that is not followed."""
        return self.followers[name].birth if name in self.followers else 0

    def _apply_to(self, follower: SeatFollower) -> None:
        if (view := self.view) is not None:
            follower.apply(view.models.get(follower.plan.spec.name), view.hosts, view.roles, self.overdue)

    def _rest(self, model: PoolModel) -> None:
        """Let it finish what it has, and hold what comes."""
        if model.app.is_resting or model.is_leaving:
            return
        model.app.is_resting = True
        if model.client is not None:
            model.client.rest(True)
        if model.app.state in (Life.READY, Life.UNAVAILABLE):
            model.app.move(Life.DRAINING)
        self._models.wanted.set()  # that the controller hears when it has finished

    def _rest_no_more(self, model: PoolModel, follower: SeatFollower) -> None:
        """It is awake again: another controller did not know that it rests, or it has been cold in between."""
        if model.has_finished and not follower.is_served:
            self._work(model.name, self._chill(model))
            return
        model.app.is_resting = False
        if model.client is not None:
            model.client.rest(False)
        if model.app.state == Life.DRAINING:
            model.restore()
            if not follower.is_served:
                model.suspend()

    async def _chill(self, model: PoolModel) -> None:
        """Keep nothing of a model that is cold."""
        follower = self.followers.pop(model.name)
        if model.app.state == Life.READY:
            model.suspend()
        series = self._models.series_of(model)
        await follower.close()
        await asyncio.to_thread(forget_models, series)
        error, reason, seen = model.error, model.app.reason, self.view.models.get(model.name) if self.view else None
        model.get_cold()
        if error is not None and seen is not None and seen.error is not None:  # still so, and told already
            model.error, model.app.reason = error, reason
            model.app.move(Life.FAILED)
        logger.info("model cold model=%s", model.name)
        self._look_soon()

    def _show_cold(self, model: PoolModel, error: PoolError | None) -> None:
        model.is_on_demand, num_held = True, len(model.app.hold)
        if error is not None:
            if model.error is None and not model.is_leaving:
                model.fail(error, tried_by="the controller")
        elif model.error is not None or model.app.state in (Life.FAILED, Life.UNAVAILABLE):
            model.get_cold()
        elif model.app.state == Life.LOADING and not num_held:
            model.app.move(Life.COLD)
        elif num_held:
            model.wake()

    async def introduce(self, model: PoolModel) -> None:
        """See Hosts."""
        self._changing.add(model.name)
        try:
            deployment = deployment_of(model.plan_to_send, -1, model.rule, is_bare=True)
            self.versions[model.name] = await self._insist("deploy", replace(deployment, origin=token_hex(8)))
        finally:
            self._changing.discard(model.name)
            self._look_soon()

    # -- what is told of them ------------------------------------------------------------------------

    async def _tell_uses(self) -> None:
        """Tell the controller what waits for models, at once, and who uses them, now and then."""
        while True:
            is_resting = any(model.app.is_resting for model in self._models.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REST_PERIOD_S if is_resting else _USES_PERIOD_S):
                    await self._models.wanted.wait()
            self._models.wanted.clear()
            if not self._models.come_and_go:
                continue
            try:
                bare = await self.tell_as_this("uses", self._uses(time.monotonic()))
            except Exception as error:  # it is told again
                logger.debug("controller does not hear what waits: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            for name in bare or ():
                self._work(f"what hosts need of {name}", self._equip(name))
            self._look_again()
            await asyncio.sleep(_GAP_S)  # however many requests begin to wait

    def _uses(self, now_s: float) -> dict[str, Use]:
        uses = {}
        for name in self.versions.keys() & self._models.keys():
            model, use = self._models[name], use_of(self._models[name])
            seen = self.view.models.get(name) if self.view is not None else None
            rest = seen.rest if seen is not None and model.app.is_resting else 0
            if not (use.num_held or use.inflight or rest or model.client is not None):
                continue
            has_finished = not model.app.inflight and (model.client is None or model.has_finished)
            due_in_s = {tenant: due_s - now_s for tenant, due_s in use.due_by_tenant.items()}
            held_for_s = max(0.0, now_s - use.since_s)
            idle_for_s = now_s - use.last_used_s
            uses[name] = Use(use.num_held, due_in_s, held_for_s, use.inflight, idle_for_s, rest if has_finished else 0)
        return uses

    async def _equip(self, name: str) -> None:
        """Make what hosts need of a model that is to be loaded for the first time, or tell why that cannot be."""
        if (model := self._models.get(name)) is None:
            return
        made: bytes | PoolError
        try:
            made = await asyncio.to_thread(packed, model.plan)
        except Exception as error:
            made = error if isinstance(error, PoolError) else PoolError(f"{type(error).__name__}: {error}")
        await self._insist("equip", name, self.versions[name], made)
