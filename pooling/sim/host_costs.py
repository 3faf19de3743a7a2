# SPDX-License-Identifier: Apache-2.0
"""What a GPU host pays beside its kernels, charged to all systems alike.

No GPU host has been measured, so the defaults are assumptions of this project, chosen above what its CPU hosts take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokenpool.errors import check_setting
from tokenpool.policy.capacity import LOAD_BYTES_PER_S
from tokenpool.sim.costs import attention_s
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import GpuSpec
from tokenpool.sim.workload import ModelCosts


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Settings, each with its source; `FREE` charges nothing."""

    step_s: float = 1e-3
    """Of the host's own time in each step. Source: assumed; a CPU host of this project takes 0.2 to 0.33 ms."""
    change_s: float = 3e-3
    """Between the steps of two models. Source: assumed; a CPU host takes less than 1 ms."""
    resident_bytes: float = 1e9
    """Device memory of a model whose weights are there, beside weights and KV. Source: assumed: graphs, workspaces."""
    engine_bytes: float = 5e7
    """Device memory of each engine that is built, resident or not. Source: assumed: fixed buffers."""
    load_s: float = 0.05
    """Of each load of weights, to map, zero and unmap pages. Source: assumed: some hundred driver calls."""
    host_bytes: float = 2e12
    """Host memory of a node for weights. Source: the common size of a machine with 8 H100."""
    node_link_bytes_per_s: float = 64e9
    """Of all copies from the host memory of a node to its devices together. Source: assumed: half of 8 links of
    16 GB/s, which share switches and memory controllers."""
    disk_bytes_per_s: float = LOAD_BYTES_PER_S
    """At which weights come into host memory, registration included. Source: `policy.capacity.LOAD_BYTES_PER_S`."""
    gpus_per_node: int = 8
    has_attention: bool = True
    """Whether prompts cost a term of length squared where the profile shows none. Source: `costs.estimate_costs`;
    profiles end at 4,096 tokens, where the term is small."""

    def __post_init__(self) -> None:
        for name in ("step_s", "change_s", "resident_bytes", "engine_bytes", "load_s"):
            check_setting(0 <= getattr(self, name) < math.inf, name, "must be 0 or more")
        for name in ("host_bytes", "node_link_bytes_per_s", "disk_bytes_per_s"):
            check_setting(getattr(self, name) > 0, name, "must be above 0")
        check_setting(self.gpus_per_node >= 1, "gpus_per_node", "must be at least 1")

    def of_model(self, costs: ModelCosts, on: GpuSpec) -> ModelCosts:
        """The costs of a model with the host's time in each step, and with a term for long prompts."""
        per_token2_s = costs.prefill_per_token2_s
        if self.has_attention and not per_token2_s:
            per_token2_s = attention_s(costs.weight_bytes * costs.num_gpus, on, costs.num_gpus)
        return costs._replace(
            prefill_s=costs.prefill_s + self.step_s,
            step_s=costs.step_s + self.step_s,
            prefill_per_token2_s=per_token2_s,
        )

    def of_device(self, spec: DeviceSpec, gpus_per_device: int = 1) -> DeviceSpec:
        """A device of `gpus_per_device` GPUs; sizes and speeds of a spec are those of one of them."""
        return replace(
            spec,
            change_s=spec.change_s + self.change_s,
            switch_s=spec.switch_s + self.load_s,
            resident_bytes=self.resident_bytes,
            engine_bytes=self.engine_bytes,
            node_link_bytes_per_s=self.node_link_bytes_per_s / gpus_per_device,
            devices_per_node=max(1, self.gpus_per_node // gpus_per_device),
            node_bytes=self.host_bytes / gpus_per_device,
            disk_bytes_per_s=self.disk_bytes_per_s,
        )


FREE = HostCosts(
    step_s=0.0,
    change_s=0.0,
    resident_bytes=0.0,
    engine_bytes=0.0,
    load_s=0.0,
    host_bytes=math.inf,
    node_link_bytes_per_s=math.inf,
    has_attention=False,
)
"""No costs of hosts: for checks against simulators that have none, and for cases worked out by hand."""
