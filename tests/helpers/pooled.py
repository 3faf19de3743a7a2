# SPDX-License-Identifier: Apache-2.0
"""The pooled side of the token-exactness tests: real engines in an in-process EngineHost, requests put in directly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.plain import (
    ENGINE_ARGS,
    ENV,
    Case,
    RequestSpec,
    Result,
    _lora_request,
    _params,
    keep_heap_frozen,
    prompt_of,
)

os.environ.update(ENV)

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.input_processor import InputProcessor

from tokenpool.host.engine_host import EngineHost
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.device import Device
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.spec import HostConfig, HostedModelSpec

keep_heap_frozen()


@dataclass
class _Collected:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    finish_reason: Any = None
    request: Any = None


def make_spec(case: Case, addresses: EngineAddresses | None = None, **engine_args: Any) -> HostedModelSpec:
    """A fresh model for `EngineHost.add_model`, with the engine arguments of the reference."""
    args = ENGINE_ARGS | case.engine_args | engine_args
    config = EngineArgs(model=case.model, **args).create_engine_config()
    return HostedModelSpec(case.name, config, addresses)


class PooledModels:
    """An EngineHost without frontends; `run` steps it to the end and returns what each request got."""

    def __init__(
        self,
        device_memory: int,
        page_size: int,
        *,
        device: Device | None = None,
        poison: bool = False,
        **host_config: Any,
    ) -> None:
        self.host = EngineHost(HostConfig(device_memory, page_size, **host_config), device=device, poison=poison)
        self._collected: dict[tuple[str, str], _Collected] = {}
        self._processors: dict[str, InputProcessor] = {}

    def add(self, case: Case, **engine_args: Any) -> None:
        self.host.add_model(make_spec(case, **engine_args))

    def submit(self, case: Case) -> None:
        """Queue all requests of a case; none is scheduled before the next step."""
        adapters = sorted({request.lora for request in case.requests if request.lora})
        for request in case.requests:
            self.submit_one(case.name, request, adapters)

    def submit_one(self, model: str, spec: RequestSpec, adapters: list[str]) -> None:
        core = self.host.models[model].core
        pooling = core.vllm_config.model_config.runner_type == "pooling"
        params = _params(spec, pooling=pooling)
        if pooling:
            params.verify(core.vllm_config.model_config)
        message = EngineCoreRequest(
            request_id=spec.request_id,
            prompt_token_ids=spec.prompt_token_ids,
            mm_features=None,
            sampling_params=None if pooling else params,
            pooling_params=params if pooling else None,
            arrival_time=time.time(),
            lora_request=_lora_request(adapters, spec.lora),
            cache_salt=None,
            data_parallel_rank=None,
        )
        if spec.media is not None:
            message = self._with_media(model, spec, params)
        queued = core.preprocess_add_request(message)
        self._collected[model, spec.request_id] = _Collected(request=queued[0])
        core.input_queue.put((EngineCoreRequestType.ADD, queued))

    def _with_media(self, model: str, spec: RequestSpec, params: Any) -> EngineCoreRequest:
        """What a frontend would send for the request."""
        if model not in self._processors:
            self._processors[model] = InputProcessor(self.host.models[model].core.vllm_config)
        return self._processors[model].process_inputs(spec.request_id, prompt_of(spec), params, ("generate",))

    def abort(self, model: str, *request_ids: str) -> None:
        self.host.models[model].core.input_queue.put((EngineCoreRequestType.ABORT, list(request_ids)))

    def run(self, *, max_steps: int = 20_000, each_step: Callable[[int], None] | None = None) -> None:
        """Step until nothing is left to do; fails when that does not come about."""
        for step in range(max_steps):
            if not self.run_once():
                time.sleep(0.001)  # as the host does: models wait for a copy, for memory or after a failure
            if each_step is not None:
                each_step(step)
            if not any(m.core.has_work() or not m.core.input_queue.empty() for m in self.host.models.values()):
                return
        raise AssertionError(f"still busy after {max_steps} steps: the models starve each other")

    def run_once(self) -> bool:
        executed = self.host.run_once()
        self._collect()
        return executed

    def results(self, model: str) -> dict[str, Result]:
        return {
            request_id: Result(c.tokens, c.logprobs, c.request.num_preemptions, c.embedding)
            for (name, request_id), c in self._collected.items()
            if name == model
        }

    def finish_reason(self, model: str, request_id: str) -> str | None:
        reason = self._collected[model, request_id].finish_reason
        return None if reason is None else str(reason)

    def _collect(self) -> None:
        for name, hosted in self.host.models.items():
            queue = hosted.core.output_queue
            while not queue.empty():
                _, outputs = queue.get_nowait()
                for output in outputs.outputs:
                    collected = self._collected[name, output.request_id]
                    collected.tokens += output.new_token_ids
                    if output.new_logprobs is not None:
                        collected.logprobs += [float(row[0]) for row in output.new_logprobs.logprobs]
                    if output.pooling_output is not None:
                        collected.embedding = output.pooling_output.float().tolist()
                    if output.finished:
                        collected.finish_reason = output.finish_reason

    def check(self) -> None:
        self.host.check()

    def close(self) -> None:
        self.host.close()


@contextmanager
def movable_pool(device_memory: int, page_size: int) -> Iterator[PooledModels]:
    """A pool of models that come and go on the CPU: what leaves its memory is poisoned; its books agree in the end."""
    device = CpuDevice(keeps_bytes=True)
    pooled = PooledModels(
        device_memory, page_size, device=device, poison=True, movable_weights=True, host_memory=256 << 20
    )
    try:
        yield pooled
        pooled.check()
    finally:
        pooled.close()
