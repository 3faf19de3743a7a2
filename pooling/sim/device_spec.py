# SPDX-License-Identifier: Apache-2.0
"""What a simulated device is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenpool.policy.capacity import Role


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a simulated device is, and what it does beside the turn policy's decisions."""

    memory_bytes: int
    """For weights and KV."""
    link_bytes_per_s: float
    """Of copies from host memory, one at a time."""
    role: Role = Role.MIXED
    """Which part of requests it serves."""
    max_batched_tokens: int = 8192
    """Tokens of one step, as vLLM's `max_num_batched_tokens`."""
    max_running: int = 256
    """Requests of one model that decode together, as vLLM's `max_num_seqs`."""
    max_prefills: int = 256
    """Prompts in one step; 1 = as Aegaeon does."""
    max_resident: int | None = None
    """Models with weights on the device, one that is coming in included; None = as many as fit."""
    can_prefetch: bool = True
    """Whether weights may come in while another model steps."""
    kv_follows_turn: bool = False
    """Whether all KV of a model leaves when its turn ends, and comes back for the next one, as Aegaeon does."""
    out_bytes_per_s: float | None = None
    """Of copies to the host, which run beside those from it; None = the same speed."""
    switch_s: float = 0.0
    """Fixed part of bringing weights in, and of taking them away if `weights_go_out`."""
    weights_go_out: bool = False
    """Whether weights that leave are copied to the host, as vLLM's sleep mode does, rather than dropped."""
    kv_lost: bool = False
    """Whether all KV of a model is dropped when its turn ends, and running requests are prefilled again."""
    change_s: float = 0.0
    """Between the steps of two models."""
    resident_bytes: float = 0.0
    """Memory that a model takes beside weights and KV while its weights are on the device."""
    engine_bytes: float = 0.0
    """Memory that each model takes from its first request here on."""
    node_link_bytes_per_s: float = math.inf
    """Of copies from host memory to all devices of a node together."""
    devices_per_node: int = 8
    node_bytes: float = math.inf
    """Of host memory for weights, of a node."""
    prefix_bytes: float = 0.0
    """Of memory for the KV of prompts that others may share; 0 = none is kept."""
    prefix_on_device: bool = False
    """Whether that memory is the device's own, so that nothing is copied."""
    disk_bytes_per_s: float = math.inf
    """At which weights come into host memory."""
