# SPDX-License-Identifier: Apache-2.0
"""Which host serves a new request: one that runs its model already, unless that host has too much to do.

Pure: values in, an index out; shared by the cluster and the simulator. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class HostView(NamedTuple):
    """One host, as seen for a request of one model."""

    index: int
    """Tells hosts apart."""
    load: float
    """Share of its time that keeps its requests on time: sum over models with work of step_s / tpot_s, and of the
    seconds of waiting prefills / ttft_s."""
    link_load: float
    """Share of its link's time: weights of models with work that do not fit beside the others, once per ttft_s."""
    more_load: float
    """What the request adds to `load`: next to nothing where the model decodes already, a step per tpot_s where not."""
    more_link_load: float
    """What it adds to `link_load`."""
    is_active: bool = False
    """Whether the model has work there."""
    is_resident: bool = False
    """Whether its weights are on the device."""


def place(hosts: Iterable[HostView], *, full: float = 1.2) -> int:
    """The index of the host for a request; raises ValueError without hosts.

    Least overload first: by how much the loads would exceed `full`, which is above 1 because tokens delivered ahead of
    time let a host be behind for a while. Of hosts without overload, the one where the
    request costs least goes first: batching with running requests of its model is nearly free, weights that are on the
    device need no copy. Ties go to the least load, then to the lowest index. O(hosts).
    """
    return min([_key(host, full) for host in hosts])[-1]


def _key(host: HostView, full: float) -> tuple[float, ...]:
    index, load, link_load, more_load, more_link_load, is_active, is_resident = host
    over = max(0.0, load + more_load - full) + max(0.0, link_load + more_link_load - full)
    return over, not is_active, not is_resident, load + link_load, index
