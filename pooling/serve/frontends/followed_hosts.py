# SPDX-License-Identifier: Apache-2.0
"""The hosts of a pool in one of several frontends: somebody else looks after them and says which models they have.

It follows the supervisor's view. Tokens come from the hosts straight, over this frontend's own sockets; calls that
change the pool go to the supervisor, who lets all frontends know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, Protocol

from tokenpool.errors import PoolError
from tokenpool.model_life import Life
from tokenpool.process.ending import let_finish
from tokenpool.process.keeper import Work, start_kept
from tokenpool.process.metric_files import forget_models
from tokenpool.serve.client.host_calls import call_beside
from tokenpool.serve.frontends.frontend_view import (
    FrontendSettings,
    ModelStanding,
    SupervisorView,
    sendable,
)
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.host_watch import Call, HostWatch, follow_forecasts
from tokenpool.serve.pool.model_use import ModelUse, use_of
from tokenpool.serve.pool.models import Models, PoolModel

logger = logging.getLogger(__name__)

_RETRY_S = 0.2
"""Between two attempts."""
_SAY_LIMIT_S = 5.0
"""For the supervisor to hear a word that costs it nothing."""
_FINISH_LOOK_S = 0.02
_USES_PERIOD_S = 0.25


class Engines(Protocol):
    """How a frontend gets to the engines: on one host, or on those of a cluster."""

    def call(self) -> Call | None:
        """What asks the hosts; None while there are none."""
        ...

    def works(self) -> Mapping[str, Work]:
        """What goes on from the start on, by name."""
        ...

    def has(self, name: str, standing: ModelStanding) -> bool:
        """Whether nothing is left to do here until a model that stands so is served."""
        ...

    def follow_hosts(self, view: SupervisorView) -> None:
        """Note which hosts there are."""
        ...

    def follow(self, model: PoolModel, standing: ModelStanding, view: SupervisorView) -> None:
        """Begin what is to be done for a model, and show whether it takes requests from this frontend."""
        ...

    async def close(self, model: PoolModel) -> None:
        """Close what this frontend has of a model, after which nothing counts for it."""
        ...

    def report(self) -> dict[str, Any]:
        """What this frontend adds to what is told of all."""
        ...


class FollowedHosts:
    """See `Hosts`."""

    def __init__(
        self, settings: FrontendSettings, models: Models, make_engines: Callable[[FollowedHosts], Engines]
    ) -> None:
        self.settings = settings
        self.models = models
        self.view: SupervisorView | None = None
        """The last one."""
        self.folder = tempfile.mkdtemp(prefix="frontend-", dir=settings.folder)
        """For sockets."""
        self.building = asyncio.Lock()
        """Held while an app is built: vLLM registers its metrics anew with each."""
        self.work: dict[str, asyncio.Task[None]] = {}
        """What is being done for a model: one thing at a time."""
        self.early_works: dict[str, Work] = {}
        """What goes on beside the requests as soon as there can be any, by name, with what the engines have to do."""
        self._numbers: dict[str, int] = {}  # which model of its name each is
        self._drains: dict[str, int] = {}  # number of the drain that each model is in, or was told of last
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._frozen = False
        self.engines = make_engines(self)
        self.watch = HostWatch(models.apps, self.engines.call)

    # -- life ----------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """See Hosts; by the supervisor."""
        return self.view is not None and self.view.is_alive

    @property
    def has_started(self) -> bool:
        """See Hosts; by the supervisor."""
        return self.view is not None and self.view.has_started

    async def may_listen(self) -> None:
        """Wait until others cannot answer better: at the pool's start at once, later when all models are ready."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.view is not None and (not self.view.has_started or self._has_all())
            )

    async def start(self) -> None:
        """Follow the supervisor, and return once all its models are ready here."""
        works = {
            "following the supervisor": self._follow,
            "telling what waits": self._tell_uses,
            "asking for forecasts": lambda: follow_forecasts(self.models.apps, self.engines.call),
            **self.engines.works(),
            **self.early_works,
        }
        self._tasks = [start_kept(task, work) for task, work in works.items()]
        async with self._changed:
            await self._changed.wait_for(self._has_all)

    def works(self) -> Mapping[str, Work]:
        """See Hosts: nothing more than from the start on."""
        return {}

    def freeze(self) -> None:
        """See Hosts."""
        self._frozen = True
        for task in (*self._tasks, *self.work.values()):
            task.cancel()

    async def stop(self) -> None:
        """Nothing but this frontend ends."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _has_all(self) -> bool:
        return self.view is not None and all(
            self._numbers.get(name) == standing.number and self.engines.has(name, standing)
            for name, standing in self.view.models.items()
        )

    # -- the supervisor ------------------------------------------------------------------------------

    async def ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call the supervisor; raises what the call raises, or PoolError."""
        settings = self.settings
        return await call_beside(settings.supervisor, settings.key, method, *args, timeout_s=timeout_s)

    async def ask_as_this(self, method: str, *args: Any) -> Any:
        """Call the supervisor, which is told who calls."""
        return await self.ask(method, self.settings.index, self.settings.life, *args)

    async def say(self, method: str, *args: Any, while_so: Callable[[], bool]) -> None:
        """Tell the supervisor what it waits for, again until it hears, as long as it is so."""
        while while_so():
            try:
                await self.ask(method, self.settings.index, self.settings.life, *args, timeout_s=_SAY_LIMIT_S)
                return
            except PoolError as error:
                logger.warning("the supervisor does not hear %s: %s", method, error)
                await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                view = await self.ask_as_this("view", version)
            except PoolError as error:  # it ends, and this process with it
                logger.warning("the supervisor does not answer: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            version = view.version
            self.apply(view)
            async with self._changed:
                self._changed.notify_all()

    def apply(self, view: SupervisorView) -> None:
        """Do what a view asks for; returns at once, the work goes on in tasks."""
        self.view = view
        self.engines.follow_hosts(view)
        for model in self.models.values():
            if self.standing_of(model) is None:
                self._drains.pop(model.name, None)  # nobody waits for it any more
                self.begin(model.name, self._forget(model))
        for name, standing in view.models.items():
            if name not in self.models:
                self.models.add(self.plan_of(name, standing))
                self._numbers[name] = standing.number
            if self.standing_of(self.models[name]) is not None:
                self.engines.follow(self.models[name], standing, view)

    def standing_of(self, model: PoolModel) -> ModelStanding | None:
        """How a model stands; None for one that is gone, though another one may have its name."""
        standing = self.view.models.get(model.name) if self.view is not None else None
        return standing if standing is not None and standing.number == self._numbers.get(model.name) else None

    def plan_of(self, name: str, standing: ModelStanding) -> ModelPlan:
        """The plan of a model that stands so."""
        return standing.plan or next(plan for plan in self.settings.plans if plan.spec.name == name)

    def take_state(self, model: PoolModel, standing: ModelStanding, is_here: bool) -> None:
        """Let the router show the model as it stands; `is_here` = it takes requests from this frontend."""
        app = model.app
        was, app.is_resting = (app.state, app.is_resting), standing.is_resting
        if standing.state == Life.DRAINING:
            if was != (Life.DRAINING, standing.is_resting):
                app.show(Life.DRAINING)
            if self._drains.get(model.name) != standing.drain:
                self._drains[model.name] = standing.drain
                drain = self._rest if standing.is_resting else self._drain
                self.begin(model.name, drain(model, standing), anew=True)
        elif standing.state == Life.READY and is_here:
            if app.state == Life.COLD:
                app.show(Life.LOADING)
            model.served()
        else:
            app.retry_after_s, app.reason = 5.0, standing.reason
            app.show(Life.LOADING if standing.state == Life.READY else standing.state)
            if standing.is_given_up:
                model.fail_requests(status=HTTPStatus.BAD_GATEWAY if self.is_alive else HTTPStatus.SERVICE_UNAVAILABLE)

    def begin(self, name: str, work: Coroutine[Any, Any, None], *, anew: bool = False) -> None:
        """Do something for a model; with `anew` after what is being done, else not beside it.

        What is done looks at the newest view when it ends.
        """
        before = self.work.get(name)
        if before is not None and not before.done() and not anew:
            work.close()
            return
        standing = self.view.models.get(name) if self.view is not None else None
        birth = standing.birth if standing is not None else 0
        self.work[name] = asyncio.create_task(self._work_on(name, work, birth, before))

    async def _work_on(
        self, name: str, work: Coroutine[Any, Any, None], birth: int, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            await work
        except Exception as error:
            logger.exception("frontend cannot follow model=%s", name)
            with contextlib.suppress(PoolError):  # a supervisor that does not hear ends, and this process with it
                await self.ask_as_this("failed", name, birth, sendable(error))
            await asyncio.sleep(_RETRY_S)
        if self.work.get(name) is asyncio.current_task():
            del self.work[name]
        if self.view is not None and not self._frozen:
            self.apply(self.view)
            async with self._changed:
                self._changed.notify_all()

    # -- models --------------------------------------------------------------------------------------

    async def _drain(self, model: PoolModel, standing: ModelStanding) -> None:
        if standing.is_given_up:
            model.fail_requests(standing.reason)
        await let_finish(model, standing.drain_s)
        await self._say_drained(model, standing.drain)

    async def _rest(self, model: PoolModel, standing: ModelStanding) -> None:
        """Let it finish what it has, which may take any time, and say so, unless that is called off."""
        while model.client is not None and not model.has_finished:
            await asyncio.sleep(_FINISH_LOOK_S)
            if not model.app.is_resting or self._drains.get(model.name) != standing.drain:
                return
        await self._say_drained(model, standing.drain)

    async def _say_drained(self, model: PoolModel, drain: int) -> None:
        await self.say("drained", model.name, drain, while_so=lambda: self._drains.get(model.name) == drain)

    async def chill(self, model: PoolModel) -> None:
        """Close what this frontend has of a model whose engine is gone."""
        series = self.models.series_of(model)
        await self.engines.close(model)
        model.client = None
        model.app.answer_with_nothing()
        await asyncio.to_thread(forget_models, series)

    async def _tell_uses(self) -> None:
        """Tell the supervisor what waits for models, at once, and who uses them, now and then."""
        told: dict[tuple[str, int], ModelUse] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_USES_PERIOD_S):
                    await self.models.wanted.wait()
            self.models.wanted.clear()
            uses = {(model.name, self._numbers[model.name]): use_of(model) for model in self.models.values()}
            if changed := {which: use for which, use in uses.items() if use != told.get(which, ModelUse())}:
                try:
                    await self.ask_as_this("uses", changed)
                except PoolError as error:  # it is told again
                    logger.debug("the supervisor does not hear what waits: %s", error)
                    await asyncio.sleep(_RETRY_S)
                    continue
            told = uses

    async def _forget(self, model: PoolModel) -> None:
        series = self.models.remove(model.name)
        del self._numbers[model.name]
        await self.engines.close(model)
        await asyncio.to_thread(forget_models, series)
