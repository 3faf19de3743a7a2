# SPDX-License-Identifier: Apache-2.0
"""What a host is given, and what it keeps of each model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from vllm.config import VllmConfig

from tokenpool.config import SLO
from tokenpool.errors import CapacityError, PoolError
from tokenpool.host.hosted_core import EngineAddresses, HostedEngineCore
from tokenpool.host.model_build import ModelBuild
from tokenpool.host.quarantine import Quarantine
from tokenpool.policy.cost_model import CostModel

logger = logging.getLogger(__name__)
_MAX_SWITCH_FAILURES = 8
_REST_S, _LONGEST_REST_S = 0.001, 0.016


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


@dataclass(slots=True)
class HostedModel:
    """An engine of the host and its books."""

    spec: HostedModelSpec
    index: int
    core: HostedEngineCore
    build: ModelBuild
    quarantine: Quarantine
    weight_pages: list[int]
    """Pages accounted to weights that do not move."""
    build_s: float
    cost: CostModel = field(default_factory=CostModel)
    """What this model's steps cost."""
    failures: int = 0
    """Switches to it that failed in a row."""
    retry_at_s: float = 0.0
    """Not brought in before this moment of the monotonic clock."""
    rest_until_s: float = 0.0
    """Not stepped before this moment, unless input comes: its last steps did nothing, and not for want of memory."""
    _rests: int = 0

    def may_step(self, now_s: float) -> bool:
        """Whether neither a failure nor an idle step was too short a time ago."""
        return max(self.retry_at_s, self.rest_until_s) <= now_s

    def rest(self, executed: bool) -> None:
        """Note what a step did: a model that waits for something that is not known here is looked at now and then."""
        if executed or self.core.watch.refused is not None or not self.core.has_work():
            self._rests = 0
            return
        self._rests = min(self._rests + 1, 8)
        self.rest_until_s = time.monotonic() + min(_REST_S * 2 ** (self._rests - 1), _LONGEST_REST_S)

    def put_off(self, error: PoolError) -> bool:
        """Try it again later, as a switch to it failed; True if after several failures its requests were ended."""
        self.failures += not isinstance(error, CapacityError)  # others have the room now: it comes
        self.retry_at_s = time.monotonic() + min(0.01 * 2**self.failures, 1.0)
        log = logger.debug if isinstance(error, CapacityError) else logger.error
        log("model cannot come in model=%s failures=%d reason=%s", self.name, self.failures, error)
        if self.failures < _MAX_SWITCH_FAILURES:
            return False
        self.failures = 0
        for request_id in list(self.core.scheduler.requests):
            self.core.fail_request(request_id)
        return True

    @property
    def name(self) -> str:
        """The model's name in the pool."""
        return self.spec.name
