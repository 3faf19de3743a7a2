# SPDX-License-Identifier: Apache-2.0
"""Joins a host to the store of its node, if its pool has one; see pooling/node_store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenpool.host.host_room import HostRoom
from tokenpool.memory.devices.device import Device
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.place import folder_of
from tokenpool.wire.spec import HostConfig

Call = Callable[[Callable[[], Any]], Any]


def join_node(config: HostConfig, ledger: HostLedger, room: HostRoom, call: Call, device: Device) -> NodeStore | None:
    """The store, with this host's book in the node's; None for a host whose copies are its own.

    `call` runs a function on the loop's thread. A host that is a group of ranks shares nothing: each has a part.
    """
    if not config.host_store or not config.movable_weights or config.tensor_parallel_size > 1:
        return None
    store = NodeStore(
        folder_of(config.host_store),
        config.host_memory,
        lambda nbytes: call(lambda: room.give_back(nbytes)),
        device.register_host,
    )
    store.start()
    ledger.node = store
    return store
