# SPDX-License-Identifier: Apache-2.0
"""The two Ray actors: thin shells around HostSupervisor and Reconciler."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import ray
from ray.actor import ActorHandle

from tokenpool.cluster.host_supervisor import HostSupervisor
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.private_state import read_private, write_private
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import ClusterView, Deployment, Endpoints, HostReport, Order, StaleEpochError
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import HostError
from tokenpool.logs import log_to_stderr
from tokenpool.process.template import Template

logger = logging.getLogger(__name__)

_ACK_LIMIT_S = 5.0
_WATCH_LIMIT_S = 30.0
_PARENT_LOOK_S = 0.5
_CALLS = ("state", "load", "check", "trace", "progress", "metrics", "logs", "attach_at", "detach_frontend")


class HostActor:
    """One engine host of the cluster; calls run on threads, the reports on a thread of their own."""

    def __init__(
        self,
        host: str,
        config: Mapping[str, Any],
        controller: ActorHandle,
        period_s: float,
        env: Mapping[str, str | None],
        has_template: bool,
    ) -> None:
        """With `has_template` a template is kept beside the host; it is this actor's own."""
        log_to_stderr()
        context = ray.get_runtime_context()
        self._supervisor = HostSupervisor(
            host,
            config,
            lambda report: ray.get(controller.report.remote(report), timeout=_ACK_LIMIT_S),
            period_s=period_s,
            env=env,
            node=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            template=Template() if has_template else None,
            labels=[label for key, value in context.get_node_labels().items() for label in (key, f"{key}={value}")],
        )
        self._gone = threading.Event()
        self._supervisor.start()
        threading.Thread(target=_end_with_parent, name="raylet-watch", daemon=True).start()

    def order(self, order: Order) -> int:
        """See HostSupervisor.order."""
        return self._supervisor.order(order)

    def call(self, method: str, *args: Any) -> Any:
        """Call the host process for what changes no model: one of `_CALLS`."""
        if method not in _CALLS:
            raise HostError(f"{method} is no question: send an order")
        return self._supervisor.call(method, *args)

    def report(self) -> HostReport:
        """What is known of the host now."""
        return self._supervisor.report()

    def hold(self) -> None:
        """Return when the actor stops; a caller learns of its death by the error."""
        self._gone.wait()

    def stop(self, limit_s: float) -> None:
        """Let the host finish what it has, at most `limit_s`, then end it."""
        self._supervisor.stop(limit_s)
        self._gone.set()


class Controller:
    """The cluster's only decider; an async actor, so everything here runs on one event loop."""

    def __init__(self, config: ClusterConfig, num_hosts: int, namespace: str) -> None:
        log_to_stderr()
        self._config = config
        self._namespace = namespace
        self._path = snapshot_path(config, ray.get_runtime_context().gcs_address)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.reconciler = Reconciler(
            placement_of(config),
            host_timeout_s=config.host_timeout_s,
            now_s=time.monotonic(),
            snapshot=_read(self._path) if restarted else None,
            num_hosts=num_hosts,
            identity=token_hex(4),
        )
        self._saved: dict[str, Any] | None = None
        self._handles: dict[str, ActorHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[tuple[str, int]] = set()
        self._changed: asyncio.Condition | None = None
        self._seen_version = -1
        threading.Thread(target=_end_with_parent, name="raylet-watch", daemon=True).start()

    # -- calls -------------------------------------------------------------------------------------------

    async def report(self, report: HostReport) -> tuple[int, str]:
        """A host's supervisor reports; returns this controller's epoch and identity."""
        self._begin()
        self.reconciler.host_reported(report, time.monotonic())
        if (report.host, report.actor_pid) not in self._held:
            self._held.add((report.host, report.actor_pid))
            self._spawn(self._hold(report.host, report.actor_pid))
        await self._act()
        return self.reconciler.epoch, self.reconciler.identity

    async def attach(self, frontend: str, revision: int, deployments: list[Deployment]) -> None:
        """See Reconciler.attach."""
        self._begin()
        self.reconciler.attach(frontend, revision, deployments)
        await self._act()

    async def deploy(self, deployment: Deployment, revision: int) -> None:
        """See Reconciler.deploy."""
        self.reconciler.deploy(deployment, revision)
        await self._act()

    async def withdraw(self, name: str, revision: int) -> None:
        """See Reconciler.withdraw."""
        self.reconciler.withdraw(name, revision)
        await self._act()

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Reconciler.drain; returns the models that still have a seat there."""
        self.reconciler.drain(host, is_wanted=is_wanted)
        await self._act()
        return sorted(name for name, _ in self.reconciler.seats.on_host(host))

    async def offer(self, model: str, host: str, life: str, endpoints: Endpoints) -> None:
        """See Reconciler.offer."""
        self.reconciler.offer(model, host, life, endpoints)
        await self._act()

    async def left(self, model: str, host: str, life: str) -> None:
        """See Reconciler.left."""
        self.reconciler.left(model, host, life)
        await self._act()

    async def join_failed(self, model: str, host: str, life: str, reason: str) -> None:
        """See Reconciler.join_failed."""
        self.reconciler.join_failed(model, host, life, reason, time.monotonic())
        await self._act()

    async def watch(self, frontend: str, epoch: int, version: int) -> ClusterView | None:
        """Return the view once it is not the one that the caller has, at once if it has to attach: then None.

        Waits at most 30 s; the caller may get what it has.
        """
        self._begin()
        assert self._changed is not None
        if self.reconciler.frontend != frontend:
            return None
        async with self._changed:
            while not self.reconciler.is_settled or not self._is_news(epoch, version):
                try:
                    async with asyncio.timeout(_WATCH_LIMIT_S):
                        await self._changed.wait()
                except TimeoutError:
                    if self.reconciler.is_settled:
                        break
        return self.reconciler.view()

    async def decisions(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""
        return self.reconciler.log.last(limit)

    async def describe(self) -> dict[str, Any]:
        """Pid, epoch and hosts, for people and tests."""
        hosts = {h: {"node": r.node, "pid": r.pid, "actor_pid": r.actor_pid} for h, r in self.reconciler.hosts.items()}
        return {"pid": os.getpid(), "epoch": self.reconciler.epoch, "hosts": hosts}

    async def check(self) -> None:
        """See Reconciler.check."""
        self.reconciler.check()

    # -- the loop ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._changed is None:  # the loop runs only once a call is there
            self._changed = asyncio.Condition()
            self._spawn(self._loop())

    def _is_news(self, epoch: int, version: int) -> bool:
        return (self.reconciler.epoch, self.reconciler.version) != (epoch, version)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._config.reconcile_period_s)
            try:
                await self._act()
            except Exception:  # a wrong decision must not end all later ones
                logger.exception("reconciling failed")

    async def _act(self) -> None:
        for order in self.reconciler.tick(time.monotonic()):
            self._spawn(self._send(order))
        self._save()
        if self.reconciler.version != self._seen_version and self._changed is not None:
            self._seen_version = self.reconciler.version
            async with self._changed:
                self._changed.notify_all()

    async def _send(self, order: Order) -> None:
        error: Exception | None = None
        changes = 0
        try:
            changes = await (await self._handle(order.host)).order.remote(order)
        except Exception as raised:  # every failure is the order's result
            error = _cause(raised)
        if isinstance(error, StaleEpochError):
            logger.error("replaced by a newer controller, ending: %s", error)
            os._exit(1)
        self.reconciler.order_done(order, error, time.monotonic(), changes)
        await self._act()

    async def _hold(self, host: str, pid: int) -> None:
        """Wait on the host's actor, to learn at once when its process or node dies."""
        try:
            await (await self._handle(host)).hold.remote()
            reason = "its supervisor stopped"
        except Exception as error:
            reason = f"its supervisor died: {type(error).__name__}"
        self._held.discard((host, pid))
        report = self.reconciler.hosts.get(host)
        if report is not None and report.actor_pid == pid:  # else it is back already, in another process
            self.reconciler.host_lost(host, reason)
            await self._act()

    async def _handle(self, host: str) -> ActorHandle:
        if host not in self._handles:
            self._handles[host] = await asyncio.to_thread(ray.get_actor, host, self._namespace)
        return self._handles[host]

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _save(self) -> None:
        snapshot = self.reconciler.snapshot()
        if snapshot == self._saved:
            return
        self._saved = snapshot
        try:
            write_private(self._path, json.dumps(snapshot).encode())
        except OSError as error:  # the next controller asks the hosts; it only takes longer
            logger.warning("snapshot not written path=%s: %s", self._path, error)


def _end_with_parent() -> None:
    """End this process once its raylet is gone: Ray counts it as lost, and a worker may outlive its raylet."""
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(_PARENT_LOOK_S)
    os._exit(1)  # and with it, by the kernel, the host process


def snapshot_path(config: ClusterConfig, cluster: str) -> Path:
    """Where the controller of a pool keeps its snapshot; a machine may have pools of one name in several clusters."""
    folder = Path(config.state_dir or tempfile.gettempdir(), f"tokenpool-state-{os.getuid()}")
    return folder / f"{config.name}-{cluster.replace(':', '-')}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        snapshot = json.loads(read_private(path))
        return snapshot if isinstance(snapshot, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # the hosts are asked instead
        logger.warning("snapshot not read path=%s: %s", path, error)
        return {}


def _cause(error: Exception) -> Exception:
    """What a remote call raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else HostError(f"{type(error).__name__}: {str(error)[:300]}")
