# SPDX-License-Identifier: Apache-2.0
"""What a host keeps of each model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from tokenpool.errors import CapacityError, PoolError
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.engine.quarantine import Quarantine
from tokenpool.host.load.model_build import ModelBuild
from tokenpool.policy.cost_model import CostModel
from tokenpool.wire.spec import HostedModelSpec

logger = logging.getLogger(__name__)
_MAX_SWITCH_FAILURES = 8
_REST_S, _LONGEST_REST_S = 0.001, 0.016


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
    asleep: int | None = None
    """The level of its sleep, in which it takes no turns; None = it is awake."""
    admits: bool = True
    """Whether requests that wait may run: not while it waits for those that do, to fall asleep."""
    _rests: int = 0

    def may_step(self, now_s: float) -> bool:
        """Whether it is awake, and neither a failure nor an idle step was too short a time ago."""
        return self.asleep is None and max(self.retry_at_s, self.rest_until_s) <= now_s

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
        self.core.refuse_deferred(f"model {self.name!r} cannot come onto the device: {error}", all_of_them=True)
        return True

    @property
    def obstacle(self) -> str:
        """Why it stays off the device until an operator wakes it; empty unless it sleeps."""
        return "" if self.asleep is None else f"model {self.name!r} sleeps: wake it first, with POST /wake_up"

    @property
    def stays_on_device(self) -> bool:
        """Whether its weights never leave the device once they are there."""
        return self.spec.keep == "device"

    @property
    def name(self) -> str:
        """The model's name in the pool."""
        return self.spec.name
