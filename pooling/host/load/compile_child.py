# SPDX-License-Identifier: Apache-2.0
"""The process that compiles a model for a host: `python -m tokenpool.host.load.compile_child RANK INIT_METHOD FILE`.

It makes the model as the host will, without reading its weights, tells how large its KV blocks are, warms it up, which
compiles it, and ends. Of a model on several ranks there is one for each, which meet as those of the host do; see
compiled_code.py.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import sys
from typing import Any

from tokenpool.process.affinity import yield_to_others
from tokenpool.process.parent_death import end_with_parent

# Nothing else of ours up here: what imports torch comes after `end_with_parent` and `yield_to_others`.

BLOCK_FORMAT = struct.Struct("<Q")
"""As this process tells how many bytes a KV block has, before it compiles anything."""


class _Unadopted:
    """The `BuildContext` of a model that is never stepped."""

    def __init__(self, file: int, *, movable_weights: bool) -> None:
        """`file` is where the host hears, see BLOCK_FORMAT."""
        self._file = file
        self.movable_weights = movable_weights

    def expect_blocks(self, block_bytes: int) -> None:
        """The host ends this process if its pages cannot hold them."""
        os.write(self._file, BLOCK_FORMAT.pack(block_bytes))
        os.close(self._file)

    def enter_phase(self, phase: str) -> None:
        """Nobody asks."""

    def pause(self) -> None:
        """Nothing else runs here."""

    def make_block_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: there is no scheduler."""
        raise AssertionError("nothing is scheduled here")

    def allocate_kv_cache(self, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any) -> dict[str, Any]:
        """Never called: the model is compiled before it has a cache."""
        raise AssertionError("there is no KV here")

    def adopt_weights(self, model_runner: Any) -> None:
        """They stay where they are: addresses are no part of compiled code."""


def main(packed: bytes, rank: int, init_method: str, file: int) -> None:
    """Compile the model of a pickled pair, VllmConfig and whether its weights are to be movable, for one rank."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from tokenpool.host.load.model_build import set_for_pool
    from tokenpool.host.load.unread_loader import UNREAD
    from tokenpool.patches import apply_all
    from tokenpool.patches.build_context import building

    class OneRank(UniProcExecutor):
        """Has the worker of this rank, and none else."""

        def _distributed_args(self) -> tuple[str, int, int]:
            return init_method, rank, rank

    apply_all()
    config, movable = pickle.loads(packed)
    set_for_pool(config, span_bytes=1)
    config.load_config.load_format = UNREAD
    with building(_Unadopted(file, movable_weights=movable)):
        OneRank(config).determine_available_memory()


if __name__ == "__main__":
    end_with_parent()
    yield_to_others()
    main(sys.stdin.buffer.read(), int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    logging.shutdown()
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks
