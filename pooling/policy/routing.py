# SPDX-License-Identifier: Apache-2.0
"""Which of several hosts that serve a model gets a request. Pure; imports neither vllm nor ray."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

from tokenpool.policy.turns import Residency

_LEAD = 4
"""Requests that a host may have more than the idlest and still be given one whose prefix it may have cached, or whose
weights it has: waiting behind them takes about as long as the prefill or the copy that is saved."""
_MARGIN = 1.5
"""Predicted times to a first token may be wrong by such a factor."""
_RANK = {None: 0, Residency.ON_DEVICE: 0, Residency.COPYING: 1, Residency.IN_HOST: 2, Residency.ON_DISK: 3}


class HostQueue(NamedTuple):
    """One host that serves the model, as a frontend knows it."""

    num_requests: int
    """Unfinished requests of the model that were sent there."""
    residency: Residency | None = None
    """Where the model's weights are; None = not told lately."""
    first_token_in_s: float | None = None
    """Predicted seconds to the first token of a new request there; None = not told lately."""


def choose_host(hosts: Mapping[str, HostQueue], prefix: bytes = b"", slack_s: float = math.inf) -> str:
    """The host for a request that begins with `prefix` and whose first token is due in `slack_s`; one host at least.

    1. Deadline: hosts that would be late are left out. If all would be, the one with the shortest wait.
    2. Queue: hosts with more than `_LEAD` requests more than the idlest are left out.
    3. Residency: of these, the hosts whose weights are nearest to the device.
    4. Prefix: requests that begin alike go to one host, whose prefix cache then serves them. Which one follows from
       the names alone (rendezvous hashing: D. Thaler, C. Ravishankar, 1998), so that all frontends agree and a host
       that comes or goes moves few prefixes. Without a prefix the fewest requests decide, then the order of `hosts`.
    """
    if len(hosts) == 1:
        return next(iter(hosts))
    waits_s = {name: (queue.first_token_in_s or 0.0) * _MARGIN for name, queue in hosts.items()}
    in_time = [name for name in hosts if waits_s[name] <= slack_s]
    if not in_time:
        return min(waits_s, key=waits_s.__getitem__)
    least = min([hosts[name].num_requests for name in in_time])
    near = [name for name in in_time if hosts[name].num_requests <= least + _LEAD]
    best = min([_RANK[hosts[name].residency] for name in near])
    near = [name for name in near if _RANK[hosts[name].residency] == best]
    if prefix:
        return max(near, key=lambda name: hashlib.blake2b(name.encode(), key=_key(prefix)).digest())
    return min(near, key=lambda name: hosts[name].num_requests)


def _key(prefix: bytes) -> bytes:
    return hashlib.blake2b(prefix, digest_size=16).digest()
