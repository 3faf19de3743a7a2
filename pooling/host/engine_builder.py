# SPDX-License-Identifier: Apache-2.0
"""Builds the engine of a model and everything the host keeps beside it, or nothing at all."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tokenpool.errors import ConfigError, EngineLostError, UnfitCopyError
from tokenpool.host.engine import encoder_cache
from tokenpool.host.engine.engine_globals import EngineGlobals, keep_thread_count, random_state
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.engine.quarantine import Quarantine
from tokenpool.host.host_room import check_host_memory
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.host.load.build_lane import BuildLane
from tokenpool.host.load.device_choice import (
    EngineMemory,
    give_back_loading_memory,
    make_room_for_loading,
    release_device_memory,
)
from tokenpool.host.load.model_build import ModelBuild, set_for_pool
from tokenpool.host.load.model_tensors import models_of, weight_bytes_of
from tokenpool.host.load.progress import BuildProgress
from tokenpool.host.load.shared_weights import SharedWeights
from tokenpool.host.pressure import PressureRelief
from tokenpool.host.ranks.group_executor import group_executor
from tokenpool.host.ranks.rank_group import RankGroup
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.page_counts import pages_for
from tokenpool.memory.slab_allocator import SlabAllocator
from tokenpool.memory.weights import WeightStore
from tokenpool.node_store.client import NodeStore
from tokenpool.patches.build_context import building
from tokenpool.policy.cost_model import CopyModel, CostModel
from tokenpool.process.heap import release_engine
from tokenpool.wire.spec import HostConfig, HostedModelSpec

logger = logging.getLogger(__name__)


def import_architecture(spec: HostedModelSpec) -> None:
    """Import the code of a model before it is built: that takes up to a second, cannot be split, and needs no turn.

    On any thread. What fails here fails again when the model is built, and is told then.
    """
    try:
        get_model_architecture(spec.vllm_config.model_config)
    except Exception as error:  # whatever the code of a model raises
        logger.debug("the architecture of %r cannot be imported: %s", spec.name, error)


def close_engine(core: HostedEngineCore, model: str, *, tell: bool = True) -> None:
    """Close an engine; what its code raises is logged, since all else of its model is still to be given back.

    Raises EngineLostError.
    """
    try:
        core.close(tell=tell)
    except EngineLostError:
        raise
    except (Exception, SystemExit):  # of vLLM's or a model's code
        logger.exception("the engine was not closed in order model=%s", model)


class EngineBuilder:
    """What a host needs to build engines; used on its loop's thread, or in its build lane."""

    def __init__(
        self,
        config: HostConfig,
        group: RankGroup | None,
        allocator: SlabAllocator,
        weights: WeightStore,
        swapper: KVSwapper,
        relief: PressureRelief,
        copies: CopyModel,
        engine_globals: EngineGlobals,
        lane: BuildLane,
        notify: Callable[[str], None],
        executor_class: type[Executor] = UniProcExecutor,
        node: NodeStore | None = None,
    ) -> None:
        self.config = config
        self.progress = BuildProgress()
        """What `build` is doing; for other threads to read."""
        self._group = group
        self._allocator = allocator
        self._weights = weights
        self._swapper = swapper
        self._relief = relief
        self._copies = copies
        self._globals = engine_globals
        self._lane = lane
        # In a group, only at points to which all ranks come: one in the midst of a build cannot follow a step.
        self._pause = lane.pause if group is None else lane.note_progress
        self._meet = lane.pause if group is None else partial(group.meet, lane.pause)
        self._notify = notify
        self._executor_class = executor_class
        self._node = node

    def build(self, spec: HostedModelSpec, index: int) -> HostedModel:
        """Load a model; raises PoolError and leaves no trace if it cannot be added."""
        if spec.vllm_config.parallel_config.world_size != self.config.tensor_parallel_size:
            raise ConfigError(
                f"model {spec.name!r}: all models of a host need the same --tensor-parallel-size, here "
                f"{self.config.tensor_parallel_size}"
            )
        fresh = copy.deepcopy(spec.vllm_config) if self._node is not None else None  # an engine leaves traces in it
        try:
            return self._build(spec, index, may_map=True)
        except UnfitCopyError as error:
            logger.warning("%s; it is read again", error)
            assert fresh is not None
            return self._build(replace(spec, vllm_config=fresh), index, may_map=False)

    def _build(self, spec: HostedModelSpec, index: int, *, may_map: bool) -> HostedModel:
        start = time.perf_counter()
        movable, ledger = self.config.movable_weights, self._allocator.ledger
        shared = SharedWeights(spec.name, spec.vllm_config, self._node if movable else None, self._pause,
                               may_map=may_map)  # fmt: skip
        weight_pages = [] if movable else self._take_weight_pages(spec.name, spec.weight_bytes)
        build = ModelBuild(
            spec.name,
            spec.vllm_config,
            self._allocator,
            self.config.kv_floor_pages,
            self._weights if movable else None,
            self.progress.enter,
            self._meet,
            shared,
        )
        core, device = None, self._allocator.arena.device
        memory = EngineMemory(device)
        try:
            core = self._build_core(spec, build, shared)
            build.clear_null_block()
            if movable:
                self._weights.keep(spec.name, spec.keep)
            weight_pages += self._account_engine(spec.name, core, memory, len(weight_pages))
            self._relief.check_fits(spec.name, core, build.pool)
            check_host_memory(self._weights.snapshot(), self._weights.host.budget_bytes, self._copies)
            hosted = HostedModel(
                spec=spec,
                index=index,
                core=core,
                build=build,
                quarantine=Quarantine(spec.name, core, partial(release_device_memory, device)),
                weight_pages=weight_pages,
                build_s=time.perf_counter() - start,
                cost=CostModel(copies=self._copies),
            )
            self._swapper.add(hosted)
            return hosted
        except BaseException as error:
            if core is not None:
                close_engine(core, spec.name, tell=False)
            core = hosted = None
            if spec.name in self._weights:
                self._weights.remove(spec.name)
            self._relief.forget(spec.name)
            build.undo()
            ledger.give(spec.name, PageUse.WEIGHTS, weight_pages)
            self._globals.forget(spec.name)
            if self._group is not None:
                self._group.send("forget", spec.name)
            release_engine(error)
            raise

    def _build_core(self, spec: HostedModelSpec, build: ModelBuild, shared: SharedWeights) -> HostedEngineCore:
        drafts = spec.vllm_config.speculative_config
        if drafts is not None and drafts.method == "ngram":
            keep_thread_count()
        set_for_pool(spec.vllm_config, self._allocator.arena.span_bytes)
        ledger = self._allocator.ledger
        loading_pages = pages_for(spec.weight_bytes, ledger.page_size) if self.config.movable_weights else 0
        device = self._allocator.arena.device
        # Held by nobody else while the build pauses: their memory is the loader's.
        lent = ledger.take(
            spec.name, PageUse.WEIGHTS, make_room_for_loading(device, self._weights.make_room, loading_pages)
        )

        def give_up_loading() -> None:
            give_back_loading_memory(device, ledger.num_usable, self._pause)
            ledger.give(spec.name, PageUse.WEIGHTS, lent)
            lent.clear()

        build.give_up_loading = give_up_loading
        try:
            with (
                self.progress.building(spec.name),
                self._globals.building(spec.name),
                building(build),
                self._lane.pausing() if self._group is None else nullcontext(),
            ):
                shared.before_loading()
                core = HostedEngineCore(
                    spec.vllm_config,
                    addresses=spec.addresses,
                    slo=spec.slo,
                    log_stats=spec.log_stats,
                    notify=lambda: self._notify(spec.name),
                    executor_class=group_executor(self._group, spec.name) if self._group else self._executor_class,
                )
            if self._group is not None:
                self._group.send("built", spec.name, random_state())
            return core
        finally:
            shared.give_up()
            ledger.give(spec.name, PageUse.WEIGHTS, lent)

    def _account_engine(self, name: str, core: HostedEngineCore, memory: EngineMemory, num_pages: int) -> list[int]:
        """Book what a new engine keeps on the device; returns pages for it, beyond its `num_pages`, in its own name.

        With movable weights none: it is in the book of what stays. Raises CapacityError.
        """
        growth, later = self._growth(name, memory), encoder_cache.capacity_bytes(core)
        if self.config.movable_weights:
            others = max(0, growth - self._weights.fixed.of(name))
            self._weights.fixed.add(name, others + later, self._weights.make_room)
            extra = 0
        else:
            loaded = weight_bytes_of(*models_of(core.model_executor.driver_worker.worker.model_runner))
            others = max(0, growth - loaded)
            extra = loaded + others + later - num_pages * self.config.page_size
        if others:
            logger.info("beside weights and KV an engine takes model=%s bytes=%d", name, others)
        return self._take_weight_pages(name, max(0, extra))

    def _growth(self, name: str, memory: EngineMemory) -> int:
        """Of the rank where it is the most: one book stands for all."""
        if self._group is None:
            return memory.growth()
        with self._group.watch.work(f"the account of {name}"):
            return max(memory.growth(), *self._group.answers(self._group.ask("growth", name)))

    def _take_weight_pages(self, name: str, nbytes: int) -> list[int]:
        ledger = self._allocator.ledger
        count = pages_for(nbytes, ledger.page_size)
        if count:
            self._allocator.free_pages(count)
        return ledger.take(name, PageUse.WEIGHTS, count)
