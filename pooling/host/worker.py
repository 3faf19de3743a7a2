# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker, told that the arena is its KV memory; selected through `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class PooledCPUWorker(CPUWorker):
    """A CPUWorker that does not hold the arena's size against the memory that is free on the node.

    The arena is address range, its pages are counted by the ledger; with several models the original
    check would refuse the later ones because the earlier ones use the memory that all of them share.
    """

    def determine_available_memory(self) -> int:
        """Bytes of the arena that this model's view spans."""
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        nbytes = self.cache_config.kv_cache_memory_bytes
        assert nbytes is not None, "the host sets the size of the view before it builds an engine"
        return nbytes
