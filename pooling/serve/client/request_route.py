# SPDX-License-Identifier: Apache-2.0
"""Which host a frontend sends a request of vLLM's to."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from tokenpool.policy.routing import HostQueue, choose_host
from tokenpool.policy.turns import Residency

Route = Callable[[EngineCoreRequest, Mapping[str, HostQueue]], str]
"""Chooses the host of a request, given what is known of each host; returns a key of it."""

_PREFIX_TOKENS = 128
"""Prompts that begin with so many equal tokens are taken to share a prefix; shorter ones are cheap to compute."""
_TOLD_LIFE_S = 3.0
"""Age at which what a host told counts no more."""


class Told:
    """What a host said last of the model's weights and of the wait there."""

    __slots__ = ("_at_s", "_first_token_in_s", "_num_requests", "_prefill_s", "_residency")

    def __init__(self, load: Mapping[str, Any], num_requests: int) -> None:
        """`load` is the model's entry in the host's answer to `load`, when it had `num_requests` of this frontend."""
        self._at_s = time.monotonic()
        self._residency = Residency(load["residency"])
        self._first_token_in_s: float = load["first_token_in_s"]
        self._prefill_s: float = load["prefill_s"]
        self._num_requests = num_requests

    def queue(self, num_requests: int) -> HostQueue:
        """The host as it should be now."""
        if time.monotonic() - self._at_s > _TOLD_LIFE_S:
            return HostQueue(num_requests)
        more_s = max(0, num_requests - self._num_requests) * self._prefill_s
        return HostQueue(num_requests, self._residency, self._first_token_in_s + more_s)


def by_prefix(request: EngineCoreRequest, hosts: Mapping[str, HostQueue], *, ttft_s: float = math.inf) -> str:
    """The host that is in time, near the weights, and may have the beginning of a long prompt in its prefix cache.

    `ttft_s` is the model's SLO for first tokens.
    """
    tokens = request.prompt_token_ids or ()
    slack_s = request.arrival_time + ttft_s - time.time()
    if len(tokens) < _PREFIX_TOKENS:
        return choose_host(hosts, slack_s=slack_s)
    # What vLLM's block hashes are made of, too: other salts and adapters share no blocks.
    owner = f"{request.cache_salt}/{request.lora_request.lora_name if request.lora_request else ''}/"
    return choose_host(hosts, owner.encode() + array("q", tokens[:_PREFIX_TOKENS]).tobytes(), slack_s)
