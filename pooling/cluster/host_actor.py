# SPDX-License-Identifier: Apache-2.0
"""The Ray actor of one engine host: a thin shell around HostSupervisor. It belongs to the pool, not to who made it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from tokenpool.cluster.host_supervisor import HostSupervisor
from tokenpool.cluster.machine import clear_after, machine_id
from tokenpool.cluster.pool_record import PoolStore
from tokenpool.cluster.raylet import beginning, end_with_raylet
from tokenpool.cluster.values import HostReport, Order, Peer
from tokenpool.errors import HostError
from tokenpool.logs import log_to_stderr
from tokenpool.process.template import Template

THREADS = {"orders": 2, "watches": 2}
"""Threads of calls that take long, by their concurrency group: they are none of those that answer questions, and let
servers have themselves attached, whatever waits for a host that loads one model after the other."""
_ACK_LIMIT_S = 5.0
_CALLS = ("state", "load", "check", "trace", "progress", "metrics", "logs", "attach_at", "detach_frontend")


class End:
    """The end of an actor, for which the last one waits who asked; any thread.

    Ray goes on with a call whose caller is gone: else a thread would wait for each controller that there ever was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_come = False
        self._waiting = threading.Event()

    def wait(self) -> bool:
        """Return True once it has come, False as soon as somebody else waits for it."""
        with self._lock:
            self._waiting.set()
            waiting = self._waiting = threading.Event()
            if self._has_come:
                return True
        waiting.wait()
        return self._has_come

    def come(self) -> None:
        """Let who waits know."""
        with self._lock:
            self._has_come = True
            self._waiting.set()


class HostActor:
    """One engine host of the cluster; calls run on threads, the reports on a thread of their own."""

    @beginning()
    def __init__(
        self,
        host: str,
        config: Mapping[str, Any],
        controller: ActorHandle,
        period_s: float,
        env: Mapping[str, str | None],
        has_template: bool,
        has_network: bool,
    ) -> None:
        """With `has_template` a template is kept beside the host; it is this actor's own.

        With `has_network` the host listens at this node's address for hosts of other machines.
        """
        log_to_stderr()
        context, address = ray.get_runtime_context(), ray.util.get_node_ip_address()
        if has_network:
            config = {**config, "node_ip": address}
        self._supervisor = HostSupervisor(
            host,
            config,
            lambda report: ray.get(controller.report.remote(report), timeout=_ACK_LIMIT_S),
            period_s=period_s,
            env=env,
            node=context.get_node_id(),
            address=address,
            template=Template() if has_template else None,
            generation=PoolStore(context.namespace).next_generation(host),
            labels=[label for key, value in context.get_node_labels().items() for label in (key, f"{key}={value}")],
        )
        self._end = End()
        self._supervisor.start()
        end_with_raylet()

    @ray.method(concurrency_group="orders")  # type: ignore[untyped-decorator]
    def order(self, order: Order) -> int:
        """See HostSupervisor.order."""
        return self._supervisor.order(order)

    def call(self, method: str, *args: Any) -> Any:
        """Call the host process for what changes no model: one of `_CALLS`."""
        if method not in _CALLS:
            raise HostError(f"{method} is no question: send an order")
        return self._supervisor.call(method, *args)

    def clear_after(self, peer: Peer) -> None:
        """Remove what a server of this machine has left that is gone."""
        if peer.machine == machine_id():
            clear_after(peer.pid, peer.folders)

    def report(self) -> HostReport:
        """What is known of the host now."""
        return self._supervisor.report()

    @ray.method(concurrency_group="watches")  # type: ignore[untyped-decorator]
    def hold(self) -> bool:
        """See End.wait; a caller learns of the actor's death by the error."""
        return self._end.wait()

    def stop(self, limit_s: float) -> None:
        """Let the host finish what it has, at most `limit_s`, then end it."""
        self._supervisor.stop(limit_s)
        self._end.come()
