# SPDX-License-Identifier: Apache-2.0
"""The frontend's side of one model: vLLM's AsyncLLM and FastAPI app on the engines that the hosts have of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils import func_utils
from vllm.v1.engine.async_llm import AsyncLLM

from tokenpool.errors import CapacityError, ConfigError, HostError, PoolError
from tokenpool.patches.engine_client import handing_in
from tokenpool.process.heap import release_engine, release_metrics
from tokenpool.process.keeper import Backoff, count_failure
from tokenpool.process.metric_files import forget_models
from tokenpool.serve.access.admission import EngineQueue
from tokenpool.serve.access.stored_responses import keep_apart, made_beside
from tokenpool.serve.access.tenant_meter import meter
from tokenpool.serve.client.body_validation import stop_at_first_faults
from tokenpool.serve.client.engine_client import PoolEngineClient
from tokenpool.serve.client.host_process import HostProcess
from tokenpool.serve.client.structured_check import check_structured_outputs
from tokenpool.serve.client.text_lanes import use_lanes
from tokenpool.serve.client.token_bounds import bound_texts, bound_token_answers
from tokenpool.serve.client.token_texts import remember_tokens
from tokenpool.serve.client.tracing import RequestTracer, provider_for, trace_requests
from tokenpool.serve.http.port import drop_port_parts, without_port_flags
from tokenpool.serve.launch.model_plan import ModelPlan, first_line
from tokenpool.serve.launch.names import names_of
from tokenpool.serve.launch.start_checks import load_plugins
from tokenpool.serve.media.bounded_media import bound_media
from tokenpool.wire.addresses import EngineAddresses

logger = logging.getLogger(__name__)

RELEASE_AFTER_S = 1.0
"""After a model's client was closed its memory is given back; that stops the frontend for a full collection."""
_LOOK_S = 0.02


class ModelClient:
    """A served model: its routes are `app`, its engines are in the hosts that `join`."""

    def __init__(self, plan: ModelPlan, core: PoolEngineClient, engine: AsyncLLM, state: dict[str, Any]) -> None:
        self.plan = plan
        self.core = core
        """Where the engines are, and which request is at which."""
        self.engine = engine
        self.app: Any = None
        self.tracer: RequestTracer | None = None
        self.added = state
        """What the first host said about the model when it was added."""
        self.on_fault: Callable[[str], None] = lambda fault: None
        """Told why the client is not there, and nothing once it is again."""
        self.num_revivals = 0
        self._lifespan = AsyncExitStack()
        self._revivals = Backoff(first_at_once=True)
        self._reviving: asyncio.Task[None] | None = None
        self._is_closed = False
        core.fail = self._fail

    @classmethod
    async def start(cls, plan: ModelPlan, host: HostProcess) -> ModelClient:
        """Load the model in a host and build its app; raises PoolError when the host cannot take it."""
        config = await asyncio.to_thread(plan.engine_config)
        core = PoolEngineClient(config)
        try:
            state = await _add_to(host, plan, core)
        except BaseException:
            core.close()
            raise
        try:
            return await cls.over(plan, core, state)
        except BaseException:
            with contextlib.suppress(HostError):  # a host that is gone holds nothing either
                await host.call("remove_model", plan.spec.name)
            raise

    @classmethod
    async def over(cls, plan: ModelPlan, core: PoolEngineClient, state: dict[str, Any]) -> ModelClient:
        """Build the app over a client that a host has joined; raises PoolError, with the client closed."""
        client = None
        observed = core.vllm_config.observability_config
        # vLLM would make a tracer of the whole process for each model.
        endpoint, observed.otlp_traces_endpoint = observed.otlp_traces_endpoint, None
        try:
            await asyncio.to_thread(load_plugins, plan.args)  # some frontends have not planned the model themselves
            with handing_in(core):
                engine = await asyncio.to_thread(
                    AsyncLLM.from_vllm_config,
                    vllm_config=core.vllm_config,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    enable_log_requests=plan.args.enable_log_requests,
                    aggregate_engine_logging=plan.args.aggregate_engine_logging,
                    disable_log_stats=plan.args.disable_log_stats,
                )
            meter(engine)
            check_structured_outputs(engine)
            use_lanes(engine.renderer)
            bound_texts(engine.renderer)
            remember_tokens(engine.renderer.tokenizer)
            client = cls(plan, core, engine, state)
            if endpoint is not None:
                observed.otlp_traces_endpoint = endpoint
                client.tracer = trace_requests(engine, plan.spec.name, provider_for(endpoint))
                core.on_assign = client.tracer.sent
            await client._build_app()
            client._hear_engines()
            return client
        except BaseException as error:
            if client is not None:
                await client.close()
            else:
                core.close()
            await asyncio.to_thread(forget_models, {name for name, _ in names_of(plan)})
            if not isinstance(error, Exception):
                raise
            raise _as_pool_error(plan, error) from error

    async def join(self, host: HostProcess) -> None:
        """Load the model in one more host, or in one that has come back, and let it take requests.

        Raises PoolError when the host cannot take it.
        """
        await _add_to(host, self.plan, self.core)

    async def _build_app(self) -> None:
        tasks = await self.engine.get_supported_tasks()
        flags = without_port_flags(self.plan.args)
        self.app = app = await asyncio.to_thread(build_app, flags, tasks, self.engine.model_config)
        drop_port_parts(app)
        if self.engine.model_config.is_multimodal_model:
            bound_media()
        if "realtime" in tasks:
            from tokenpool.serve.media.realtime_bounds import bound_realtime  # imports what only such models need

            bound_realtime()
        stop_at_first_faults(app)
        await init_app_state(self.engine, app.state, self.plan.args, tasks)
        keep_apart(getattr(app.state, "openai_serving_responses", None))
        bound_token_answers(getattr(app.state, "serving_tokenization", None))
        app.state.server = None  # vLLM's error handler looks it up; the pool never stops because of one model
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished; a response that is made in the background, also between engines."""
        return self.engine.output_processor.get_num_unfinished_requests() or len(self._made_beside())

    def _made_beside(self) -> list[asyncio.Task[Any]]:
        return made_beside(getattr(getattr(self.app, "state", None), "openai_serving_responses", None))

    @property
    def num_seats(self) -> int:
        """Requests that can run at a time, at all hosts together."""
        return self.engine.scheduler_config.max_num_seqs * max(1, len(self.core.hosts))

    def queue(self) -> EngineQueue:
        """What waits and what runs, by AsyncLLM's own books; O(requests)."""
        begun = waiting_tokens = 0
        for state in self.engine.output_processor.request_states.values():
            if state.is_prefilling:
                waiting_tokens += state.prompt_len
            elif state.output_kind is RequestOutputKind.FINAL_ONLY and state.request_index == 0:  # of n > 1 the first
                begun += 1
        return EngineQueue(begun, waiting_tokens)

    def rest(self, is_resting: bool) -> None:
        """See Client: nothing new comes, as the router sees to."""

    async def drain(self, limit_s: float) -> bool:
        """Wait until nothing is unfinished, at most `limit_s`; returns whether that came about."""
        deadline = time.monotonic() + limit_s
        while self.num_unfinished:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def abort_all(self) -> None:
        """End every unfinished request, and what would ask the engines again."""
        for task in self._made_beside():
            task.cancel()
        for state in self.engine.output_processor.request_states.values():
            state.queue.close()  # see `_fail`
        await self.engine.abort(list(self.engine.output_processor.request_states), internal=True)

    def fail_all(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_GATEWAY) -> None:
        """End every unfinished request with an error that says why."""
        for request_id in list(self.engine.output_processor.request_states):
            self._fail(request_id, GracefulHTTPError(reason, status))

    def lost(self, host: str, *, blame: bool = True) -> None:
        """A host is gone: see `PoolEngineClient.lost`."""
        self.core.lost(host, blame=blame)

    def _hear_engines(self) -> None:
        """Run AsyncLLM's task that takes what engines say; vLLM starts it once, and what it raises ends it for good."""
        self.engine.output_handler = None
        self.engine._run_output_handler()
        self.engine.output_handler.add_done_callback(self._hears_no_more)

    def _hears_no_more(self, handler: asyncio.Task[None]) -> None:
        if self._is_closed or handler.cancelled() or self.core.resources.engine_dead:
            return
        self._reviving = asyncio.get_running_loop().create_task(self._revive())

    async def _revive(self) -> None:
        """Begin anew without the requests that were there: vLLM told them an error, the engines know nothing yet."""
        wait_s, name = self._revivals.next_s(), self.plan.spec.name
        self.num_revivals += 1
        count_failure("engine client")
        logger.error("client of the engine died model=%s requests=%d, again in %g s", name, self.num_unfinished, wait_s)
        self.on_fault("the client of its engine died, see the log")
        self.core.abort(self.engine.output_processor.abort_requests(
            list(self.engine.output_processor.request_states), internal=True))  # fmt: skip
        await asyncio.sleep(wait_s)
        if not self._is_closed:
            self._hear_engines()
            self.on_fault("")

    def _fail(self, request_id: str, error: Exception) -> None:
        """End a request, with all that belongs to it, with an error that its client reads."""
        processor = self.engine.output_processor
        state = processor.request_states.get(request_id)
        if state is None:
            return
        whole = state.parent_req.request_id if state.parent_req else request_id
        self.core.abort(processor.abort_requests([whole], internal=True))
        state.queue.put(error)
        state.queue.close()  # else a piece of its input that comes now would begin the request anew

    async def close(self) -> None:
        """Free the client. Its engines are gone, or are removed from their hosts, or end together with them."""
        self._is_closed = True
        if self._reviving is not None:
            self._reviving.cancel()
        if self.engine.output_handler is not None:
            self.engine.output_handler.cancel()
        if self.tracer is not None:
            self.tracer.close()
        await self._lifespan.aclose()
        self.core.close()
        self.fail_all(f"The model `{self.plan.spec.name}` is not served any more.", HTTPStatus.SERVICE_UNAVAILABLE)
        await asyncio.to_thread(self.engine.shutdown)
        # vLLM's app froze the heap, which would keep all of this for ever; soon nobody refers to it any more.
        asyncio.get_running_loop().call_later(RELEASE_AFTER_S, _release)


async def first_config(plans: Iterable[ModelPlan]) -> VllmConfig | None:
    """The engine config of the first model that still has one: its files may be gone."""
    for plan in list(plans):
        try:
            return plan.checked or await asyncio.to_thread(plan.engine_config)
        except PoolError as error:
            logger.debug("no config of model=%s: %s", plan.spec.name, error)
    return None


def _release() -> None:
    # vLLM remembers which keywords a tokenizer's methods take, by functions that hold the tokenizer and its copies.
    func_utils._supports_kw.cache_clear()
    release_metrics()
    release_engine()


async def _add_to(host: HostProcess, plan: ModelPlan, core: PoolEngineClient) -> dict[str, Any]:
    """Load a model in a host and connect to it; returns what the host says of it."""
    addresses = host.new_addresses()
    state = await load_model(host, plan, addresses)
    try:
        await connect(host, core, addresses)
    except BaseException:
        with contextlib.suppress(HostError):
            await host.call("remove_model", plan.spec.name)
        raise
    return state


async def load_model(host: HostProcess, plan: ModelPlan, addresses: EngineAddresses) -> dict[str, Any]:
    """Load a model in a host, for frontends at `addresses`; returns what the host says of it. Raises PoolError."""
    config = await asyncio.to_thread(plan.engine_config)
    try:
        return await host.call("add_model", plan.for_host(config, addresses))
    except Exception as error:
        raise _as_pool_error(plan, error) from error


class EndingHost(Protocol):
    """A host, of which somebody knows when it ends."""

    name: str

    async def wait(self) -> int:
        """Wait until it is gone."""
        ...


async def connect(host: EndingHost, core: PoolEngineClient, addresses: EngineAddresses) -> None:
    """Connect to the engine, unless the host ends first: then nobody would ever answer."""
    joining, ending = asyncio.create_task(core.join(host.name, addresses)), asyncio.create_task(host.wait())
    try:
        await asyncio.wait({joining, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            core.lost(host.name)
        await joining
    finally:
        joining.cancel()
        ending.cancel()


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
