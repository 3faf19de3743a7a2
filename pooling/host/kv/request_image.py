# SPDX-License-Identifier: Apache-2.0
"""Carries a running request to another engine with all that its layers keep of it, so that nothing is computed again.

The prefix cache names full blocks of KV, and of a layer with a state only that at the end of a block, if it is on at
all. A request of a model with such layers would be computed from its start, and chunks of a prompt round otherwise than
tokens one by one. So between two tokens its blocks go into the host tier as they are, the last ones half full and the
states with them, and the request ends where it was:

    engine a   give_up(request) ──► blocks in tier a, under keys that name all tokens so far
    engine b   blocks in tier b ──► Arrivals: the request that has these tokens gets them when it is scheduled

The keys are made of the request's tokens, so both engines know them; one that was evicted, or of another number of
tokens, is not found, and the request is computed again. Blocks that were read are forgotten.
"""

from __future__ import annotations

import hashlib
import inspect
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from tokenpool.memory.kv_blocks import OfferedBlock
from tokenpool.memory.kv_tier import HostKVTier

MARK = b"request image "
"""How keys begin; those of cached blocks are hashes and no text."""
CAN_CARRY = "skip_zeroing_group_ids" in inspect.signature(KVCacheManager.allocate_slots).parameters
"""Whether blocks that come from elsewhere can be kept from being zeroed; not in vLLM 0.29, which computes again."""


def can_carry(core: Any) -> bool:
    """Whether requests of this engine are carried so: those of models with states, without a drafter."""
    scheduler = core.scheduler
    has_states = getattr(scheduler, "has_mamba_layers", False) and hasattr(scheduler, "_get_local_prefix_cache_hit")
    return CAN_CARRY and has_states and core.vllm_config.speculative_config is None


def give_up(core: Any, pool: Any, tier: HostKVTier, request_id: str) -> list[bytes]:
    """Put the blocks of a running request into the tier and end it without a word; returns their keys.

    No step may be in flight. One that waits with its image goes on with that. Empty, and nothing has changed, where a
    request is not between two tokens of its output or the tier has no room.
    """
    request = core.scheduler.requests.get(request_id)
    if request is None or not _is_carried(request):
        return []
    managers, model = _managers(core.scheduler), pool.view.owner
    places = list(_places(core.scheduler, request))
    keys = [key for _, _, key in places]
    if request.status is not RequestStatus.RUNNING:
        if not all(key in tier.entries_of(model) for key in keys):
            return []
        core.abort_requests([request_id])  # it came with its image, and waits
        return keys
    if request.num_computed_tokens != request.num_tokens - 1:
        return []
    held = [managers[group].req_to_blocks[request_id] for group, _, _ in places]
    if any(index >= len(blocks) or blocks[index].is_null for blocks, (_, index, _) in zip(held, places, strict=True)):
        return []
    blocks = [blocks[index] for blocks, (_, index, _) in zip(held, places, strict=True)]
    if pool.transit is not None:
        pool.transit.wait_for(blocks)
    offered = [OfferedBlock(key, None, pool.address_of(b.block_id)) for key, b in zip(keys, blocks, strict=True)]
    if (copies := tier.offer(model, offered, pool.view.block_bytes)) is not None:
        copies.wait()
    if not all(key in tier.entries_of(model) for key in keys):  # one may have made room for another
        forget(tier, model, keys)
        return []
    core.abort_requests([request_id])
    return keys


def forget(tier: HostKVTier, model: str, keys: list[bytes]) -> None:
    """Drop those of `keys` that are of an image: nobody asks for one twice."""
    for key in keys:
        if key.startswith(MARK):
            tier.discard(model, key)


class Arrivals:
    """Gives requests that go on in an engine the blocks that came for them, as its scheduler lets them run.

    It stands before two calls of vLLM's scheduler: what of a request is computed, and its blocks. A request without
    room stays in the queue as any other; its blocks stay in the tier.
    """

    def __init__(self, core: Any, pool: Any, tier: HostKVTier) -> None:
        self._scheduler, self._pool, self._tier = core.scheduler, pool, tier
        self._stored = tier.entries_of(pool.view.owner)
        manager = core.scheduler.kv_cache_manager
        self._hit, core.scheduler._get_local_prefix_cache_hit = core.scheduler._get_local_prefix_cache_hit, self.hit
        self._allocate, manager.allocate_slots = manager.allocate_slots, self.allocate

    def hit(self, request: Request) -> tuple[Any, int, int, bool]:
        """vLLM's `_get_local_prefix_cache_hit`: with an image all but the last token is computed."""
        if self._keys(request):
            return self._scheduler.kv_cache_manager.empty_kv_cache_blocks, request.num_tokens - 1, 0, False
        return self._hit(request)

    def allocate(self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, **options: Any) -> Any:
        """vLLM's `allocate_slots`: what is said to be computed comes out of the image."""
        keys = self._keys(request) if num_new_computed_tokens else []
        if not keys or num_new_computed_tokens != request.num_tokens - 1:
            return self._allocate(request, num_new_tokens, num_new_computed_tokens, **options)
        groups = tuple(range(len(_managers(self._scheduler))))
        options |= {
            "new_computed_blocks": None,
            "num_external_computed_tokens": num_new_computed_tokens,
            "skip_zeroing_group_ids": groups,
        }
        given = self._allocate(request, num_new_tokens, **options)
        if given is not None and not self._fill(request):
            self._scheduler.kv_cache_manager.free(request)
            forget(self._tier, self._pool.view.owner, keys)
            return None  # computed again in the next step
        return given

    def _fill(self, request: Request) -> bool:
        """Copy the image into the request's blocks; False if a part of it is gone, or the device takes no copy."""
        managers, model = _managers(self._scheduler), self._pool.view.owner
        addresses = {}
        for group, index, key in _places(self._scheduler, request):
            block = managers[group].req_to_blocks[request.request_id][index]
            if block.is_null or key not in self._stored:  # their memory went to blocks that made room for these
                return False
            addresses[key] = self._pool.address_of(block.block_id)
        try:
            self._tier.begin_load(model, addresses).wait()
        except OSError:
            return False
        forget(self._tier, model, list(addresses))
        return True

    def _keys(self, request: Request) -> list[bytes]:
        """The keys of the request's image if all of it is here."""
        if not self._stored or not request.num_output_tokens or request.num_computed_tokens:
            return []
        keys = [key for _, _, key in _places(self._scheduler, request)]
        return keys if all(key in self._stored for key in keys) else []


def _is_carried(request: Request) -> bool:
    return request.num_output_tokens > 0 and getattr(request, "prompt_embeds", None) is None


def _managers(scheduler: Any) -> Any:
    return scheduler.kv_cache_manager.coordinator.single_type_managers


def _places(scheduler: Any, request: Request) -> Iterator[tuple[int, int, bytes]]:
    """Group, place in the request and key of each block that a request needs for its next token."""
    computed = request.num_tokens - 1
    digest = _digest(request)
    for group, manager in enumerate(_managers(scheduler)):
        first = manager.get_num_skipped_tokens(computed) // manager.block_size
        for index in range(first, -(-computed // manager.block_size)):
            yield group, index, MARK + digest + struct.pack("<HI", group, index)


def _digest(request: Request) -> bytes:
    """Of all that a request's blocks depend on."""
    lora = request.lora_request.lora_name if request.lora_request else ""
    media = [feature.identifier for feature in request.mm_features]
    named = hashlib.sha256(repr((request.num_prompt_tokens, lora, request.cache_salt, media)).encode())
    named.update(np.asarray(request.all_token_ids, np.int64).tobytes())
    return named.digest()
