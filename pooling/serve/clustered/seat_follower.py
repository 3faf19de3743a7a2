# SPDX-License-Identifier: Apache-2.0
"""One model of a clustered pool and the hosts that serve it: follows the controller's view and answers it.

How requests reach an engine is for a subclass: over this process's own sockets, or over those of several frontends.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from tokenpool.cluster.values import Deployment, Endpoints, ModelView, SeatState, SeatView
from tokenpool.policy.capacity import Role
from tokenpool.process.keeper import count_failure
from tokenpool.serve.launch.model_plan import ModelPlan

logger = logging.getLogger(__name__)

Tell = Callable[..., Awaitable[Any]]
"""Calls the controller: the method's name and its arguments."""

Key = tuple[str, str]
"""A host and its life."""


class SeatFollower(ABC):
    """See the module; lives on the event loop."""

    def __init__(self, plan: ModelPlan, version: int, tell: Tell, on_change: Callable[[Any], None]) -> None:
        """`on_change` is called whenever hosts joined or were lost, or the model failed."""
        self.plan = plan
        self.version = version
        self.client: Any = None
        """The model's client for the router; made when the first host has joined."""
        self.changed = asyncio.Event()
        """Set at the same moments as `on_change` is called."""
        self.error: Exception | None = None
        """Why no host serves it; None while one may."""
        self._fatal: Exception | None = None
        self._overdue: frozenset[str] = frozenset()  # engines that nobody should count on now
        self._tell = tell
        self._on_change = on_change
        self._offered: dict[Key, Endpoints] = {}
        self._joining: dict[Key, asyncio.Task[None]] = {}
        self._leaving: dict[Key, asyncio.Task[None]] = {}

    # -- how requests reach an engine ----------------------------------------------------------------

    @property
    @abstractmethod
    def hosts(self) -> Collection[str]:
        """Names, by `name_of`, of the engines that take its requests."""

    @abstractmethod
    def _listen(self, machine: str) -> Endpoints:
        """Where the engine on a host of that machine is to connect to."""

    @abstractmethod
    async def _connect(self, key: Key) -> None:
        """Let the engine that was told of `_offered[key]` take requests; raises what stops it."""

    @abstractmethod
    async def _disconnect(self, key: Key) -> None:
        """Return once nothing is at that engine any more."""

    @abstractmethod
    def _lose(self, key: Key) -> None:
        """The engine is gone."""

    @property
    def num_handed_over(self) -> int:
        """Requests that went from a host that prefills to one that decodes."""
        return 0

    async def prepare(self) -> None:  # noqa: B027
        """Before the first view."""

    def _give_roles(self, roles: Mapping[str, Role]) -> None:  # noqa: B027
        """Roles of hosts that do not do everything, by `name_of`."""

    def learn(self, loads: Mapping[str, Any]) -> None:  # noqa: B027
        """Take in what hosts told when they were asked for `load`, by name; exceptions among them tell nothing."""

    # -- the controller ------------------------------------------------------------------------------

    async def deployment(self) -> Deployment:
        """What the controller and the hosts need to know of the model."""
        plan = self.plan
        slo = plan.spec.slo
        spec = plan.for_host(await asyncio.to_thread(plan.engine_config))
        return Deployment(
            plan.spec.name,
            self.version,
            plan.weight_bytes,
            plan.spec.priority,
            pickle.dumps(spec),
            {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s} if slo else {},
            plan.spec.replicas,
            plan.spec.max_replicas,
            plan.spec.hosts,
        )

    @property
    def is_served(self) -> bool:
        """Whether a host takes its requests that can be counted on."""
        return self.client is not None and any(host not in self._overdue for host in self.hosts)

    def standing(self, view: ModelView) -> dict[str, str]:
        """Where it stands, by host; `serving` where requests are sent, `joining` where they are about to be."""
        states: dict[str, str] = {host: seat.state for host, seat in view.seats.items()}
        for host, seat in view.seats.items():
            if seat.state is SeatState.SERVING and name_of((host, seat.life)) not in self.hosts:
                states[host] = "joining"
        return states

    def apply(
        self,
        view: ModelView | None,
        lives: Mapping[str, str],
        roles: Mapping[str, Role],
        overdue: Collection[str] = (),
    ) -> None:
        """Do what a new view asks for; returns at once, the work goes on in tasks."""
        self._overdue = frozenset(name_of((host, lives[host])) for host in overdue if host in lives)
        self._give_roles({name_of((host, life)): roles[host] for host, life in lives.items() if host in roles})
        for key in [key for key in {*self._offered, *self._joining} if lives.get(key[0]) != key[1]]:
            self._forget(key)
        seats = view.seats if view is not None else {}
        for host, seat in seats.items():
            if seat.version == self.version:
                self._follow((host, seat.life), seat)
        is_tried = any(seat.version == self.version for seat in seats.values())
        self.error = self._fatal or (view.error if view is not None and not is_tried else None)
        self._notify()

    def _notify(self) -> None:
        self._on_change(self)
        self.changed.set()

    def _forget(self, key: Key) -> None:
        """A host is gone, or has a new process: its requests go elsewhere."""
        self._offered.pop(key, None)
        if task := self._joining.pop(key, None):
            task.cancel()
        self._lose(key)

    def _follow(self, key: Key, seat: SeatView) -> None:
        if seat.state is SeatState.WANTED:
            if key not in self._offered:
                self._offered[key] = self._listen(seat.machine)
            _spawn(self._say("offer", *key, self._offered[key]))
        elif seat.state is SeatState.SERVING and key in self._offered:
            self._begin_to_join(key)
        elif seat.state is SeatState.SERVING:
            # Loaded for a frontend of the past, whose endpoints nobody listens at.
            _spawn(self._say("join_failed", *key, "no frontend listens for it"))
        elif seat.state is SeatState.LEAVING:
            self._begin_to_leave(key)

    def _begin_to_join(self, key: Key) -> None:
        if key not in self._joining:
            self._joining[key] = _spawn(self._join(key))

    def _begin_to_leave(self, key: Key) -> None:
        if key not in self._leaving:
            self._leaving[key] = _spawn(self._leave(key))

    async def _join(self, key: Key) -> None:
        try:
            await self._connect(key)
        except Exception as error:
            logger.exception("host cannot be joined model=%s host=%s", self.plan.spec.name, key[0])
            self._offered.pop(key, None)
            self._joining.pop(key, None)  # it may be loaded there once more
            await self._say("join_failed", *key, str(error))
            return
        logger.info("host joined model=%s host=%s life=%s", self.plan.spec.name, *key)
        self._notify()

    async def _leave(self, key: Key) -> None:
        try:
            if task := self._joining.pop(key, None):
                task.cancel()
            was_there = name_of(key) in self.hosts
            await self._disconnect(key)
            if was_there:
                logger.info("host left model=%s host=%s life=%s", self.plan.spec.name, *key)
            self._offered.pop(key, None)
            await self._say("left", *key)
        finally:
            del self._leaving[key]
            self._notify()

    async def _say(self, method: str, *args: Any) -> None:
        try:
            await self._tell(method, self.plan.spec.name, *args)
        except Exception as error:  # a controller that is being restarted will ask again
            logger.debug("controller does not hear %s: %s", method, error)

    async def close(self) -> None:
        """End what goes on here."""
        for task in (*self._joining.values(), *self._leaving.values()):
            task.cancel()


def name_of(key: Key) -> str:
    """The name of an engine, for its client: another one after each start of its host."""
    return "/".join(key)


_tasks: set[asyncio.Task[None]] = set()


def _spawn(work: Any) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[None]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        count_failure("following seats")
        logger.error("background task died task=following_seats, the next view is complete, too", exc_info=error)
