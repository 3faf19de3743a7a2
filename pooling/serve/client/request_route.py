# SPDX-License-Identifier: Apache-2.0
"""Which host a frontend sends a request of vLLM's to."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Mapping

from vllm.v1.engine import EngineCoreRequest

from tokenpool.policy.routing import PREFIX_TOKENS, HostQueue, choose_host

Route = Callable[[EngineCoreRequest, Mapping[str, HostQueue]], str]
"""Chooses the host of a request, given what is known of each host; returns a key of it."""


def by_prefix(request: EngineCoreRequest, hosts: Mapping[str, HostQueue], *, ttft_s: float = math.inf) -> str:
    """The host that is in time, near the weights, and may have the beginning of a long prompt in its prefix cache.

    `ttft_s` is the model's SLO for first tokens.
    """
    tokens = request.prompt_token_ids or ()
    slack_s = request.arrival_time + ttft_s - time.time()
    if len(tokens) < PREFIX_TOKENS:
        return choose_host(hosts, slack_s=slack_s)
    # What vLLM's block hashes are made of, too: other salts and adapters share no blocks.
    owner = f"{request.cache_salt}/{request.lora_request.lora_name if request.lora_request else ''}/"
    return choose_host(hosts, owner.encode() + array("q", tokens[:PREFIX_TOKENS]).tobytes(), slack_s)
