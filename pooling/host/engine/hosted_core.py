# SPDX-License-Identifier: Apache-2.0
"""One real vLLM engine inside the host: EngineCoreProc without its handshake, its busy loop and its process."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, FinishReason, UtilityOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import Request, RequestStatus

from tokenpool.config import SLO
from tokenpool.host.engine.grammar_backends import use_all_backends
from tokenpool.host.engine.grammar_wait import limited, pending_grammar
from tokenpool.host.engine.input_receiver import InputReceiver
from tokenpool.host.engine.output_sender import OutputSender
from tokenpool.host.engine.resume import restore_in_worker, restore_request
from tokenpool.host.engine.step_watch import CoreCounters, StepWatch
from tokenpool.policy.slo import SloAccount, SloBook
from tokenpool.process.affinity import use_all_cpus
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.continued_request import ContinuedRequest
from tokenpool.wire.utility_calls import FOR_REQUESTS, NEED_NO_WEIGHTS, refusal, rpc_problem

_CLASS = ""  # all requests of an engine are of one class


class Inbox(queue.Queue[Any]):
    """An engine's input queue that tells the host when something arrives."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__()
        self._notify = notify

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Queue `item` and wake the host's loop."""
        super().put(item, block, timeout)
        self._notify()


class HostedEngineCore(EngineCoreProc):
    """An EngineCoreProc that the host steps; every engine, scheduler and protocol feature is vLLM's own.

    Without addresses it starts no socket threads: requests are put into `input_queue` and outputs taken from
    `output_queue` by the caller. Built and stepped on the host loop's thread.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        addresses: EngineAddresses | None,
        slo: SLO | None,
        log_stats: bool,
        notify: Callable[[], None],
        executor_class: type[Executor] = UniProcExecutor,
    ) -> None:
        self._pool_addresses = addresses
        self._receiver: InputReceiver | None = None
        self._notify = notify
        self._slo = slo
        self._book = SloBook()
        self.counters = CoreCounters()
        self.is_away: Callable[[], bool] = lambda: False
        """Whether the weights or the KV are off the device; set by a host that moves them."""
        self.obstacle: Callable[[], str] = lambda: ""
        """Why the model does not come back before an operator lets it; empty if nothing is in its way."""
        self.deferred: list[tuple[EngineCoreRequestType, Any]] = []
        """Utility calls that wait until the model is back."""
        self.on_crash: Callable[[BaseException], None] = _raise
        """Told of a crash of a step that the host did not ask for; set by the model's quarantine."""
        try:
            super().__init__(vllm_config, True, "", executor_class, log_stats)
        except BaseException:
            self._close_sockets(tell=False)
            raise
        self.process_input_queue_block = False
        use_all_backends(self.structured_output_manager)
        self.watch = StepWatch(self.scheduler)
        extension = vllm_config.parallel_config.worker_extension_cls
        self._worker_extension = resolve_obj_by_qualname(extension) if extension else None

    # -- overrides of EngineCoreProc -----------------------------------------------------------------

    @property
    def input_queue(self) -> Inbox:
        """The inbox; EngineCoreProc assigns a plain queue, which is replaced."""
        return self._inbox

    @input_queue.setter
    def input_queue(self, _: queue.Queue[Any]) -> None:
        self._inbox = Inbox(self._notify)

    @contextlib.contextmanager
    def _perform_handshakes(
        self, handshake_address: Any, identity: Any, local_client: Any, vllm_config: VllmConfig, *_: Any
    ) -> Generator[EngineZmqAddresses, None, None]:
        given = self._pool_addresses or EngineAddresses((), ())
        yield EngineZmqAddresses(inputs=list(given.inputs), outputs=list(given.outputs))
        vllm_config.__post_init__()

    def process_input_sockets(
        self, input_addresses: list[str], coord_input_address: str | None, identity: bytes, ready_event: threading.Event
    ) -> None:
        """The input thread, or nothing without addresses; when it ends, the frontends are told."""
        if self._pool_addresses is None:
            ready_event.set()
            return
        use_all_cpus()
        self._receiver = InputReceiver(self)
        try:
            self._receiver.run(input_addresses, identity, ready_event)
        finally:
            self.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)

    @property
    def output_queue(self) -> Any:
        """Where outputs go: to the frontends, or into a plain queue without addresses."""
        return self._outbox

    @output_queue.setter
    def output_queue(self, plain: queue.Queue[Any]) -> None:
        self._outbox = plain if self._pool_addresses is None else OutputSender(self._pool_addresses)

    def process_output_sockets(self, *args: Any) -> None:
        """Nothing: `output_queue` sends by itself."""

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        """Make the scheduler's request of a message; one that another engine began goes on where that ended."""
        made, wave = self.make_request(request)
        self.restore(made, request)
        return made, wave

    def make_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        """The first half of `preprocess_add_request`, which waits for nothing."""
        made, wave = super().preprocess_add_request(request)
        grammar = pending_grammar(made)
        if grammar is not None:  # the request waits for that and for no step
            made.structured_output_request.grammar = ending = limited(grammar)
            ending.add_done_callback(lambda _: self._notify())
        return made, wave

    def restore(self, made: Request, request: EngineCoreRequest) -> None:
        """The other half: put a request that another engine began where that ended; waits for its grammar."""
        if isinstance(request, ContinuedRequest):
            restore_request(made, request.delivered_token_ids, self.structured_output_manager)

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        """Queue a request in vLLM's scheduler and start its clock, or let it go on."""
        delivered = request.num_output_tokens
        self._book.start(request.request_id, _CLASS, self._slo, request.arrival_time, delivered)
        if not delivered:
            self.counters.requests += 1
            self.counters.prompt_tokens += request.num_prompt_tokens
        if delivered and not self.scheduler.use_v2_model_runner:
            data = NewRequestData.from_request(request, ())
            self.model_executor.collective_rpc(restore_in_worker, args=(data, list(request.output_token_ids)))
        super().add_request(request, request_wave)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests, running or waiting."""
        for request_id in request_ids:
            self._book.abort(request_id, time.time())
        super().abort_requests(request_ids)

    def abort_all(self) -> None:
        """End all requests, running or waiting, and tell their clients."""
        self.drain_batches()
        now_s = time.time()
        for request_id in self.scheduler.requests:
            self._book.abort(request_id, now_s)
        self._send_abort_outputs(self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED))

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        if request_type == EngineCoreRequestType.UTILITY:
            method, args = request[2:]
            if method == "collective_rpc" and (problem := rpc_problem(args[0], self._worker_extension)):
                self._refuse(request, problem)
                return
            if method not in NEED_NO_WEIGHTS and self.is_away():
                self.deferred.append((request_type, request))
                self.settle_calls()
                return
        super()._handle_client_request(request_type, request)

    def settle_calls(self) -> None:
        """Answer calls that waited until there is nothing to do, and those of operators while the model cannot come."""
        if self._idle_state_callbacks and not self.has_work():
            self._notify_idle_state_callbacks()
        if self.deferred and (reason := self.obstacle()):
            self.refuse_deferred(reason)

    def refuse_deferred(self, reason: str, *, all_of_them: bool = False) -> None:
        """Tell whoever waits for the model why it does not come; calls for requests wait on, unless `all_of_them`."""
        waiting, self.deferred = self.deferred, []
        for kind, call in waiting:
            if call[2] in FOR_REQUESTS and not all_of_them:
                self.deferred.append((kind, call))
            else:
                self._refuse(call, reason)

    def _refuse(self, call: Any, reason: str) -> None:
        output = UtilityOutput(call[1], failure_message=refusal(reason))
        self.output_queue.put_nowait((call[0], EngineCoreOutputs(utility_output=output)))

    def shutdown(self) -> None:
        """Free this engine only, all of it whatever fails; the process groups stay, for other engines use them."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.scheduler.shutdown)
            parts.callback(self.model_executor.shutdown)
            parts.callback(self.structured_output_manager.clear_backend)

    # -- books -------------------------------------------------------------------------------------------

    @property
    def slo_account(self) -> SloAccount:
        """Tokens and requests so far, on time or not; without an SLO every token is on time."""
        return self._book.account(_CLASS)

    def _count(self, outputs: Iterable[Any]) -> None:
        """Book the `EngineCoreOutput`s of one step, delivered now; times are wall time, as vLLM's arrivals are."""
        now_s = time.time()
        for output in outputs:
            if output.new_token_ids:
                self._book.deliver(output.request_id, len(output.new_token_ids), now_s)
            if output.finish_reason is None:
                continue
            if output.finish_reason is FinishReason.ERROR:
                self._book.fail(output.request_id, now_s)
            else:
                self._book.finish(output.request_id)

    # -- what the host calls -------------------------------------------------------------------------

    def step_once(self, *, admit: bool = True) -> bool:
        """Run one engine step and send its outputs; returns False if the engine could do nothing.

        With `admit` false no waiting request is scheduled: a decode step. With async scheduling the outputs are those
        of an earlier step, or none, and the engine still does something while a step is under way.
        """
        start, results = time.perf_counter(), self.watch.results
        self.watch.refused = None
        if admit or self.scheduler._pause_state != PauseState.UNPAUSED:
            outputs, executed = self.step_fn()
        else:
            # The attribute and not its setter, which logs each change.
            self.scheduler._pause_state = PauseState.PAUSED_NEW
            try:
                outputs, executed = self.step_fn()
            finally:
                self.scheduler._pause_state = PauseState.UNPAUSED
        self._send(outputs or {})
        self.post_step(executed)
        self.counters.steps += 1
        self.counters.step_seconds += time.perf_counter() - start
        computing = any(output.total_num_scheduled_tokens for output in self.watch.in_flight)
        return executed or computing or self.watch.results > results

    def _send(self, outputs: Mapping[int, Any]) -> None:
        for client_outputs in outputs.items():
            self.output_queue.put_nowait(client_outputs)
            self._count(client_outputs[1].outputs)

    def forget_finished(self) -> None:
        """Let the worker forget requests that ended, when no others would make it step; computes nothing.

        Afterwards no step is in flight, not even one for a request that ended before, and who waited for that is told.
        """
        while self.has_work() and not self.scheduler.has_unfinished_requests():
            self._step_unasked()
        self.settle_calls()

    def run_deferred(self) -> None:
        """Answer the utility calls that waited for the model."""
        while self.deferred:
            self._handle_client_request(*self.deferred.pop(0))

    def drain_batches(self) -> None:
        """Take the outputs of the steps in flight, with async scheduling up to two, so that none uses KV or weights.

        Nothing new is scheduled meanwhile. Without async scheduling there is no queue.
        """
        if not self.batch_queue:
            return
        before, self.scheduler._pause_state = self.scheduler._pause_state, PauseState.PAUSED_ALL
        try:
            while self.batch_queue:
                self._step_unasked()
        finally:
            self.scheduler._pause_state = before
        self.forget_finished()  # their last requests may have ended, and the model may be about to leave
        if not self.has_work():
            self._notify()  # the host counts it among those with work

    def _step_unasked(self) -> None:
        try:
            self.step_once()
        except (Exception, SystemExit) as error:  # any exception of a model's code, which may call sys.exit
            self.on_crash(error)

    def drop_batches(self) -> set[str]:
        """After a crash: take the outputs of the steps before it and forget the rest; waits for the device.

        Returns the requests of the forgotten steps, all of which must be preempted.
        """
        while self.batch_queue:
            future, scheduled, _ = self.batch_queue.pop()
            try:
                output = future.result()
            except (Exception, SystemExit):  # noqa: S112 - the crash that is being handled, or one that it caused
                continue
            if self.watch.in_flight[0] is scheduled:
                self._send(self.scheduler.update_from_output(scheduled, output))
        lost, self.watch.in_flight = self.watch.in_flight, []
        for scheduled in lost:  # the runner may not have heard of these; being told twice does no harm
            self.scheduler.finished_req_ids |= scheduled.finished_req_ids - self.scheduler.requests.keys()
        return {request_id for scheduled in lost for request_id in scheduled.num_scheduled_tokens}

    def preempt_newest(self) -> Request | None:
        """Preempt the request that runs shortest, as vLLM does when blocks run out; None if none runs."""
        if not self.scheduler.running:
            return None
        request = self.scheduler.running.pop()
        self.scheduler._preempt_request(request, time.monotonic())
        return request

    def preempt_all(self) -> bool:
        """Preempt all running requests: their KV is given up, and computed again later; False if there are none."""
        had_any = self.preempt_newest() is not None
        while self.preempt_newest():
            pass
        return had_any

    def attach(self, client_index: int, addresses: EngineAddresses) -> None:
        """Serve one more frontend, at its own addresses, in the place of the one that had that index before."""
        assert isinstance(self._outbox, OutputSender) and self._receiver is not None
        self.detach(client_index)
        self._outbox.attach(client_index, addresses)
        self._receiver.attach(client_index, addresses)

    def detach(self, client_index: int) -> None:
        """A frontend is gone: drop its requests, which nobody reads."""
        assert isinstance(self._outbox, OutputSender) and self._receiver is not None
        try:
            self._receiver.detach(client_index)
        finally:  # an input thread that is busy listens no more once it comes to it
            self.drop_client(client_index)
            self._outbox.detach(client_index)

    def drop_client(self, client_index: int) -> None:
        """Abort the requests of a frontend."""
        self._process_input_queue()
        self.abort_requests([r.request_id for r in self.scheduler.requests.values() if r.client_index == client_index])
        self._notify()

    def fail_request(self, request_id: str) -> None:
        """Finish a request with an error, which its client sees as an internal server error."""
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return
        client = request.client_index
        self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ERROR)
        self._send_error_outputs_to_client([request_id], client)
        self._book.fail(request_id, time.time())
        self.counters.failed_requests += 1

    def close(self, *, tell: bool = True) -> None:
        """Free this engine and end its threads; `tell` its frontends, unless they never knew of it."""
        try:
            self.shutdown()
        finally:
            self._close_sockets(tell)

    def _close_sockets(self, tell: bool) -> None:
        if not tell and isinstance(self._outbox, OutputSender):
            self._outbox.close()
        if self._receiver is not None:
            self._receiver.stop()


def _raise(error: BaseException) -> None:
    raise error
