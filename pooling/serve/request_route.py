# SPDX-License-Identifier: Apache-2.0
"""Which host a frontend sends a request of vLLM's to."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from vllm.v1.engine import EngineCoreRequest

from tokenpool.policy.routing import choose_host

Route = Callable[[EngineCoreRequest, Mapping[str, int]], str]
"""Chooses the host of a request, given the number of unfinished requests of each host; returns a key of it."""

_PREFIX_TOKENS = 128
"""Prompts that begin with so many equal tokens are taken to share a prefix; shorter ones are cheap to compute."""


def by_prefix(request: EngineCoreRequest, loads: Mapping[str, int]) -> str:
    """The host that may have the beginning of a long prompt in its prefix cache, else the one with the least to do."""
    tokens = request.prompt_token_ids or ()
    if len(tokens) < _PREFIX_TOKENS:
        return choose_host(loads)
    # What vLLM's block hashes are made of, too: other salts and adapters share no blocks.
    owner = f"{request.cache_salt}/{request.lora_request.lora_name if request.lora_request else ''}/"
    return choose_host(loads, owner.encode() + array("q", tokens[:_PREFIX_TOKENS]).tobytes())
