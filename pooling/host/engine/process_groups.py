# SPDX-License-Identifier: Apache-2.0
"""What the engines of a process share of vLLM's process groups: the first engine makes them, and they serve all.

Of the all-reduce between GPUs nothing was run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import parallel_state

from tokenpool.errors import ModelRefusedError
from tokenpool.patches.reduce_room import PLACES

_FIRST_PLACES = 3
"""Taken when the group is made: vLLM's own buffers."""
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "custom_all_gather", "custom_reduce_scatter")


def ensure_expert_group(worker: Any) -> None:
    """Make the group that a mixture of experts needs, if the model of `worker` is one and there is none.

    vLLM makes it together with the other groups, and only for a mixture of experts: when the first model of the
    process was dense, the first MoE model finds the groups made and this one missing (parallel_state.py,
    `initialize_model_parallel` and `ensure_model_parallel_initialized`).
    """
    if worker.model_config.is_moe and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [world.ranks],
            world.local_rank,
            torch.distributed.get_backend(world.device_group),
            group_name="ep",
            use_all2all=worker.parallel_config.use_all2all,
        )


@contextmanager
def outside_capture() -> Iterator[None]:
    """While the capture of graphs pauses: all-reduces of other engines compute.

    The custom all-reduce is told once that graphs are captured (custom_all_reduce.py, `capture`), and until the last
    of them it answers whoever calls it outside of a graph with memory that nobody has written.
    """
    custom = _custom_all_reduce()
    if custom is None or not custom._IS_CAPTURING:
        yield
        return
    custom._IS_CAPTURING = False
    try:
        yield
    finally:
        custom._IS_CAPTURING = True


@dataclass(slots=True)
class Collectives:
    """How many collectives of the tensor parallel group were called in a block."""

    calls: int = 0


@contextmanager
def counted_collectives() -> Iterator[Collectives]:
    """Count them on this rank, those that go to the custom all-reduce and others; none where a model has one rank."""
    counted, communicator = Collectives(), _communicator()
    if communicator is None:
        yield counted
        return

    def counting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted.calls += 1
            return original(*args, **kwargs)

        return call

    names = [name for name in _COLLECTIVES if hasattr(communicator, name)]
    for name in names:
        setattr(communicator, name, counting(getattr(communicator, name)))
    try:
        yield counted
    finally:
        for name in names:
            delattr(communicator, name)  # the method of its class is left


class ReduceRoom:
    """The places of this process's custom all-reduce: one for each of its calls in each graph, of all engines.

    They never come back (custom_all_reduce.cuh, `register_graph_buffers`), so a model that is removed keeps its own.
    When there are none left a capture fails, and so does each one after it. All ranks count alike, and refuse alike.
    """

    def __init__(self, places: int = PLACES) -> None:
        self._places = places
        self._taken = _FIRST_PLACES

    def take(self, model: str, calls: int, graphs: int) -> None:
        """Take the places of a model with so many collectives in a step, for so many graphs.

        Raises ModelRefusedError, and takes none, when they are more than are left. Does nothing where the group has no
        custom all-reduce.
        """
        custom = _custom_all_reduce()
        if custom is None or custom.disabled:
            return
        needed, left = calls * graphs, self._places - self._taken
        if needed > left:
            raise ModelRefusedError(
                model,
                f"its {graphs} CUDA graphs with {calls} collectives each need {needed} places of the custom "
                f"all-reduce, and {left} of {self._places} are left: models that were removed keep theirs",
                "restart the pool, or give it fewer --cudagraph-capture-sizes, --enforce-eager, or "
                "--disable-custom-all-reduce for all models",
            )
        self._taken += needed


ROOM = ReduceRoom()
"""That of this process."""


def _communicator() -> Any:
    group = parallel_state._TP
    return None if group is None or group.world_size == 1 else group.device_communicator


def _custom_all_reduce() -> Any:
    return getattr(_communicator(), "ca_comm", None)
