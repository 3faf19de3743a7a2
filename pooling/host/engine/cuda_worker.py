# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker for a process that has other engines too; selected through `worker_cls`.

Not yet run on hardware: written against vLLM 0.32.0, vllm/v1/worker/gpu_worker.py.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from tokenpool.host.engine.giving_way import giving_way, graphs_to_capture
from tokenpool.host.engine.process_groups import ROOM, counted_collectives, ensure_expert_group
from tokenpool.host.kv.block_size import block_bytes_of
from tokenpool.host.kv.embedded_rows import embed_in_place
from tokenpool.host.kv.readable_blocks import hide_unreadable_blocks
from tokenpool.host.kv.runner_adapter import warm_up_in_null_block
from tokenpool.patches.build_context import current_build


class PooledCUDAWorker(Worker):
    """A GPU worker that shares process groups and device memory with the other engines of its host."""

    _collectives = 0
    """Of one forward pass, as counted when the model was warmed up."""

    def init_device(self) -> None:
        """Set up the worker without vLLM's check that `gpu_memory_utilization` of the GPU is free.

        `request_memory` (v1/worker/utils.py) raises for a second engine even when the size of its KV cache is given;
        what it returns is used for profiling only, which does not take place.
        """
        cache = self.cache_config
        fraction = cache.gpu_memory_utilization
        cache.gpu_memory_utilization = 0.0
        try:
            super().init_device()
        finally:
            cache.gpu_memory_utilization = fraction
        ensure_expert_group(self)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the weights and, if they are to be movable, move them before any graph is captured over them.

        They are adopted as the model runner leaves them, so quantised and fused weights move in their final form.
        """
        build = current_build()
        if build is not None:
            build.enter_phase("loading weights")
        super().load_model(load_dummy_weights=load_dummy_weights)
        if build is not None and build.movable_weights:
            build.adopt_weights(self.model_runner)
        # What the loader had goes back to the GPU. Large blocks are whole segments: the original loads with
        # max_split_size_mb=20.
        torch.cuda.empty_cache()

    def determine_available_memory(self) -> int:
        """Bytes of the arena that this model's view spans; warms the model up.

        With `kv_cache_memory_bytes` set, the original runs the model once and returns. Without, it would measure
        memory, which the other engines use too, and `profile_cudagraph_memory` would drop the graphs of all engines
        (`CUDAGraphWrapper.clear_all_graphs`).
        """
        nbytes = self.cache_config.kv_cache_memory_bytes
        assert nbytes, "the host sets the size of the view before it builds an engine"
        if (build := current_build()) is not None:
            build.expect_blocks(block_bytes_of(self.vllm_config, self.get_kv_cache_spec()))
            build.enter_phase("warming up")
        with counted_collectives() as counted:
            super().determine_available_memory()
        self._collectives = counted.calls
        if build is not None:
            build.enter_phase("building engine")
        return nbytes

    def compile_or_warm_up_model(self) -> Any:
        """Compile, warm kernels up and capture graphs, without a write to blocks that are not this model's.

        Raises ModelRefusedError, before the first capture, where the ranks' all-reduce has no room for them.
        """
        ROOM.take(self.model_config.served_model_name, self._collectives, graphs_to_capture(self.model_runner))
        hide_unreadable_blocks(self.model_runner)
        embed_in_place(self.model_runner)
        hold_graph_pool()
        build = current_build()
        way = nullcontext() if build is None else giving_way(self.model_runner, build.pause)
        with warm_up_in_null_block(self.model_runner), way:
            return super().compile_or_warm_up_model()

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """Torch's own allocator for everything: vLLM's `CuMemAllocator` refuses a second engine in a process.

        Weights are moved out of it after loading, KV never gets there, and the rest is what the pool's reserve is for.
        """
        return nullcontext()


@functools.cache
def hold_graph_pool() -> Any:
    """A graph of one kernel in the memory pool that the graphs of all engines share, kept for good.

    Torch drops a pool with its last graph, and vLLM asks for it once per process: after the last model with graphs was
    removed, the next capture would fail. Returns what must be kept.
    """
    graph, cell = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph, pool=current_platform.get_global_graph_pool()):
        cell.add_(1)
    return graph, cell
