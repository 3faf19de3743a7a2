# SPDX-License-Identifier: Apache-2.0
"""The frontend's side of one model: vLLM's AsyncLLM and FastAPI app on an engine of the host."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tokenpool.host.engine_host import HostedModelSpec
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.launch_plan import ModelPlan


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
        state = await host.call("add_model", spec)
        engine = await asyncio.to_thread(
            AsyncLLM.from_vllm_config,
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=plan.args.enable_log_requests,
            disable_log_stats=plan.args.disable_log_stats,
            client_addresses={"input_address": addresses.inputs[0], "output_address": addresses.outputs[0]},
        )
        tasks = await engine.get_supported_tasks()
        app = build_app(plan.args, tasks, engine.model_config)
        await init_app_state(engine, app.state, plan.args, tasks)
        app.state.server = None  # vLLM's error handler looks it up; the pool never stops because of one model
        lifespan = AsyncExitStack()
        await lifespan.enter_async_context(app.router.lifespan_context(app))
        return cls(plan, engine, app, lifespan, state)

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished."""
        return self.engine.output_processor.get_num_unfinished_requests()

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

    async def close(self) -> None:
        """Free the client; its engine in the host is closed before or gone."""
        if self.engine.output_handler is not None:
            self.engine.output_handler.cancel()
        if not self.engine.engine_core.resources.engine_dead:
            # The host ends a closed engine's threads when a message comes in: send one.
            await self.engine.engine_core.abort_requests_async(["tokenpool-close"])
        await self._lifespan.aclose()
        await asyncio.to_thread(self.engine.shutdown)
