# SPDX-License-Identifier: Apache-2.0
"""vLLM's `LLM` for several models that share one device, for scripts and batch jobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.llm import LLM
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import EngineZmqAddresses

from tokenpool.config import PoolConfig, load_pool_file
from tokenpool.errors import ConfigError, HostError
from tokenpool.patches import apply_all
from tokenpool.patches.engine_launch import launching
from tokenpool.serve.client.host_process import HostProcess
from tokenpool.serve.launch.launch_plan import host_config, plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan, fit_for_pool
from tokenpool.serve.launch.poolability import check_config
from tokenpool.wire.addresses import EngineAddresses

_STOP_LIMIT_S = 10.0


class PooledLLM(Mapping[str, LLM]):
    """Models by name, each a real `vllm.LLM` whose engine lives with the others in one host process.

        with PooledLLM({"chat": "./chat", "code": {"model": "./code", "args": {"max_model_len": 4096}}},
                       device_memory="24GiB") as pool:
            pool["chat"].chat([{"role": "user", "content": "hello"}])
            outputs = pool.generate({"chat": ["one", "two"], "code": ["def f("]}, SamplingParams(max_tokens=64))

    Everything of `LLM` works on `pool[name]`; calls for different models may be made from different threads, and the
    engines then take turns. Calls for one model must not overlap, as with any `LLM`.
    """

    def __init__(self, models: Mapping[str, str | Mapping[str, Any]] | str, **settings: Any) -> None:
        """Start the host and load the models.

        `models` is the path of a pool file, or names with a checkpoint or with an entry of the pool file's `models`
        (`model`, `args`, `slo`, `priority`). `settings` are other keys of the pool file, such as `device_memory`,
        `weights`, `page_size` and `scheduling`; what concerns HTTP is ignored.

        Raises ConfigError for bad settings and another PoolError for models that cannot be served.
        """
        apply_all()
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise ConfigError(
                "is 0, which keeps engines in this process: unset it", key="VLLM_ENABLE_V1_MULTIPROCESSING"
            )
        asked = _config(models, settings)
        asked.refuse_demand("in PooledLLM")
        config, plans = plan_pool(asked)
        self._llms: dict[str, LLM] = {}
        self._closing = False
        self._host_ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        # The host dies with the thread that started it.
        self._thread = threading.Thread(target=self._loop.run_forever, name="pooled-llm", daemon=True)
        self._thread.start()
        self._host: HostProcess | None = None
        try:
            self._host = self._await(HostProcess.start(host_config(config, plans), plans[0].checked))
            self._watch(asyncio.run_coroutine_threadsafe(self._host.wait(), self._loop))
            for plan in plans:
                self._llms[plan.spec.name] = self._load(plan)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> LLM:
        return self._llms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._llms)

    def __len__(self) -> int:
        return len(self._llms)

    def __enter__(self) -> PooledLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Mapping[str, Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, list[RequestOutput]]:
        """`LLM.generate` for several models at once, which take turns.

        `prompts` holds by model what `LLM.generate` takes; `sampling_params` is the same for all, or by model.
        `options` go to every call; without `use_tqdm` there is no progress bar. Returns the outputs by model, in the
        order of the prompts. Raises ConfigError for an unknown model; if a model's call fails, the others end first.
        """
        self._check_names(prompts)
        by_model = sampling_params if isinstance(sampling_params, Mapping) else dict.fromkeys(prompts, sampling_params)
        self._check_names(by_model)
        options.setdefault("use_tqdm", False)
        with ThreadPoolExecutor(max(1, len(prompts))) as threads:
            calls = {
                name: threads.submit(self._llms[name].generate, given, by_model.get(name), **options)
                for name, given in prompts.items()
            }
        return {name: call.result() for name, call in calls.items()}

    def state(self) -> dict[str, Any]:
        """Memory, models, queues and totals of the host, as `GET /v1/pool/state` gives them for a server's."""
        if self._host is None or self._host_ended.is_set():
            raise HostError("the engine host has ended: make a new PooledLLM")
        return self._await(self._host.call("state"))

    def close(self) -> None:
        """End all engines and the host; what is not finished is lost. May be called twice."""
        if self._closing:
            return
        self._closing = True
        idle = not any(llm.llm_engine.has_unfinished_requests() for llm in self._llms.values())
        for llm in self._llms.values():
            llm.llm_engine.engine_core.shutdown()
            llm.renderer.shutdown()
        if self._host is not None:
            self._await(self._host.stop(_STOP_LIMIT_S) if idle else self._host.kill())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _load(self, plan: ModelPlan) -> LLM:
        engine_args = EngineArgs.from_cli_args(plan.args)
        fit_for_pool(plan.spec.name, engine_args)
        engine_args.disable_log_stats = True  # vLLM's metrics of several engines erase each other; see state()

        def launch(config: VllmConfig, addresses: EngineZmqAddresses) -> _HostedEngine:
            check_config(plan.spec.name, config)
            self._add(plan, config, addresses)
            return _HostedEngine(self._host_ended)

        with launching(launch):
            return LLM.from_engine_args(engine_args)

    def _add(self, plan: ModelPlan, config: VllmConfig, addresses: EngineZmqAddresses) -> None:
        assert self._host is not None
        told = EngineAddresses(tuple(addresses.inputs), tuple(addresses.outputs))
        self._await(self._host.call("add_model", plan.for_host(config, told, log_stats=False)))

    def _watch(self, ended: Future[int]) -> None:
        def tell(_: Future[int]) -> None:
            self._host_ended.set()
            for llm in [] if self._closing else self._llms.values():
                core = llm.llm_engine.engine_core
                core.resources.engine_dead = True
                core.outputs_queue.put_nowait(EngineDeadError())  # wakes whoever waits for outputs

        ended.add_done_callback(tell)

    def _check_names(self, names: Mapping[str, Any]) -> None:
        for name in names:
            if name not in self._llms:
                raise ConfigError(f"is no model of this pool; it has {', '.join(self._llms)}", key=repr(name))

    def _await(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class _HostedEngine:
    """What vLLM's client takes for the processes of its engine."""

    def __init__(self, host_ended: threading.Event) -> None:
        self._host_ended = host_ended

    def monitor_engine_liveness(self) -> None:
        """Return when the engine is gone."""
        self._host_ended.wait()

    def shutdown(self, timeout: float | None = None) -> None:
        """Leave the host running: it has other engines, and ends with the pool."""


def _config(models: Mapping[str, str | Mapping[str, Any]] | str, settings: Mapping[str, Any]) -> PoolConfig:
    if isinstance(models, str):
        if settings:
            raise ConfigError(f"write {', '.join(settings)} into the pool file", source=models)
        return load_pool_file(models)
    entries = [
        {"name": name, **({"model": model} if isinstance(model, str) else model)} for name, model in models.items()
    ]
    return PoolConfig.from_dict({"models": entries, **settings}, source="PooledLLM")
