# SPDX-License-Identifier: Apache-2.0
"""Asks the turn policy: shows it the models with work, and learns from each step what steps cost."""

from __future__ import annotations

import time
from collections.abc import Iterable

from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.pool_view import QueueStats, model_view, queue_stats
from tokenpool.host.residency import ResidencyManager
from tokenpool.policy.turns import Decision, ModelView, PoolView, TurnPolicy
from tokenpool.wire.trace import TraceLog

_WARM_UP_STEPS = 2
"""First steps of an engine: allocations and just-in-time work make them many times slower than any later one."""
_DRAG_SHARE, _MAX_DRAG = 0.02, 2.0
"""Weight of one step in the average of what copies cost, and the most that one may say."""


class TurnChooser:
    """Whose turn it is, and the books of the present turn; called on the host loop's thread only."""

    def __init__(self, policy: TurnPolicy, residency: ResidencyManager, trace: TraceLog) -> None:
        self._policy = policy
        self._residency = residency
        self._trace = trace
        self._stats: dict[str, QueueStats] = {}
        self._copy_drag = 0.0
        self._turn_started_s = 0.0
        self._noted_s = 0.0
        self._noted_steps = 0

    def choose(self, models: Iterable[HostedModel], current: HostedModel | None) -> Decision:
        """Ask the policy; `models` have work and can step or be brought in, at least one."""
        now_s = time.time()
        views = sorted((self._view(hosted, now_s) for hosted in models), key=lambda view: view.index)
        name = current.name if current else None
        can_prefetch = self._residency.can_prefetch()
        pool = PoolView(now_s, name, views, self._turn_started_s, can_prefetch, self._copy_drag)
        return self._policy.decide(pool)

    def changed(self, name: str) -> None:
        """The model's requests changed: count them again when they are needed."""
        self._stats.pop(name, None)

    def begin_turn(self) -> None:
        """Another model has the device from now on."""
        self._turn_started_s = self._noted_s = time.time()
        self._noted_steps = 0

    def note_turn(self, hosted: HostedModel) -> None:
        """Note in the trace what the model has had of its turn since it was last noted."""
        now_s = time.time()
        if self._noted_steps:
            self._trace.record("turn", hosted.name, self._noted_s, now_s, steps=self._noted_steps)
        self._noted_s, self._noted_steps = now_s, 0

    def observe_step(self, hosted: HostedModel, seconds: float, executed: bool) -> None:
        """A step of the model took `seconds`: learn its costs."""
        self._noted_steps += 1
        stats = self._stats.pop(hosted.name, None)
        if not executed or stats is None or hosted.core.counters.steps <= _WARM_UP_STEPS:
            return  # with one busy model nobody asks what a step costs
        scheduled = hosted.core.watch.scheduled.num_scheduled_tokens
        num_decodes = sum(count == 1 for count in scheduled.values())
        num_prefill = sum(scheduled.values()) - num_decodes
        if self._residency.can_prefetch():
            hosted.cost.observe_step(num_decodes, stats.context_tokens, num_prefill, seconds)
        else:  # slowed by the copy beside it
            predicted_s = hosted.cost.predict_step(num_decodes, stats.context_tokens, num_prefill)
            lost = min(max(seconds / predicted_s - 1.0, 0.0), _MAX_DRAG) if predicted_s > 0 else 0.0
            self._copy_drag += _DRAG_SHARE * (lost - self._copy_drag)

    def _view(self, hosted: HostedModel, now_s: float) -> ModelView:
        stats = self._stats.get(hosted.name)
        if stats is None or now_s > stats.until_s:
            stats = self._stats[hosted.name] = queue_stats(hosted.core.scheduler, hosted.spec.slo, now_s)
        return model_view(hosted, stats, self._residency)
