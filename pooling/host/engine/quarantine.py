# SPDX-License-Identifier: Apache-2.0
"""After a crashed engine step: find the request that crashes it, fail that one, let the others go on.

All requests of the model are preempted (vLLM recomputes them later) and the ones of the crashed batch are tried alone,
one after another, until each has either produced a token or crashed a step by itself. A request that crashes alone
fails. If the engine crashes whatever it runs, it cannot go on.

A step for which the device has no memory is no broken engine: what nobody uses goes back to the device, all is tried
once more, and what fails then are requests, one at a time, never the host. A step that failed on another rank of a
tensor parallel group is tried once more as well: it was an earlier one, perhaps of requests that have ended.

A request that the engine cannot even queue fails alone, too.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

import torch
from vllm.v1.request import Request, RequestStatus

from tokenpool.errors import EngineLostError, LateRankError
from tokenpool.host.engine import encoder_cache
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.kv.runner_adapter import adapter_of

logger = logging.getLogger(__name__)

_MAX_CRASHES_IN_A_ROW = 4


def is_short_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory for a step: torch's allocator says so, or the device of the pool's pages."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


class Quarantine:
    """Crash handling of one engine; called on the host loop's thread only."""

    def __init__(self, model: str, core: HostedEngineCore, release: Callable[[], None] = lambda: None) -> None:
        self._model = model
        self._release = release
        """Gives memory of the device that nobody uses back to it."""
        self._core = core
        self._runner = adapter_of(model, core.model_executor)
        self._suspects: list[tuple[str, int]] = []  # request id, output tokens when it became one
        # The scheduler's limit on admission; vLLM 0.29 has one limit for admission and for slots.
        separate = hasattr(core.scheduler, "max_num_active_reqs")
        self._limit = "max_num_active_reqs" if separate else "max_num_running_reqs"
        self._max_active = getattr(core.scheduler, self._limit)
        self._crashes_in_a_row = self._num_results = 0
        core.on_crash = self.step_crashed
        self._add = core.add_request
        core.add_request = self.add_request  # type: ignore[method-assign]

    @property
    def active(self) -> bool:
        """True while requests are tried one at a time."""
        return bool(self._suspects)

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        """Queue a request as the engine does; one for which that raises ends with an error. Raises EngineLostError."""
        try:
            self._add(request, request_wave)
        except EngineLostError:
            raise
        except Exception:  # of vLLM's or a model's code, such as what restores a request in the worker
            logger.exception("request cannot be queued model=%s request=%s", self._model, request.request_id)
            self._fail_new(request)

    def _fail_new(self, request: Request) -> None:
        core, request_id = self._core, request.request_id
        known = core.scheduler.requests.get(request_id)
        if known is request:
            core.fail_request(request_id)
            return
        if known is None:  # the worker may have heard of it: it is told to forget it
            core.scheduler.finished_req_ids.add(request_id)
            core._book.fail(request_id, time.time())
        core._send_error_outputs_to_client([request_id], request.client_index)
        core.counters.failed_requests += 1

    def step_crashed(self, error: BaseException) -> None:
        """Handle an exception of an engine step; raises EngineLostError when the engine cannot go on."""
        scheduler = self._core.scheduler
        self._note_results()
        self._core.counters.crashed_steps += 1
        self._crashes_in_a_row += 1
        logger.error("engine step crashed model=%s", self._model, exc_info=error)
        late = isinstance(error, LateRankError)
        cause = error.__cause__ if late and isinstance(error.__cause__, Exception) else error
        if isinstance(cause, EngineLostError):
            raise cause
        if isinstance(cause, MemoryError):
            raise EngineLostError(f"engine of {self._model!r} is out of memory: {error}") from error
        short = is_short_of_memory(cause)
        if self._crashes_in_a_row > _MAX_CRASHES_IN_A_ROW and not short:
            raise EngineLostError(f"engine of {self._model!r} crashes on every step: {error}") from error
        lost = self._core.drop_batches()
        batch = [i for i in scheduler.requests if i in lost]
        batch = batch or [request.request_id for request in scheduler.running]
        if short:
            self._release()
            batch = batch or [request.request_id for request in scheduler.waiting][:1]
        if not batch and not lost:
            raise EngineLostError(f"engine of {self._model!r} crashed with no request in its batch: {error}") from error
        self._reset_engine()
        if (short or late) and self._crashes_in_a_row == 1:
            why = "a step ran out of device memory" if short else "a step failed on another rank"
            logger.warning("%s, it is tried once more model=%s", why, self._model)
        elif len(batch) == 1:
            logger.error("request fails, it crashes the engine alone model=%s request=%s", self._model, batch[0])
            self._core.fail_request(batch[0])
            self._suspects = [s for s in self._suspects if s[0] != batch[0]]
        else:
            self._suspects = [(i, scheduler.requests[i].num_output_tokens) for i in batch]
        self._next_suspect()

    def step_done(self, executed: bool) -> None:
        """Look at the result of a step that did not crash; `executed` is what `step_once` returned."""
        if executed:
            self._note_results()
        if not self._suspects:
            return
        self._core.drain_batches()  # no step ahead of the suspect's: it would be suspected too; may crash and call us
        if not self._suspects:
            return
        request_id, num_before = self._suspects[0]
        request = self._core.scheduler.requests.get(request_id)
        if request is not None and request.num_output_tokens <= num_before:
            return
        del self._suspects[0]
        if self._suspects and request is not None and request.status == RequestStatus.RUNNING:
            self._core.preempt_all()
        self._next_suspect()

    def _next_suspect(self) -> None:
        scheduler = self._core.scheduler
        while self._suspects and self._suspects[0][0] not in scheduler.requests:
            del self._suspects[0]
        if not self._suspects:
            setattr(scheduler, self._limit, self._max_active)
            return
        setattr(scheduler, self._limit, 1)
        request = scheduler.requests[self._suspects[0][0]]
        if request in scheduler.waiting:
            scheduler.waiting.remove_request(request)
            scheduler.waiting.prepend_request(request)

    def _reset_engine(self) -> None:
        """Preempt everything and drop what the crashed step left behind."""
        self._runner.drop_step()
        self._core.preempt_all()
        scheduler = self._core.scheduler
        for request in scheduler.requests.values():
            # Their output never arrives: without this, later tokens would be taken for stale ones.
            request.num_in_flight_tokens = request.num_stale_output_tokens = 0
            request.drop_stale_output = False
            if request.status == RequestStatus.PREEMPTED and not self._runner.can_resume(request.request_id):
                request.status = RequestStatus.WAITING  # sent as new
        scheduler.prev_step_scheduled_req_ids.clear()
        # Hashes are entered when a step is scheduled, so the crashed one left hashes of blocks never computed.
        scheduler.kv_cache_manager.reset_prefix_cache()
        encoder_cache.forget_all(self._core)  # for the same reason

    def _note_results(self) -> None:
        """A step whose tokens came since the last look ends a row of crashes."""
        if self._core.watch.results != self._num_results:
            self._num_results = self._core.watch.results
            self._crashes_in_a_row = 0
