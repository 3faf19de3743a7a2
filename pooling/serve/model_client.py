# SPDX-License-Identifier: Apache-2.0
"""The frontend's side of one model: vLLM's AsyncLLM and FastAPI app on an engine of the host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import AsyncExitStack
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tokenpool.errors import CapacityError, ConfigError, HostError, PoolError
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.hosted_model import HostedModelSpec
from tokenpool.serve.admission import EngineQueue
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.launch_plan import ModelPlan, first_line
from tokenpool.serve.tenant_meter import meter

logger = logging.getLogger(__name__)

_CLOSE_LIMIT_S = 5.0


class ModelClient:
    """A served model: its engine runs in `host`, its HTTP routes are `app`."""

    def __init__(self, plan: ModelPlan, engine: AsyncLLM, app: Any, lifespan: AsyncExitStack, state: dict) -> None:
        self.plan = plan
        self.engine = engine
        self.app = app
        self.added = state
        """What the host said about the model when it was added."""
        self._lifespan = lifespan

    @classmethod
    async def start(cls, plan: ModelPlan, host: HostProcess) -> ModelClient:
        """Load the model in the host and build its app; raises PoolError when the host cannot take it."""
        config = await asyncio.to_thread(plan.engine_config)
        addresses = host.new_addresses()
        spec = HostedModelSpec(
            name=plan.spec.name,
            vllm_config=config,
            addresses=addresses,
            slo=plan.spec.slo,
            priority=plan.spec.priority,
            weight_bytes=plan.weight_bytes,
            log_stats=not plan.args.disable_log_stats,
        )
        try:
            state = await host.call("add_model", spec)
        except Exception as error:
            raise _as_pool_error(plan, error) from error
        client = None
        try:
            client = await cls._connect(plan, config, addresses, state)
            await client._build_app()
            return client
        except BaseException as error:
            with contextlib.suppress(HostError):  # a host that is gone holds nothing either
                await host.call("remove_model", plan.spec.name)
            if client is not None:
                await client.close(removed=True)
            if not isinstance(error, Exception):
                raise
            raise _as_pool_error(plan, error) from error

    @classmethod
    async def _connect(
        cls, plan: ModelPlan, config: VllmConfig, addresses: EngineAddresses, state: dict[str, Any]
    ) -> ModelClient:
        engine = await asyncio.to_thread(
            AsyncLLM.from_vllm_config,
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=plan.args.enable_log_requests,
            disable_log_stats=plan.args.disable_log_stats,
            client_addresses={"input_address": addresses.inputs[0], "output_address": addresses.outputs[0]},
        )
        meter(engine)
        return cls(plan, engine, None, AsyncExitStack(), state)

    async def _build_app(self) -> None:
        tasks = await self.engine.get_supported_tasks()
        self.app = app = build_app(self.plan.args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, self.plan.args, tasks)
        app.state.server = None  # vLLM's error handler looks it up; the pool never stops because of one model
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished."""
        return self.engine.output_processor.get_num_unfinished_requests()

    def queue(self) -> EngineQueue:
        """What waits and what runs, by AsyncLLM's own books; O(requests)."""
        begun = waiting_tokens = 0
        for state in self.engine.output_processor.request_states.values():
            if state.is_prefilling:
                waiting_tokens += state.prompt_len
            elif state.output_kind is RequestOutputKind.FINAL_ONLY and state.request_index == 0:  # of n > 1 the first
                begun += 1
        return EngineQueue(begun, waiting_tokens)

    async def drain(self, limit_s: float) -> bool:
        """Wait until nothing is unfinished, at most `limit_s`; returns whether that came about."""
        deadline = time.monotonic() + limit_s
        while self.num_unfinished:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def abort_all(self) -> None:
        """End every unfinished request."""
        await self.engine.abort(list(self.engine.output_processor.request_states), internal=True)

    def declare_dead(self) -> None:
        """The host is gone: end all waiting requests with an error now, instead of never."""
        core = self.engine.engine_core
        core.resources.engine_dead = True
        core.outputs_queue.put_nowait(EngineDeadError())

    async def close(self, *, removed: bool = False) -> None:
        """Free the client. Its engine is gone, or `removed` from the host, or ends together with the host."""
        if self.engine.output_handler is not None:
            self.engine.output_handler.cancel()
        resources = self.engine.engine_core.resources
        if removed and not resources.engine_dead:
            # The last word of a removed engine, which vLLM takes for its death: nothing comes after it.
            deadline = time.monotonic() + _CLOSE_LIMIT_S
            while not resources.engine_dead and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        # What killed the engine is in the queue and refers to it: a cycle that would hold the sockets until the next
        # full garbage collection.
        outputs = self.engine.engine_core.outputs_queue
        while not outputs.empty():
            outputs.get_nowait()
        await self._lifespan.aclose()
        await asyncio.to_thread(self.engine.shutdown)


def _as_pool_error(plan: ModelPlan, error: Exception) -> PoolError:
    """What vLLM raises for a model that it cannot build, as an error of one line for whoever asked for the model."""
    if isinstance(error, PoolError):
        return error
    name = plan.spec.name
    if isinstance(error, ValueError) and "KV cache" in str(error):  # vLLM's text names flags that the pool replaces
        return CapacityError(
            f"model {name!r}: one request of its max_model_len needs more KV cache than the whole device_memory "
            "holds; raise device_memory or lower its --max-model-len"
        )
    logger.error("model does not start model=%s", name, exc_info=error)
    return ConfigError(f"does not start: {first_line(error)}", key=f"model {name!r}")
