# SPDX-License-Identifier: Apache-2.0
"""Notes what an engine's scheduler hands out, what its block pool refuses, and when the output of a step is back.

It adds to the last output of a request whose grammar could not be compiled that this was why: vLLM says only `error`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from tokenpool.host.engine.grammar_hold import GrammarHold
from tokenpool.host.kv.kv_transit import schedule_arrived
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED


@dataclass(slots=True)
class CoreCounters:
    """Running totals of one engine, plain integers because they change on every step."""

    steps: int = 0
    turns: int = 0
    step_seconds: float = 0.0
    crashed_steps: int = 0
    failed_requests: int = 0
    requests: int = 0
    """That began here; those that another host began and this one goes on with do not count."""
    prompt_tokens: int = 0
    """Of these requests."""


class StepWatch:
    """Stands between an engine and its scheduler, some methods of which it wraps; on the host loop's thread only."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduled: Any = None
        """The SchedulerOutput of the last step."""
        self.in_flight: list[Any] = []
        """SchedulerOutputs of the steps whose output has not come; between steps those of the engine's batch queue."""
        self.refused: str | None = None
        """The request that got no blocks in the last step, the last one of several."""
        self.results = 0
        """Steps that computed something and whose output came."""
        self._scheduler = scheduler
        self._hold = GrammarHold(scheduler)
        manager = scheduler.kv_cache_manager
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._allocate = manager.allocate_slots
        scheduler.schedule, scheduler.update_from_output = self._schedule_and_keep, self._update_and_drop
        manager.allocate_slots = self._allocate_or_note

    def _schedule_and_keep(self, *args: Any) -> Any:
        pool = self._scheduler.kv_cache_manager.block_pool
        transit, link = getattr(pool, "transit", None), getattr(pool, "link", None)

        def schedule() -> Any:
            if transit is None:
                return self._schedule(*args)
            return schedule_arrived(self._scheduler, transit, lambda: self._schedule(*args))

        self.scheduled = self._hold.schedule(schedule)
        if link is not None:
            link.step_scheduled(self.scheduled)
            link.precede_compute()
        self.in_flight.append(self.scheduled)
        return self.scheduled

    def _update_and_drop(self, scheduler_output: Any, *args: Any) -> Any:
        failed = frozenset(self._scheduler.grammar_compile_error_reqs)
        outputs = self._update(scheduler_output, *args)
        if failed:
            _name_grammars(outputs, failed)
        self.in_flight = [output for output in self.in_flight if output is not scheduler_output]
        if (link := getattr(self._scheduler.kv_cache_manager.block_pool, "link", None)) is not None:
            link.step_computed(scheduler_output)
        self.results += scheduler_output.total_num_scheduled_tokens > 0
        return outputs

    def _allocate_or_note(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = self._allocate(request, *args, **kwargs)
        if blocks is None:
            self.refused = request.request_id
        return blocks


def _name_grammars(outputs: Mapping[int, Any], failed: Set[str]) -> None:
    for of_client in outputs.values():
        for output in of_client.outputs:
            if output.request_id in failed:
                output.stop_reason = GRAMMAR_FAILED
