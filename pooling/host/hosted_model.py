# SPDX-License-Identifier: Apache-2.0
"""What a host is given, and what it keeps of each model."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig

from tokenpool.config import SLO
from tokenpool.host.hosted_core import EngineAddresses, HostedEngineCore
from tokenpool.host.model_build import ModelBuild
from tokenpool.host.quarantine import Quarantine


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What one host is given; sizes are bytes."""

    device_memory: int
    page_size: int
    kv_floor_pages: int = 1
    policy: str = "round_robin"


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


@dataclass(slots=True)
class HostedModel:
    """An engine of the host and its books."""

    spec: HostedModelSpec
    index: int
    core: HostedEngineCore
    build: ModelBuild
    quarantine: Quarantine
    weight_pages: list[int]
    build_s: float

    @property
    def name(self) -> str:
        """The model's name in the pool."""
        return self.spec.name
