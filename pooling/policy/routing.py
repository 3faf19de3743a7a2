# SPDX-License-Identifier: Apache-2.0
"""Which of several hosts that serve a model gets a request. Pure; imports neither vllm nor ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

_LEAD = 4
"""Requests that a host may have more than the idlest and still be given one whose prefix it may have cached: waiting
behind them takes about as long as the prefill that is saved."""


def choose_host(loads: Mapping[str, int], prefix: bytes = b"") -> str:
    """The host for a request; `loads` are unfinished requests by host, at least one host, `prefix` begins its prompt.

    Requests that begin alike go to one host, whose prefix cache then serves them, unless it has `_LEAD` requests more
    than the idlest. Which host that is follows from the names alone (rendezvous hashing: D. Thaler, C. Ravishankar,
    1998), so that all frontends agree and a host that comes or goes moves few prefixes. Without a prefix the host
    with the fewest requests, the first of equal ones.
    """
    least = min(loads.values())
    if prefix:
        near = [host for host, load in loads.items() if load <= least + _LEAD]
        return max(near, key=lambda host: hashlib.blake2b(host.encode(), key=_key(prefix)).digest())
    return min(loads, key=loads.__getitem__)


def _key(prefix: bytes) -> bytes:
    return hashlib.blake2b(prefix, digest_size=16).digest()
