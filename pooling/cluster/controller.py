# SPDX-License-Identifier: Apache-2.0
"""The Ray actor that decides for a pool: a thin shell around Reconciler.

It is detached, as its hosts are: no server owns it. It ends with the pool: by `end`, or when no server has been there
for `orphan_timeout`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import ray

from tokenpool.cluster.deciding.elastic import elastic_of
from tokenpool.cluster.deciding.scaling import HostsKept
from tokenpool.cluster.host_actors import HostActors
from tokenpool.cluster.host_keeper import HostKeeper
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.pool_record import KEEP_LIMIT_S, Kept, KeptWriter, PoolStanding, PoolStore
from tokenpool.cluster.private_state import OF_POOL, read_snapshot, write_private
from tokenpool.cluster.raylet import beginning, end_with_raylet
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import ClusterView, Deployment, HostReport, Order, Peer, StaleEpochError, Use
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import HostError, PoolError
from tokenpool.logs import log_to_stderr
from tokenpool.policy.leases import Claim, Lease, LeaseBook
from tokenpool.process.ending import within

logger = logging.getLogger(__name__)

_WATCH_LIMIT_S = 30.0
_JOIN_LIMIT_S = 10.0
"""How long whoever adds a model waits for servers that have not joined it yet; one that cannot does not hold it up."""
_LOOK_S = 0.1
_HOST_END_S = 6.0
_NUM_LOST = 100
"""Servers that are gone whose leavings are looked for at the end."""
_LAST_WORD_S = 0.5
"""For the answer that the pool has ended to reach who asked for that."""


class Controller:
    """The cluster's only decider; an async actor, so everything here runs on one event loop."""

    @beginning()
    def __init__(self, identity: str, namespace: str) -> None:
        """For the pool of that start, whose record is in Ray's store."""
        log_to_stderr()
        context = ray.get_runtime_context()
        self._store = PoolStore(namespace)
        record = self._record = self._store.read_record(identity)
        self._config = record.config
        self._path = snapshot_path(self._config, context.gcs_address)
        kept = self._store.read(identity) if context.was_current_actor_reconstructed else None
        self._file_models = kept.file_models if kept else record.file_models
        self._hosts = HostActors(record, namespace)
        self._leases = LeaseBook(record.tenant_slots)
        snapshot = read_snapshot(self._path, identity) if context.was_current_actor_reconstructed else None
        if kept is not None and snapshot is not None:
            snapshot = kept.known(snapshot)
        placement, hosts = placement_of(self._config), kept.hosts if kept else HostsKept()
        self.reconciler = Reconciler(
            placement,
            host_timeout_s=self._config.host_timeout_s,
            server_timeout_s=self._config.frontend_timeout_s,
            now_s=time.monotonic(),
            snapshot=snapshot,
            num_hosts=self._hosts.num_wanted(),
            elastic=elastic_of(self._config, placement, record.max_loaded, hosts),
            period_s=self._config.reconcile_period_s,
            models=kept.models if kept else record.models,
            servers=kept.servers if kept else (),
            identity=token_hex(4),
            max_loaded=record.max_loaded,
            weight_of=lambda tenant: record.tenant_weights.get(tenant, 1.0),
        )
        self._saved: dict[str, Any] | None = None
        self._kept: tuple[Any, ...] = ()
        self._writer = KeptWriter(lambda kept: self._store.write(identity, kept))
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[tuple[str, int]] = set()
        self._seen_hosts: set[str] = set()
        scaling, on_ended = self.reconciler.scaling, self.reconciler.host_ended
        self._keeper = HostKeeper(self._hosts, self._store, scaling, self._seen_hosts, on_ended, self._writer)
        self._lost: list[Peer] = []
        self._forgetting: dict[str, asyncio.Task[None]] = {}
        self._changed: asyncio.Condition | None = None
        self._ending: asyncio.Task[None] | None = None
        self._seen_version, self._is_stopping = -1, False
        end_with_raylet()

    # -- hosts -------------------------------------------------------------------------------------------

    async def report(self, report: HostReport) -> tuple[int, str]:
        """A host's supervisor reports; returns this controller's epoch and identity."""
        self._begin()
        self._seen_hosts.add(report.host)
        is_news = self.reconciler.host_reported(report, time.monotonic())
        if is_news and (report.host, report.actor_pid) not in self._held:
            self._held.add((report.host, report.actor_pid))
            self._spawn(self._hold(report.host, report.actor_pid))
        await self._act()
        return self.reconciler.epoch, self.reconciler.identity

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Reconciler.drain; returns the models that still have a seat there."""
        self.reconciler.drain(host, is_wanted=is_wanted)
        await self._act_and_keep()
        return sorted(name for name, _ in self.reconciler.seats.on_host(host))

    # -- servers -----------------------------------------------------------------------------------------

    async def standing(self) -> PoolStanding:
        """What a server that wants to join needs to know."""
        self._begin()
        record = replace(self._record, models=tuple(self.reconciler.models.kept), file_models=self._file_models)
        return PoolStanding(record, len(self.reconciler.peers), self.reconciler.is_ending)

    async def join(self, peer: Peer) -> bool:
        """See Reconciler.join; one that was given up comes back once hosts have forgotten it."""
        self._begin()
        if (forgetting := self._forgetting.pop(peer.name, None)) is not None:
            await asyncio.wait({forgetting}, timeout=_JOIN_LIMIT_S)
        is_new = self.reconciler.join(peer, time.monotonic())
        await self._act()
        return is_new

    async def beat(self, server: str, claims: Mapping[str, Claim]) -> dict[str, Lease] | None:
        """A server says that it is there; returns its parts of tenants' limits, or None if it has to join."""
        self._begin()
        if not self.reconciler.peers.beat(server, time.monotonic()):
            return None
        return self._leases.answer(server, claims, is_settled=not self.reconciler.peers.missing)

    async def uses(self, server: str, uses: Mapping[str, Use]) -> list[str] | None:
        """See Reconciler.tell."""
        bare = self.reconciler.tell(server, uses, time.monotonic())
        if any(use.num_held or use.rested for use in uses.values()):
            await self._act()
        return bare

    async def equip(self, server: str, name: str, version: int, made: bytes | PoolError) -> None:
        """See Reconciler.equip."""
        self.reconciler.equip(name, version, made, time.monotonic())
        await self._act()

    async def leave(self, server: str) -> None:
        """A server ends; hosts forget it."""
        self.reconciler.leave(server, time.monotonic())
        await self._act()

    async def deployments(self, names: list[str]) -> list[Deployment]:
        """Those of these models that are wanted."""
        models = self.reconciler.models
        return [models[name] for name in names if name in models]

    async def deploy(self, server: str, deployment: Deployment) -> int:
        """See Reconciler.deploy."""
        version = self.reconciler.deploy(deployment)
        await self._act_and_keep()
        return version

    async def all_joined(self, server: str, model: str) -> bool:
        """Return whether all servers serve a model, after a while at most."""
        deadline_s = time.monotonic() + _JOIN_LIMIT_S
        while not self.reconciler.seats.are_joined(self.reconciler.peers.names, model):
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def retire(self, server: str, name: str, drain_s: float) -> bool:
        """See Reconciler.retire."""
        is_there = self.reconciler.retire(name, drain_s, time.monotonic())
        await self._act_and_keep()
        return is_there

    async def drained(self, server: str, name: str) -> None:
        """A server has no more requests of a model that is being removed."""
        self.reconciler.models.drained(name, server)
        await self._act()

    async def withdraw(self, server: str, name: str) -> None:
        """See Reconciler.withdraw."""
        self.reconciler.withdraw(name)
        await self._act_and_keep()

    async def joined(self, server: str, model: str, host: str, life: str) -> None:
        """See Seats.joined."""
        self.reconciler.seats.joined(server, model, host, life)

    async def left(self, server: str, model: str, host: str, life: str) -> None:
        """See Seats.left."""
        self.reconciler.seats.left(server, model, host, life)
        await self._act()

    async def note_file(self, server: str, file_models: bytes) -> None:
        """The server that follows the pool file has carried out what these entries ask for."""
        self._file_models = file_models
        self._keep()
        await self._writer.written(KEEP_LIMIT_S)

    async def watch(self, server: str, epoch: int, version: int) -> ClusterView | None:
        """Return the view once it is not the one that the caller has, at once if it has to join: then None.

        Waits at most 30 s; the caller may get what it has.
        """
        self._begin()
        assert self._changed is not None
        if not self.reconciler.peers.beat(server, time.monotonic()):
            return None
        async with self._changed:
            while not self.reconciler.is_ending and not (self.reconciler.is_settled and self._is_news(epoch, version)):
                try:
                    async with asyncio.timeout(_WATCH_LIMIT_S):
                        await self._changed.wait()
                except TimeoutError:
                    if self.reconciler.is_settled:
                        break
        return self.reconciler.view()

    # -- for people --------------------------------------------------------------------------------------

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

    # -- the end -----------------------------------------------------------------------------------------

    async def end(self, limit_s: float, unless_others_than: str | None = None) -> bool:
        """End the pool: servers finish within `limit_s` and end, then hosts and actors do.

        Returns False, and does nothing, if there are other servers than `unless_others_than`.
        """
        self._begin()
        if unless_others_than is not None and self.reconciler.peers.names - {unless_others_than}:
            return False
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end(limit_s))
        await asyncio.shield(self._ending)
        return True

    async def _end(self, limit_s: float) -> None:
        try:
            await self._end_all(limit_s)
        except Exception:  # whatever is left of it, this pool is none any more
            logger.exception("the pool does not end in order")
        finally:
            threading.Timer(_LAST_WORD_S, self._hosts.end_controller).start()

    async def _end_all(self, limit_s: float) -> None:
        self.reconciler.end()
        await self._act()
        deadline_s = time.monotonic() + limit_s
        while len(self.reconciler.peers) and time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_S)
        self._is_stopping = True
        servers = [*self._lost, *self.reconciler.gone, *self.reconciler.peers]
        await self._hosts.end(_HOST_END_S, set(self._seen_hosts), servers)
        self._path.unlink(missing_ok=True)
        await self._writer.stop(KEEP_LIMIT_S)
        for forget in (self._store.clear, lambda: self._store.drop_record(self._record.identity)):
            await within(KEEP_LIMIT_S, "forgetting what the next controller needs", asyncio.to_thread(forget))

    # -- the loop ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._changed is None:  # the loop runs only once a call is there
            self._changed = asyncio.Condition()
            self._spawn(self._loop())
            self._spawn(self._keeper.run(lambda: self._ending is not None))

    def _is_news(self, epoch: int, version: int) -> bool:
        return (self.reconciler.epoch, self.reconciler.version) != (epoch, version)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._config.reconcile_period_s)
            try:
                await self._act()
                self._end_if_orphaned()
            except Exception:  # a wrong decision must not end all later ones
                logger.exception("reconciling failed")

    def _end_if_orphaned(self) -> None:
        alone_s = self.reconciler.peers.alone_s(time.monotonic())
        if alone_s > self._config.orphan_timeout_s and self._ending is None:
            logger.warning("no server for %.0f s (cluster.orphan_timeout): the pool ends", alone_s)
            self._ending = asyncio.get_running_loop().create_task(self._end(0.0))

    async def _act(self) -> None:
        if self._is_stopping:
            return
        for order in self.reconciler.tick(time.monotonic()):
            self._spawn(self._send(order))
        gone, self.reconciler.gone = self.reconciler.gone, []
        self._lost = [*self._lost, *gone][-_NUM_LOST:]
        self._forgetting = {name: task for name, task in self._forgetting.items() if not task.done()}
        for peer in gone:
            self._leases.forget(peer.name)
            self._forgetting[peer.name] = self._spawn(self._hosts.forget(peer, list(self.reconciler.hosts)))
        self._save()
        self._keep()
        self._keeper.tell()
        if self.reconciler.version != self._seen_version and self._changed is not None:
            self._seen_version = self.reconciler.version
            async with self._changed:
                self._changed.notify_all()

    async def _act_and_keep(self) -> None:
        """As `_act`; what has changed is known to the next controller, too, unless Ray's head is away."""
        await self._act()
        await self._writer.written(KEEP_LIMIT_S)

    def _keep(self) -> None:
        """Let the next controller know what hosts cannot tell it, as soon as Ray's head takes it."""
        models, servers = self.reconciler.models, list(self.reconciler.peers.all)
        hosts = self.reconciler.scaling.kept if self.reconciler.scaling is not None else HostsKept()
        draining = tuple(sorted(self.reconciler.draining))
        stamp = (models.revision, set(models.retiring), self._file_models, servers, hosts, draining)
        if stamp != self._kept and not self._is_stopping:
            self._writer.put(Kept(models.kept, self._file_models, servers, hosts, draining))
            self._kept = stamp

    async def _send(self, order: Order) -> None:
        error: Exception | None = None
        changes = 0
        try:
            changes = await (await self._hosts.handle(order.host)).order.remote(order)
        except Exception as raised:  # every failure is the order's result
            error = _cause(raised)
        if isinstance(error, StaleEpochError):
            logger.error("replaced by a newer controller, ending: %s", error)
            os._exit(1)
        self.reconciler.order_done(order, error, time.monotonic(), changes)
        await self._act()

    async def _hold(self, host: str, pid: int) -> None:
        """Wait on the host's actor, to learn at once when its process or node dies."""
        reason = "its supervisor stopped"
        try:
            has_stopped = await (await self._hosts.handle(host)).hold.remote()
        except Exception as error:
            has_stopped, reason = True, f"its supervisor died: {type(error).__name__}"
        self._held.discard((host, pid))
        if not has_stopped:  # another controller has begun to wait
            return
        report = self.reconciler.hosts.get(host)
        if report is not None and report.actor_pid == pid:  # else it is back already, in another process
            self.reconciler.host_lost(host, reason)
            await self._act()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _save(self) -> None:
        snapshot = self.reconciler.snapshot()
        if snapshot == self._saved:
            return
        self._saved = snapshot
        try:
            write_private(self._path, json.dumps({**snapshot, OF_POOL: self._record.identity}).encode())
        except OSError as error:  # the next controller asks the hosts; it only takes longer
            logger.warning("snapshot not written path=%s: %s", self._path, error)


def snapshot_path(config: ClusterConfig, cluster: str) -> Path:
    """Where the controller of a pool keeps its snapshot; a machine may have pools of one name in several clusters."""
    folder = Path(config.state_dir or tempfile.gettempdir(), f"tokenpool-state-{os.getuid()}")
    return folder / f"{config.name}-{cluster.replace(':', '-')}.json"


def _cause(error: Exception) -> Exception:
    """What a remote call raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else HostError(f"{type(error).__name__}: {str(error)[:300]}")
