# SPDX-License-Identifier: Apache-2.0
"""The pool behind the port when its hosts are spread over a Ray cluster: the same server, other hosts."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections import Counter as Totals
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from secrets import token_hex
from typing import Any

from starlette.applications import Starlette
from vllm.platforms import current_platform

from tokenpool.cluster.session import Session, connect, wanted_hosts
from tokenpool.cluster.values import ClusterView, Deployment
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError, HostError
from tokenpool.host.trace import chrome_traces
from tokenpool.metric_registry import metric
from tokenpool.serve.cluster_model import ClusterModel, EndpointMaker
from tokenpool.serve.keeper import Work, start_kept
from tokenpool.serve.launch_plan import ModelPlan, host_config, plan_pool
from tokenpool.serve.model_client import ModelClient
from tokenpool.serve.pool_file import follow_pool_file
from tokenpool.serve.pool_server import PoolServer
from tokenpool.serve.seat_follower import SeatFollower

logger = logging.getLogger(__name__)

_DECISIONS = metric("decisions").make()
_RETRY_S = 0.2
_CALL_LIMIT_S = 30.0
_LOOKS = ("state", "load", "progress", "metrics")
_LOOK_LIMIT_S = 5.0
"""For what is asked all the time; a host that builds a model answers late."""
_RETRY_CALLS_S = 60.0
_LOADS_PERIOD_S = 1.0
_RAY_END_S = 4.0
_UNLOAD_LIMIT_S = 120.0


def plan_cluster(config: PoolConfig, num_hosts: int) -> tuple[PoolConfig, list[ModelPlan]]:
    """Plan a pool whose memory settings are those of each host; raises ConfigError.

    With `weights: fixed` all models must fit on all hosts together, else on each: a host may get any of them.
    """
    for key in ("device_memory", "host_memory"):
        if getattr(config, key) is None:
            raise ConfigError("auto is not there for a cluster: give the size that each host may use", key=key)
    if config.weights != "fixed":
        return plan_pool(config)
    assert config.device_memory is not None
    planned, plans = plan_pool(replace(config, device_memory=config.device_memory * num_hosts))
    return replace(planned, device_memory=config.device_memory), plans


def plan_on_cluster(config: PoolConfig, address: str) -> tuple[PoolConfig, list[ModelPlan], Session]:
    """Connect to Ray, plan, start the actors; raises PoolError."""
    use_gpus = current_platform.is_cuda()
    connect(address, config.cluster, config.cluster.hosts or 1)
    config, plans = plan_cluster(config, wanted_hosts(config.cluster, use_gpus=use_gpus))
    return config, plans, Session(config.cluster, asdict(host_config(config, plans)), use_gpus=use_gpus)


class _Hosts:
    """All hosts as the one host that `PoolServer` knows."""

    pid: int | None = None
    ended = False
    guard = None  # the hosts' supervisors have theirs

    def __init__(self, session: Session, names: Callable[[], list[str]]) -> None:
        self._session = session
        self._names = names

    async def call(self, method: str, *args: Any) -> Any:
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
        names = self._names()
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

    async def stop(self, limit_s: float) -> None:
        """End all hosts, and what Ray has here."""
        await self._session.stop(max(1.0, limit_s - _RAY_END_S))


class ClusterServer(PoolServer):
    """A frontend that follows the controller's view. The controller may die at any time: requests go on."""

    def __init__(
        self,
        config: PoolConfig,
        plans: list[ModelPlan],
        outer: Starlette,
        session: Session,
        pool_file: str | None = None,
    ) -> None:
        super().__init__(config, plans, outer)
        self._pool_file = pool_file
        self._session = session
        self._hosts = self._host = _Hosts(session, lambda: list(self._view.hosts) if self._view else [])  # type: ignore[assignment]
        self._view: ClusterView | None = None
        self._revision = 1
        self._frontend = token_hex(4)
        self._models: dict[str, SeatFollower] = {}
        self._deployments: dict[str, Deployment] = {}
        self._folder = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
        always_tcp = config.cluster.transport == "tcp"
        self._endpoints = EndpointMaker(self._folder, session.address, always_tcp=always_tcp)
        self._loads: dict[str, Any] = {}  # what hosts told last of their queues
        self._counted: Totals[tuple[int, str]] = Totals()
        self._following: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Finish what was accepted, at most `shutdown_timeout` long, then end everything."""
        await super().stop()
        if self._following is not None:
            self._following.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _first_start(self) -> None:
        for name, plan in self._plans.items():
            await self._want(name, plan)
        self._following = start_kept("following the controller", self._follow)
        # What no host takes is `failed` by now; the controller tries it again.
        await asyncio.gather(*(self._until_served(name) for name in list(self._models)), return_exceptions=True)

    def _background(self) -> Mapping[str, Work]:
        works = dict(super()._background())
        del works["supervising the host"]
        works |= {"following nodes": self._session.follow_nodes, "asking for queues": self._ask_loads}
        if self._pool_file:
            works["following the pool file"] = partial(follow_pool_file, self._pool_file, self)
        return works

    async def _ask_loads(self) -> None:
        """Ask hosts for their queues and where weights are, while a model has several to choose from."""
        while True:
            await asyncio.sleep(_LOADS_PERIOD_S)
            shared = [model for model in self._models.values() if len(model.hosts) > 1]
            if shared:
                self._loads = await self._hosts.ask("load")
                for model in shared:
                    model.learn(self._loads)

    async def _want(self, name: str, plan: ModelPlan) -> None:
        model = self._model(plan)
        await model.prepare()
        self._deployments[name] = await model.deployment()
        self._models[name] = model

    def _model(self, plan: ModelPlan) -> SeatFollower:
        model = ClusterModel(plan, self._revision, self._tell, self._endpoints, self._show)
        model.on_fault = partial(self.lives.client_fault, plan.spec.name)
        return model

    # -- the controller ------------------------------------------------------------------------------

    async def _tell(self, method: str, *args: Any) -> Any:
        return await getattr(self._session.controller, method).remote(*args)

    async def _insist(self, method: str, *args: Any) -> None:
        """Tell the controller, again while it is being restarted."""
        for _ in range(int(_RETRY_CALLS_S / _RETRY_S)):
            try:
                await self._tell(method, *args)
                return
            except Exception as error:
                logger.debug("controller does not hear %s: %s", method, error)
                await asyncio.sleep(_RETRY_S)
        raise HostError("the controller does not answer")

    async def _follow(self) -> None:
        epoch = version = -1
        while True:
            try:
                view = await self._tell("watch", self._frontend, epoch, version)
                if view is None:
                    wanted = list(self._deployments.values())
                    await self._tell("attach", self._frontend, self._revision, wanted)
                    continue
            except Exception as error:
                if epoch >= 0 and not self.stopping:
                    logger.warning("controller is away, serving goes on: %s", type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                continue
            epoch, version = view.epoch, view.version
            try:
                self._apply(view)
            except Exception:  # the next view is complete, too
                logger.exception("view not applied")

    def _apply(self, view: ClusterView) -> None:
        self._view = view
        for action, count in view.num_decisions.items():
            new = count - self._counted[view.epoch, action]
            self._counted[view.epoch, action] = count
            _DECISIONS.labels(action).inc(max(0, new))
        for name, model in self._models.items():
            model.apply(view.models.get(name), view.hosts, view.roles, view.overdue)

    def _show(self, model: SeatFollower) -> None:
        """Let the router know whether the model takes requests."""
        name = model.plan.spec.name
        app = self.router.models.get(name)
        if app is None or app.state == "draining":
            return
        if model.is_served:
            assert model.client is not None
            self._clients[name] = model.client
            app.answer_with(model.client)
            self.lives.served(name)
        elif model.error is not None and self.lives[name].error is None:
            self.lives.failed(name, model.error, tried_by="the controller")
        elif app.state == "resident":
            app.state, app.retry_after_s = "unavailable", 5.0

    # -- models --------------------------------------------------------------------------------------

    async def _until_served(self, name: str) -> ModelClient:
        """Wait for the first host of a model; raises what the hosts said when none takes it."""
        model = self._models[name]
        while not model.is_served:
            if model.error is not None:
                raise model.error
            model.changed.clear()
            await model.changed.wait()
        assert model.client is not None
        return model.client

    async def _start_model(self, plan: ModelPlan) -> ModelClient:
        name = plan.spec.name
        self._revision += 1
        await self._want(name, plan)
        try:
            await self._insist("deploy", self._deployments[name], self._revision)
            return await self._until_served(name)
        except BaseException:
            await self._withdraw(name)
            await self._models.pop(name).close()
            self._clients.pop(name, None)
            raise

    async def _withdraw(self, name: str) -> None:
        self._revision += 1
        self._deployments.pop(name, None)
        await self._insist("withdraw", name, self._revision)

    async def _unload(self, name: str) -> None:
        model = self._models[name]
        await self._withdraw(name)
        try:
            async with asyncio.timeout(_UNLOAD_LIMIT_S):
                while self._view is not None and name in self._view.models:
                    model.changed.clear()
                    await model.changed.wait()
        except TimeoutError:
            raise HostError(f"hosts still have model {name!r} after {_UNLOAD_LIMIT_S:g} s") from None
        del self._models[name]

    # -- what is told --------------------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """The pool's state: models, where they are, and every host's own state."""
        answers = await self._hosts.ask("state")
        hosts = {n: {"error": str(a)} if isinstance(a, Exception) else a for n, a in answers.items()}
        view = self._view
        models = {}
        for name, app in self.router.models.items():
            model, seats = self._models.get(name), view.models.get(name) if view else None
            models[name] = {
                "state": app.state,
                "reason": app.reason or None,
                "inflight": app.inflight,
                "model": self._plans[name].spec.model if name in self._plans else None,
                "hosts": model.standing(seats) if model and seats else {},
                "handed_over": model.num_handed_over if model else 0,
            }
        cluster: dict[str, Any] = {}
        if view is not None:
            cluster = {"epoch": view.epoch, "revision": view.revision, "hosts": view.hosts, "roles": view.roles}
        try:
            async with asyncio.timeout(_LOOK_LIMIT_S):
                described = await self._tell("describe")
        except Exception as error:  # it may be away
            described = {"error": type(error).__name__}
        return {
            "ready": self.ready,
            "stopping": self.stopping,
            "progress": self.watch.progress(),
            "host_pid": None,
            "host_restarts": 0,
            "models": models,
            "host": None,
            "cluster": {**cluster, "controller": described},
            "hosts": hosts,
        }

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """All hosts' traces in Chrome's format, each host as a process of its own."""
        answers = await self._hosts.ask("trace", last_s)
        events = {host: answer for host, answer in sorted(answers.items()) if not isinstance(answer, Exception)}
        return await asyncio.to_thread(chrome_traces, events)

    async def host_metrics(self) -> dict[str, str]:
        """Each host's own scrape; a host that does not answer is not in it."""
        answers = await self._hosts.ask("metrics")
        return {host: answer for host, answer in answers.items() if not isinstance(answer, Exception)}

    async def decisions(self, limit: int | None) -> list[dict[str, Any]]:
        """What the controller decided and why, oldest first; raises PoolError while it is away."""
        try:
            return await self._tell("decisions", limit)
        except Exception as error:
            raise HostError(f"the controller does not answer: {type(error).__name__}") from error
