# SPDX-License-Identifier: Apache-2.0
"""Which of several hosts that serve a model gets a request: what frontends ask, and the simulator too.

Pure; imports neither vllm nor ray.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tokenpool.policy.turns import Residency

LOADS_PERIOD_S = 1.0
"""Between two questions of a frontend for the loads of hosts."""
PREFIX_TOKENS = 128
"""Prompts that begin with so many equal tokens are taken to share a prefix; shorter ones are cheap to compute."""
_TOLD_LIFE_S = 3.0
"""Age at which what a host told counts no more."""
_LEAD = 4
"""Requests that a host may have more than the idlest and still be given one whose prefix it may have cached, or whose
weights it has: waiting behind them takes about as long as the prefill or the copy that is saved."""
_MARGIN = 1.5
"""Predicted times to a first token may be wrong by such a factor."""
_FULL = 1.2
"""Load above which a host takes a request only if all are above it. Above 1, because tokens delivered ahead of time let
a host be behind for a while."""
_PATIENCE = 0.1
"""Share of the time that a first token has which it may come later for the sake of a running batch."""
_RANK = {None: 0, Residency.ON_DEVICE: 0, Residency.COPYING: 1, Residency.IN_HOST: 2, Residency.ON_DISK: 3}


class HostQueue(NamedTuple):
    """One host that serves the model, as a frontend knows it."""

    num_requests: int
    """Unfinished requests of the model that were sent there."""
    residency: Residency | None = None
    """Where the model's weights are; None = not told lately."""
    first_token_in_s: float | None = None
    """Predicted seconds to the first token of a new request there; None = not told lately."""
    load: float | None = None
    """Share of the host's time that its requests and a new one need, to be on time; None = not told lately."""
    num_places: int | None = None
    """Requests that the model's batch still takes; 0 or less = a new one waits for another to end; None = not told."""
    is_active: bool = False
    """Whether requests of the model are there, of any frontend."""


class Told:
    """What a host said last of one model: its entry in the host's answer to `load` (see `policy.host_report`)."""

    __slots__ = ("_at_s", "_load", "_num_requests", "_report", "_residency")

    def __init__(self, report: Mapping[str, Any], num_requests: int, at_s: float) -> None:
        """The frontend had `num_requests` of the model there when the report came, at `at_s` on its clock.

        A host of an older version reports no load; then the requests alone are counted.
        """
        self._report, self._num_requests, self._at_s = report, num_requests, at_s
        self._residency = Residency(report["residency"])
        self._load: float | None = report.get("load")

    def queue(self, num_requests: int, now_s: float) -> HostQueue:
        """The host as it should be now that the frontend has `num_requests` there."""
        if now_s - self._at_s > _TOLD_LIFE_S:
            return HostQueue(num_requests)
        report, more = self._report, max(0, num_requests - self._num_requests)
        first_token_in_s = report["first_token_in_s"] + more * report["prefill_s"]
        if self._load is None:
            return HostQueue(num_requests, self._residency, first_token_in_s)
        load = self._load + report["first_load"] + (more + 1) * report["request_load"]
        is_active = more > 0 or report["running"] + report["waiting"] > 0
        return HostQueue(num_requests, self._residency, first_token_in_s, load, report["places"] - more, is_active)


def choose_host(hosts: Mapping[str, HostQueue], prefix: bytes = b"", slack_s: float = math.inf) -> str:
    """The host for a request that begins with `prefix` and whose first token is due in `slack_s`; one host at least.

    1. Deadline: hosts that would be late are left out. If all would be, the one with the shortest wait.
    2. Places: hosts where the model's batch is full are left out. If all are full, the one with the fewest that wait.
    3. Load: hosts that have more to do than they can are left out. If all have, the one with the least.
    4. Queue: hosts where the first token comes later than at the best one, by more than a tenth of `slack_s`, are left
       out. Where nothing is due, or a host has not told, those with more than `_LEAD` requests more than the idlest.
    5. Batch: where something is due, hosts that run the model already; one request more is nearly free there.
    6. Residency: of these, the hosts whose weights are nearest to the device.
    7. Prefix: requests that begin alike go to one host, whose prefix cache then serves them. Which one follows from
       the names alone (rendezvous hashing: D. Thaler, C. Ravishankar, 1998), so that all frontends agree and a host
       that comes or goes moves few prefixes. Without a prefix the fewest requests decide, then the order of `hosts`.
    """
    if len(hosts) == 1:
        return next(iter(hosts))
    waits_s = {name: (queue.first_token_in_s or 0.0) * _MARGIN for name, queue in hosts.items()}
    near: Collection[str] = [name for name in hosts if waits_s[name] <= slack_s]
    if not near:
        return min(waits_s, key=waits_s.__getitem__)
    near = _least_beyond({name: -_or(hosts[name].num_places, 1) for name in near}, -1)
    near = _least_beyond({name: _or(hosts[name].load, 0.0) for name in near}, _FULL)
    is_told = slack_s < math.inf and all([hosts[name].load is not None for name in near])
    if is_told:
        late_s = min([_or(hosts[name].first_token_in_s, 0.0) for name in near]) + _PATIENCE * slack_s
        near = [name for name in near if _or(hosts[name].first_token_in_s, 0.0) <= late_s]
        near = [name for name in near if hosts[name].is_active] or near
    else:
        least = min([hosts[name].num_requests for name in near])
        near = [name for name in near if hosts[name].num_requests <= least + _LEAD]
    best = min([_RANK[hosts[name].residency] for name in near])
    near = [name for name in near if _RANK[hosts[name].residency] == best]
    if prefix:
        return max(near, key=lambda name: hashlib.blake2b(name.encode(), key=_key(prefix)).digest())
    return min(near, key=lambda name: hosts[name].num_requests)


def _least_beyond(values: Mapping[str, float], limit: float) -> Collection[str]:
    """The hosts with at most `limit`; if there are none, those with the least."""
    limit = max(limit, min(values.values()))
    return [name for name, value in values.items() if value <= limit]


def _or(value: float | None, unknown: float) -> float:
    return unknown if value is None else value


def _key(prefix: bytes) -> bytes:
    return hashlib.blake2b(prefix, digest_size=16).digest()
