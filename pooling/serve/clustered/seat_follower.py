# SPDX-License-Identifier: Apache-2.0
"""One model of a clustered pool and the hosts that serve it: follows the controller's view and answers it.

How requests reach an engine is for a subclass: over this process's own sockets, or over those of several frontends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from tokenpool.cluster.values import ALWAYS, Deployment, ModelView, SeatState, SeatView
from tokenpool.config import Loading
from tokenpool.errors import HostError
from tokenpool.policy.capacity import Role
from tokenpool.process.keeper import Backoff, count_failure
from tokenpool.serve.launch.model_plan import ModelPlan

logger = logging.getLogger(__name__)

Tell = Callable[..., Awaitable[Any]]
"""Says something of a model: what, the model's name, the host and its life, and more."""

Key = tuple[str, str]
"""A host and its life."""

_births = itertools.count(1)
RETRY_S = 0.2
"""Between two attempts."""
_SAY_LIMIT_S = 10.0
_MANY_FAILURES = 10
"""So many attempts in a row may fail to join an engine before that is told as the model's error."""


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
        self.birth = next(_births)
        """Tells those apart that were made for one model, which was cold in between."""
        self._is_closed = False
        self._fatal: Exception | None = None  # what no other host would help against, while it is so
        self._backoff = Backoff(stable_after_s=math.inf)  # of attempts that end so
        self._unreachable: dict[Key, Exception] = {}
        self._overdue: frozenset[str] = frozenset()  # engines that nobody should count on now
        self._tell = tell
        self._on_change = on_change
        self._anew: set[Key] = set()  # engines that are joined once more, because they have forgotten this server
        self._seen: dict[Key, SeatState] = {}  # seats of this version, by the last view
        self._machines: dict[Key, str] = {}
        self._joining: dict[Key, asyncio.Task[None]] = {}
        self._leaving: dict[Key, asyncio.Task[None]] = {}

    # -- how requests reach an engine ----------------------------------------------------------------

    @property
    @abstractmethod
    def hosts(self) -> Collection[str]:
        """Names, by `name_of`, of the engines that take its requests."""

    @abstractmethod
    async def _connect(self, key: Key, machine: str) -> None:
        """Let the engine there, which runs on that machine, take requests; raises what stops it."""

    @abstractmethod
    async def _disconnect(self, key: Key) -> None:
        """Return once nothing is at that engine any more."""

    @abstractmethod
    def _lose(self, key: Key, blame: bool = True) -> None:
        """The engine is gone; with `blame` perhaps because of a request that it had."""

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

    @property
    def is_served(self) -> bool:
        """Whether a host takes its requests that can be counted on, or is about to take them again."""
        engines = {*self.hosts, *map(name_of, self._anew)}
        return self.client is not None and any(engine not in self._overdue for engine in engines)

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
        seats = view.seats if view is not None else {}
        there = {(host, seat.life) for host, seat in seats.items()}
        for key in [key for key in self._joining if lives.get(key[0]) != key[1] or key not in there]:
            self._forget(key, blame=view is None or key[0] not in view.silent)
        own = {(host, seat.life): seat for host, seat in seats.items() if seat.version == self.version}
        self._seen = {key: seat.state for key, seat in own.items()}
        serving = {key for key, state in self._seen.items() if state is SeatState.SERVING}
        self._anew = {key for key in self._anew & serving if lives.get(key[0]) == key[1]}
        for key, seat in own.items():
            self._follow(key, seat)
        self.error = self._fatal or self._reason() or (view.error if view is not None and not own else None)
        self._notify()

    def _reason(self) -> Exception | None:
        """Why no engine can be reached; None if one is, or attempts go on."""
        return next(iter(self._unreachable.values()), None) if not self.hosts else None

    def _notify(self) -> None:
        if not self._is_closed:
            self._on_change(self)
        self.changed.set()

    def attach_anew(self) -> None:
        """Hosts have forgotten this server: its requests, and those that come, go on once they are attached again."""
        for key in list(self._joining):
            if name_of(key) in self.hosts:
                self._anew.add(key)
            self._forget(key, blame=False)

    def say_joined(self) -> None:
        """Tell the controller, which may be a new one, where requests are sent."""
        for key in self._joining:
            if name_of(key) in self.hosts:
                _spawn(self._say("joined", *key))

    def _forget(self, key: Key, blame: bool = True) -> None:
        """A host is gone, or has a new process: its requests go elsewhere."""
        self._unreachable.pop(key, None)
        self._machines.pop(key, None)
        if task := self._joining.pop(key, None):
            task.cancel()
        self._lose(key, blame)

    def _follow(self, key: Key, seat: SeatView) -> None:
        if seat.state is SeatState.SERVING and key not in self._joining:
            self._machines[key] = seat.machine
            self._joining[key] = _spawn(self._join(key, seat.machine))
        is_to_leave = seat.state is SeatState.LEAVING or (seat.state is SeatState.REMOVING and key in self._joining)
        if is_to_leave and key not in self._leaving:
            self._leaving[key] = _spawn(self._leave(key))

    def _rejoin(self, key: Key) -> None:
        """An engine cannot be reached any more that may be there still."""
        if key in self._joining:
            self._joining[key].cancel()
            self._joining[key] = _spawn(self._join(key, self._machines[key]))
        self._notify()

    async def _join(self, key: Key, machine: str) -> None:
        name, failures, told, where = self.plan.spec.name, 0, "", self._where(key)
        while True:
            try:
                await self._connect(key, machine)
                break
            except Exception as error:  # such as a host that has just ended; the next view says so
                failures += 1
                if key in self._anew:
                    self._anew.discard(key)
                    self._notify()
                if str(error) != told:  # it is tried five times a second
                    told = str(error)
                    logger.warning("host cannot be joined model=%s host=%s: %s", name, key[0], told)
                if self._fatal is not None:
                    await self._tell_fatal()
                    await asyncio.sleep(self._backoff.next_s())
                    continue
                if failures >= _MANY_FAILURES:
                    self._unreachable[key] = HostError(f"{key[0]} cannot be joined: {error}")
                    self.error = self._reason()
                    self._notify()
                await asyncio.sleep(RETRY_S)
        self._unreachable.pop(key, None)
        self._anew.discard(key)
        self.error = self._fatal or self._reason()
        logger.info("host joined model=%s host=%s life=%s", name, *key)
        self._notify()
        await self._say("joined", *where)

    def _where(self, key: Key) -> tuple[Any, ...]:
        """What names the engine there, as it is now, to those who are told of it."""
        return key

    async def _tell_fatal(self) -> None:
        """No host can help this process, for now."""
        self._notify()

    async def _leave(self, key: Key) -> None:
        try:
            while self._is_needed(key):
                self.changed.clear()
                await self.changed.wait()
            where = self._where(key)
            if task := self._joining.pop(key, None):
                task.cancel()
            was_there = name_of(key) in self.hosts
            self._unreachable.pop(key, None)
            await self._disconnect(key)
            if was_there:
                logger.info("host left model=%s host=%s life=%s", self.plan.spec.name, *key)
            await self._say("left", *where)
        finally:
            if key not in self._joining:  # else there is another engine by now
                self._machines.pop(key, None)
            if self._leaving.get(key) is asyncio.current_task():
                del self._leaving[key]
            self._notify()

    def _is_needed(self, key: Key) -> bool:
        """Whether an engine that is to be left is the only one to count on, while another one is about to be joined.

        A model that moves is loaded on its new host by then, or nearly so. Without any engine new requests are refused.
        """
        if self._seen.get(key) is not SeatState.LEAVING or name_of(key) not in self.hosts or self._fatal is not None:
            return False
        loading = [other for other, state in self._seen.items() if state is SeatState.LOADING]
        serving = [other for other, state in self._seen.items() if state is SeatState.SERVING]
        if any(name_of(other) in self.hosts and name_of(other) not in self._overdue for other in serving):
            return False
        return bool(loading) or any(other in self._joining and other not in self._unreachable for other in serving)

    async def _say(self, method: str, *args: Any) -> None:
        """Tell what somebody waits for, again until it is heard; whoever knows better cancels this."""
        while not self._is_closed:
            try:
                async with asyncio.timeout(_SAY_LIMIT_S):
                    await self._tell(method, self.plan.spec.name, *args)
                return
            except Exception as error:  # such as a controller that is being restarted
                logger.debug("nobody hears %s model=%s: %s", method, self.plan.spec.name, error)
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """End what goes on here; who waits for a host hears that there will be none."""
        self._is_closed = True
        self.error = self.error or HostError(f"model {self.plan.spec.name!r} is not followed any more")
        self.changed.set()
        for task in (*self._joining.values(), *self._leaving.values()):
            task.cancel()


def deployment_of(plan: ModelPlan, version: int, loading: Loading = ALWAYS, *, is_bare: bool = False) -> Deployment:
    """A model as controller, hosts and other servers are told of it; takes the time of making its engine config.

    With `is_bare` that is made by whoever has a request for it first.
    """
    slo = plan.spec.slo
    return Deployment(
        plan.spec.name,
        version,
        plan.weight_bytes,
        plan.spec.priority,
        None if is_bare else packed(plan),
        pickle.dumps(replace(plan, checked=None)),
        {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s} if slo else {},
        plan.spec.replicas,
        plan.spec.max_replicas,
        plan.spec.hosts,
        loading=loading,
    )


def packed(plan: ModelPlan) -> bytes:
    """What hosts need to load a model."""
    return pickle.dumps(plan.for_host(plan.checked if plan.checked is not None else plan.engine_config()))


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
