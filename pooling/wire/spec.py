# SPDX-License-Identifier: Apache-2.0
"""What a host is given: its own settings, and those of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenpool.config import SLO
from tokenpool.wire.addresses import EngineAddresses

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What one host is given; sizes are bytes."""

    device_memory: int
    page_size: int
    kv_floor_pages: int = 1
    policy: str = "round_robin"
    policy_options: tuple[tuple[str, float], ...] = ()
    movable_weights: bool = False
    """Whether weights may leave the device while their model rests."""
    cpu_link: int | None = None
    """Bytes per second of copies to and from the CPU device; None = as fast as memory is."""
    node_ip: str | None = None
    """Address at which hosts of other nodes reach this one for KV; None = only hosts of this machine do."""
    tensor_parallel_size: int = 1
    """Ranks that every model of the host runs on; all sizes are those of one rank."""
    host_memory: int = 8 << 30
    """Host memory for copies of movable weights and for KV that is off the device."""
    host_store: str = ""
    """Name of the store in which hosts of the node share copies of weights; empty = this host has its own."""
    device_budget: int | None = None
    """What it may use of `device_memory` at its start, while the rest is lent; 0 = it is parked; None = all."""
    host_timeout_s: float = 120.0
    """Without a pulse, or in one step, copy or call, for so long, the host is killed."""
    load_timeout_s: float = 1800.0
    """The same for one phase of a build, or a read of a checkpoint, that does not get on."""


@dataclass(frozen=True, slots=True)
class HostedModelSpec:
    """One model for a host."""

    name: str
    vllm_config: VllmConfig
    addresses: EngineAddresses | None = None
    slo: SLO | None = None
    priority: int = 0
    weight_bytes: int = 0
    """Size of the checkpoint, reserved before loading; the larger of this and what was loaded is accounted."""
    log_stats: bool = True
    keep: str | None = None
    """What of the weights never leaves: those on the `device`, or the copy on the `host`."""
