# SPDX-License-Identifier: Apache-2.0
"""KV blocks of one model on their way to or from the device, and which requests may run meanwhile.

Blocks travel in groups, on the way in one per request in the order in which requests run. The groups arrive in their
order. Until a block has arrived, nobody reads it, nobody else gets its place, and its slab stays where it is:

* a running request whose blocks are not all there is left out of the schedule. If that is so of all of them, the
  first runs nevertheless;
* a step comes after the arrival of all blocks of its requests, those found in the prefix cache included. A GPU's stream
  waits for that, the host does not;
* whoever lets go of a block waits on the host until it is there (`SlabBlockPool.free_blocks`). That is rare: a request
  ends or is preempted before it has run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tokenpool.memory.devices.device import Copies

Group = tuple[Sequence[KVCacheBlock], Copies]

_NEVER = 1 << 62


class KVTransit:
    """Copies under way; used on the host loop's thread only."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self._copies: list[Copies] = []
        self._group_of: dict[int, int] = {}  # id() of a block -> its group
        for index, (blocks, copies) in enumerate(groups):
            self._copies.append(copies)
            self._group_of.update((id(block), index) for block in blocks)
        self._num_done = 0

    def poll(self) -> bool:
        """Whether all blocks are there; does not wait."""
        while self._num_done < len(self._copies) and self._copies[self._num_done].done():
            self._num_done += 1
        return self._num_done == len(self._copies)

    def wait(self) -> None:
        """Wait on the host until all blocks are there."""
        self._wait_for(len(self._copies) - 1)

    def wait_for(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Wait on the host until those of `blocks` that are on their way are there."""
        self._wait_for(self._last_group(blocks))

    def has_arrived(self, blocks: Iterable[KVCacheBlock]) -> bool:
        """Whether none of `blocks` is on its way, as `poll` saw it last."""
        return self._last_group(blocks) < self._num_done

    def precede_compute(self, blocks: Iterable[KVCacheBlock] | None = None) -> None:
        """Let the engine's next steps come after the arrival of `blocks`, or of all."""
        last = len(self._copies) - 1 if blocks is None else self._last_group(blocks)
        if last >= self._num_done:
            self._copies[last].precede_compute()

    @property
    def seconds(self) -> float:
        """How long the copies took, once all blocks are there."""
        return sum(copies.seconds for copies in self._copies)

    def _wait_for(self, group: int) -> None:
        while self._num_done <= group:
            self._copies[self._num_done].wait()
            self._num_done += 1

    def _last_group(self, blocks: Iterable[KVCacheBlock]) -> int:
        return max((self._group_of.get(id(block), -1) for block in blocks), default=-1)


def blocks_of(scheduler: Any, request_id: str) -> list[KVCacheBlock]:
    """The KV blocks of a request, of all groups of layers; null blocks among them."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [block for manager in managers for block in manager.req_to_blocks.get(request_id, ())]


def schedule_arrived(scheduler: Any, transit: KVTransit, schedule: Callable[[], Any]) -> Any:
    """Call `schedule` so that it leaves out running requests whose blocks are not there, and let the step wait.

    Nobody is left out when free blocks are few: the scheduler would preempt the requests that it sees.
    """
    late = [] if transit.poll() else _late_requests(scheduler, transit)
    before = [request.next_decode_eligible_step for request in late]
    for request in late:  # vLLM's own way to let a running request pause for some steps
        request.next_decode_eligible_step = _NEVER
    try:
        output = schedule()
    finally:
        for request, step in zip(late, before, strict=True):
            request.next_decode_eligible_step = step
    if getattr(output, "kv_cache_block_copies", None):  # whose sources are in no request's list
        transit.precede_compute()
    else:
        scheduled = output.num_scheduled_tokens
        transit.precede_compute(block for request_id in scheduled for block in blocks_of(scheduler, request_id))
    return output


def _late_requests(scheduler: Any, transit: KVTransit) -> list[Any]:
    running = scheduler.running
    num_groups = len(scheduler.kv_cache_manager.coordinator.single_type_managers)
    if scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < len(running) * num_groups:
        return []
    late = [request for request in running if not transit.has_arrived(blocks_of(scheduler, request.request_id))]
    return late[1:] if len(late) == len(running) else late
