# SPDX-License-Identifier: Apache-2.0
"""Joins a host to the store of its node, if its pool has one; see pooling/node_store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tokenpool.host.host_room import HostRoom
from tokenpool.memory.devices.device import Device
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.place import folder_of
from tokenpool.wire.spec import HostConfig

Call = Callable[[Callable[[], Any]], Future[Any]]


def join_node(config: HostConfig, ledger: HostLedger, room: HostRoom, call: Call, device: Device) -> NodeStore | None:
    """The store, with this host's book in the node's; None for a host whose copies are its own.

    `call` runs a function on the loop's thread. A host that is a group of ranks shares nothing: each has a part.
    """
    if not config.host_store or not config.movable_weights or config.tensor_parallel_size > 1:
        return None
    asked: list[Future[Any]] = []

    def give_back(nbytes: int) -> None:
        """Asked for again each second: a loop that has not come to it meanwhile gives no more than is wanted."""
        if not asked or asked[-1].done():
            asked[:] = [call(lambda: room.give_back(nbytes))]

    store = NodeStore(folder_of(config.host_store), config.host_memory, give_back, device.register_host)
    store.start()
    ledger.node = store
    return store
