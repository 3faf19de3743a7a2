# SPDX-License-Identifier: Apache-2.0
"""One real vLLM engine inside the host: EngineCoreProc without its handshake, its busy loop and its process."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.request import Request, RequestStatus

from tokenpool.config import SLO
from tokenpool.host.affinity import ALL_CPUS
from tokenpool.host.output_sender import OutputSender
from tokenpool.host.token_clock import TokenClock


@dataclass(frozen=True, slots=True)
class EngineAddresses:
    """ZMQ endpoints of the frontends: engine input and output, one of each per frontend."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Inbox(queue.Queue):
    """An engine's input queue that tells the host when something arrives and can be closed for good."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__()
        self._notify = notify
        self.closed = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Queue `item`; on a closed inbox ends the calling thread, which is the engine's input thread."""
        if self.closed:
            raise SystemExit
        super().put(item, block, timeout)
        self._notify()


@dataclass(slots=True)
class CoreCounters:
    """Running totals of one engine, plain integers because they change on every step."""

    steps: int = 0
    turns: int = 0
    step_seconds: float = 0.0
    crashed_steps: int = 0
    failed_requests: int = 0


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
    ) -> None:
        self._pool_addresses = addresses
        self._notify = notify
        self.token_clock = TokenClock(slo)
        self.counters = CoreCounters()
        try:
            super().__init__(vllm_config, True, "", UniProcExecutor, log_stats)
        except BaseException:
            if isinstance(self._outbox, OutputSender):
                self._outbox.close()
            raise
        self.process_input_queue_block = False

    # -- overrides of EngineCoreProc -----------------------------------------------------------------

    @property
    def input_queue(self) -> Inbox:
        """The inbox; EngineCoreProc assigns a plain queue, which is replaced."""
        return self._inbox

    @input_queue.setter
    def input_queue(self, _: queue.Queue) -> None:
        self._inbox = Inbox(self._notify)

    @contextlib.contextmanager
    def _perform_handshakes(
        self, handshake_address: Any, identity: Any, local_client: Any, vllm_config: VllmConfig, *_: Any
    ) -> Generator[EngineZmqAddresses, None, None]:
        given = self._pool_addresses or EngineAddresses((), ())
        yield EngineZmqAddresses(inputs=list(given.inputs), outputs=list(given.outputs))
        vllm_config.__post_init__()

    def process_input_sockets(self, *args: Any) -> None:
        """vLLM's input thread, or nothing without addresses; when it ends, the frontends are told."""
        if self._pool_addresses is None:
            args[-1].set()
            return
        os.sched_setaffinity(0, ALL_CPUS)
        try:
            super().process_input_sockets(*args)
        finally:
            self.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)

    @property
    def output_queue(self) -> Any:
        """Where outputs go: to the frontends, or into a plain queue without addresses."""
        return self._outbox

    @output_queue.setter
    def output_queue(self, plain: queue.Queue) -> None:
        self._outbox = plain if self._pool_addresses is None else OutputSender(self._pool_addresses.outputs)

    def process_output_sockets(self, *args: Any) -> None:
        """Nothing: `output_queue` sends by itself."""

    def add_request(self, request: Request, request_wave: int = 0) -> None:
        """Queue a request in vLLM's scheduler and start its clock."""
        self.token_clock.start(request.request_id, request.arrival_time)
        super().add_request(request, request_wave)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests, running or waiting."""
        for request_id in request_ids:
            self.token_clock.forget(request_id)
        super().abort_requests(request_ids)

    def shutdown(self) -> None:
        """Free this engine only; the process groups stay, for the other engines use them."""
        self.structured_output_manager.clear_backend()
        self.model_executor.shutdown()
        self.scheduler.shutdown()

    # -- what the host calls -------------------------------------------------------------------------

    def step_once(self) -> bool:
        """Run one engine step and send its outputs; returns whether the model ran."""
        start = time.perf_counter()
        outputs, executed = self.step_fn()
        for client_outputs in (outputs or {}).items():
            self.output_queue.put_nowait(client_outputs)
            self.token_clock.count(client_outputs[1].outputs)
        self.post_step(executed)
        self.counters.steps += 1
        self.counters.step_seconds += time.perf_counter() - start
        return executed

    def fail_request(self, request_id: str) -> None:
        """Finish a request with an error, which its client sees as an internal server error."""
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return
        client = request.client_index
        self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ERROR)
        self._send_error_outputs_to_client([request_id], client)
        self.token_clock.forget(request_id)
        self.counters.failed_requests += 1

    def close(self) -> None:
        """End this engine; its threads end on the next message from a frontend."""
        self.input_queue.closed = True
        self.shutdown()
