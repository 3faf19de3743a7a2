# SPDX-License-Identifier: Apache-2.0
"""The workers of all models on one rank that follows rank 0; their memory is where rank 0 says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import configure_logging_if_needed
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tokenpool.errors import CapacityError, ModelRefusedError
from tokenpool.host.engine.engine_globals import EngineGlobals, set_random_state
from tokenpool.host.kv.runner_adapter import RunnerAdapter, make_runner_adapter
from tokenpool.host.load.build_lane import engine_stream, on_stream
from tokenpool.host.load.device_choice import EngineMemory, make_all_pages, make_device, run_near_gpu
from tokenpool.host.load.model_build import kv_cache_views
from tokenpool.host.load.model_tensors import models_of, movable_tensors
from tokenpool.memory.devices.mirrored import Mirror
from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.patches import apply_all
from tokenpool.patches.build_context import building
from tokenpool.process.heap import release_engine


@dataclass(slots=True)
class _Model:
    wrapper: WorkerWrapperBase
    build: _FollowedBuild
    memory: EngineMemory
    adapter: RunnerAdapter | None = None


class RankModels:
    """What the process of one rank has. `next_message` and `meet` must be set."""

    next_message: Callable[[], tuple[Any, ...]]
    """Returns rank 0's next message."""
    meet: Callable[[], None]
    """Waits at a point of a build until all ranks are there."""

    def __init__(self, rank: int, init_method: str, page_size: int, cpu_link: int | None = None) -> None:
        apply_all()
        self.mirror = Mirror(make_device(page_size, cpu_link, rank))
        run_near_gpu(self.mirror.device)
        self._rank = rank
        self._init_method = init_method
        self._globals = EngineGlobals()
        self._models: dict[str, _Model] = {}
        self._being_built = ""
        self._build: ExitStack | None = None
        """What is in force until the model is built."""
        self._builds_beside = False

    def is_built_beside(self, kind: str, content: tuple[Any, ...]) -> bool:
        """Whether a question belongs to a build that may pause for steps of other models."""
        if kind == "build":
            self._builds_beside = bool(self._models)
        elif kind != "call" or content[0] != self._being_built:
            return False
        return self._builds_beside

    def on_engine_stream(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` for another thread, on the stream on which this one computes."""
        return on_stream(engine_stream(), work)

    def make_pages(self, num_pages: int) -> None:
        """Make all pages of this rank's device, as rank 0 has done; raises CapacityError."""
        try:
            make_all_pages(self.mirror.device, num_pages)
        except CapacityError as error:
            needed, free = error.needed_pages, error.free_pages
            raise CapacityError(f"rank {self._rank}: {error}", needed_pages=needed, free_pages=free) from error

    def build(self, name: str, config: VllmConfig, movable_weights: bool) -> None:
        """Make a worker for the model and load its weights, together with rank 0."""
        configure_logging_if_needed(config.logging_config)
        wrapper = WorkerWrapperBase(rpc_rank=self._rank, global_rank=self._rank)
        build, memory = _FollowedBuild(name, self, movable_weights), EngineMemory(self.mirror.device)
        worker_arguments: list[dict[str, Any]] = [{} for _ in range(config.parallel_config.world_size)]
        worker_arguments[self._rank] = dict(
            vllm_config=config,
            local_rank=self._rank,
            rank=self._rank,
            distributed_init_method=self._init_method,
            is_driver_worker=False,
        )
        try:
            with ExitStack() as stack:
                stack.enter_context(self._globals.building(name))
                with building(build):
                    wrapper.init_worker(worker_arguments)
                    wrapper.init_device()
                    wrapper.load_model()
                    current_platform.update_block_size_for_backend(config)
                self._build, self._being_built = stack.pop_all(), name
        except BaseException:
            self._globals.forget(name)
            raise
        self._models[name] = _Model(wrapper, build, memory)

    def built(self, name: str, random: Any) -> None:
        """The model is built: its globals are its own, and all ranks draw the same random numbers."""
        assert self._build is not None and name == self._being_built
        self._end_build(None)
        self.random(random)

    def _end_build(self, failure: Exception | None) -> None:
        assert self._build is not None
        build, self._build, self._being_built = self._build, None, ""
        build.__exit__(type(failure) if failure is not None else None, failure, None)

    def random(self, random: Any) -> None:
        """Draw the random numbers that rank 0 draws: each rank samples by itself, and all must get the same tokens."""
        set_random_state(random)

    def paused(self) -> AbstractContextManager[None]:
        """While a build waits: what is in force outside of it is in force in the block."""
        return self._globals.build_paused()

    def growth(self, name: str) -> int:
        """What the model's engine takes of this rank's GPU outside the pool's pages, in bytes."""
        return self._models[name].memory.growth()

    def call(self, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: bool) -> Any:
        """Call a method of the model's worker, or a function with the worker."""
        model = self._models[name]
        if name != self._being_built:
            self._globals.enter(name)
        self.mirror.precede_compute()
        with building(model.build):
            result = run_method(model.wrapper, method, args, kwargs)
        if not wanted:
            return None  # the output of a step is rank 0's to wait for
        return result.get_output() if isinstance(result, AsyncModelRunnerOutput) else result

    def runner(self, name: str, method: str, args: tuple[Any, ...]) -> None:
        """Call a method of the model's runner adapter."""
        model = self._models[name]
        if model.adapter is None:
            model.adapter = make_runner_adapter(name, model.wrapper.worker.model_runner)
        getattr(model.adapter, method)(*args)

    def forget(self, name: str) -> None:
        """Drop a model; nothing if its build failed."""
        model = self._models.pop(name, None)
        if self._build is not None and name == self._being_built:
            self._end_build(RuntimeError("the build failed on rank 0"))
        if model is not None:
            model.wrapper.shutdown()
        self._globals.forget(name)
        del model
        release_engine()

    def follow_until(self, last: str) -> tuple[tuple[Any, ...], Any]:
        """Repeat rank 0's calls on the memory up to and with the next `last`; returns its arguments and its result."""
        while True:
            kind, _, *content = self.next_message()
            if kind != "device":
                raise RuntimeError("rank 0 failed in what this rank waits for")
            name, args = content
            result = self.mirror.do(name, args)
            if name == last:
                return args, result


class _FollowedBuild:
    """The `BuildContext` of a model on a rank that follows: places come from what rank 0 does meanwhile."""

    def __init__(self, name: str, models: RankModels, movable_weights: bool) -> None:
        self._name = name
        self.movable_weights = movable_weights
        self._models = models

    def enter_phase(self, phase: str) -> None:
        """Rank 0 tells how far the build is."""

    def expect_blocks(self, block_bytes: int) -> None:
        """Rank 0 judges."""

    def pause(self) -> None:
        """All ranks come to this point before any goes on, and others' steps are taken here."""
        self._models.meet()

    def make_block_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: only rank 0 schedules."""
        raise AssertionError("a rank that follows has no scheduler")

    def allocate_kv_cache(
        self, kv_cache_config: KVCacheConfig, layout: Any, kernel_block_sizes: list[int] | None
    ) -> dict[str, Any]:
        """Views of this rank's arena, at the place that rank 0 chose."""
        if not kv_cache_config.kv_cache_tensors:
            return {}
        _, buffer = self._models.follow_until("tensor")
        return kv_cache_views(buffer, kv_cache_config, layout, kernel_block_sizes)

    def adopt_weights(self, model_runner: Any) -> None:
        """Move this rank's weights into its counterparts of rank 0's host buffer and range."""
        layout = WeightLayout(movable_tensors(*models_of(model_runner)))
        (_, nbytes), buffer = self._models.follow_until("host_buffer")
        if nbytes != layout.nbytes:
            raise ModelRefusedError(
                self._name,
                f"weights of {nbytes} bytes on rank 0 and {layout.nbytes} on another rank",
                "set weights: fixed for its pool, or choose another --tensor-parallel-size",
            )
        layout.copy_to(buffer, lambda nbytes: None)
        # Rank 0 asks for the place of each span in the same order.
        layout.point_at(lambda span: self._models.follow_until("tensor")[1])
