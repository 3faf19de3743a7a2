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
from tokenpool.cluster.raylet import end_with_raylet
from tokenpool.cluster.values import HostReport, Order, Peer
from tokenpool.errors import HostError
from tokenpool.logs import log_to_stderr
from tokenpool.process.template import Template

_ACK_LIMIT_S = 5.0
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
        self._gone = threading.Event()
        self._supervisor.start()
        end_with_raylet()

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

    def hold(self) -> None:
        """Return when the actor stops; a caller learns of its death by the error."""
        self._gone.wait()

    def stop(self, limit_s: float) -> None:
        """Let the host finish what it has, at most `limit_s`, then end it."""
        self._supervisor.stop(limit_s)
        self._gone.set()
