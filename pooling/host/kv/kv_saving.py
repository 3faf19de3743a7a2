# SPDX-License-Identifier: Apache-2.0
"""Puts the full blocks of a request into the host tier before it moves; the request goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from tokenpool.host.kv.kv_supply import OnLoop
from tokenpool.wire.kv_frames import blocks_in_chunk


class Saving:
    """One chunk between two steps, so that no step waits for more than that; on the loop's thread."""

    def __init__(
        self, core: Any, pool: Any, request_id: str, on_loop: OnLoop, is_there: Callable[[], bool]
    ) -> None:  # fmt: skip
        """`is_there` says whether the model's KV is still on this host's device."""
        self.done: Future[list[bytes]] = Future()
        """Keys of what was saved, in order."""
        self._managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        self._pool, self._request_id, self._on_loop, self._is_there = pool, request_id, on_loop, is_there
        self._places = [
            (group, index)
            for group, manager in enumerate(self._managers)
            for index in range(len(manager.req_to_blocks.get(request_id, ())))
        ]  # those that it gets later need not be computed yet
        self._keys: list[bytes] = []

    def save(self) -> None:
        """Begin to save the next chunk, and the others after the next steps."""
        try:
            if self._places and self._is_there():
                self._save_some()
                self._on_loop(self.save)
            else:
                self.done.set_result([key for key in self._keys if key in self._pool.link.stored])
        except Exception as error:  # of vLLM's making: the caller's answer
            self.done.set_exception(error)

    def _save_some(self) -> None:
        count = blocks_in_chunk(self._pool.view.block_bytes)
        places, self._places = self._places[:count], self._places[count:]
        blocks = list(self._full(places))
        self._pool.link.offer(blocks)
        self._keys += [bytes(block.block_hash) for block in blocks]

    def _full(self, places: list[tuple[int, int]]) -> Iterator[Any]:
        """What the request has there now: none if it has ended, other ones if it began anew."""
        for group, index in places:
            held = self._managers[group].req_to_blocks.get(self._request_id, ())
            if index < len(held) and held[index].block_hash is not None:
                yield held[index]
