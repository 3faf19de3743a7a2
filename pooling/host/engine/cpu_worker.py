# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker for a process that has other engines too; selected through `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from tokenpool.host.engine import cpu_mla
from tokenpool.host.engine.process_groups import ensure_expert_group
from tokenpool.host.kv.block_size import block_bytes_of
from tokenpool.host.kv.embedded_rows import embed_in_place
from tokenpool.host.kv.readable_blocks import hide_unreadable_blocks
from tokenpool.patches.build_context import current_build
from tokenpool.patches.cpu_gemm import use_plain_gemm


class PooledCPUWorker(CPUWorker):
    """A CPUWorker that shares process groups and KV memory with the other engines of its host."""

    def init_device(self) -> None:
        """Set up the worker; the first engine's process groups are used by all."""
        cpu_mla.register()
        super().init_device()
        ensure_expert_group(self)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the weights and, if they are to be movable, move them before anything is computed with them."""
        build = current_build()
        _enter_phase("loading weights")
        if build is None or not build.movable_weights:
            super().load_model(load_dummy_weights=load_dummy_weights)
            return
        with use_plain_gemm():
            super().load_model(load_dummy_weights=load_dummy_weights)
        build.adopt_weights(self.model_runner)

    def determine_available_memory(self) -> int:
        """Bytes of the arena that this model's view spans.

        The arena is address range, its pages are counted by the ledger; with several models the original
        check would refuse the later ones because the earlier ones use the memory that all of them share.
        """
        cache = self.cache_config
        nbytes = cache.kv_cache_memory_bytes
        assert nbytes is not None, "the host sets the size of the view before it builds an engine"
        if (build := current_build()) is not None:
            build.expect_blocks(block_bytes_of(self.vllm_config, self.get_kv_cache_spec()))
        _enter_phase("warming up")
        cache.kv_cache_memory_bytes = 1  # passes the check; the rest of the original, the warm-up, is wanted
        try:
            super().determine_available_memory()
        finally:
            cache.kv_cache_memory_bytes = nbytes
        _enter_phase("building engine")
        return nbytes

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; from now on no step sees a block that its requests do not hold."""
        hide_unreadable_blocks(self.model_runner)
        embed_in_place(self.model_runner)
        return super().compile_or_warm_up_model()


def _enter_phase(phase: str) -> None:
    if (build := current_build()) is not None:
        build.enter_phase(phase)
