# SPDX-License-Identifier: Apache-2.0
"""Where work goes: a new request, or a further seat of a model, to the host that it overloads least.

Of hosts without overload a request takes the one where it costs least, a seat the one on another machine with the least
load.

Pure: values in, an index out; shared by the cluster and the simulator. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class HostView(NamedTuple):
    """One host, as seen for a request of one model."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
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


def _key(host: HostView, full: float) -> tuple[float, bool, bool, float, int]:
    index, load, link_load, more_load, more_link_load, is_active, is_resident = host
    over = max(0.0, load + more_load - full) + max(0.0, link_load + more_link_load - full)
    return over, not is_active, not is_resident, load + link_load, index


def best_home(
    loads: np.ndarray,
    more_load: float,
    free_bytes: np.ndarray,
    mask: np.ndarray,
    is_near: np.ndarray | None,
    full: float,
) -> int:
    """The index of the host for a further seat of a model, of those that `mask` names; one at least must be.

    Args:
        loads: share of each host's time that its work needs.
        more_load: what the seat adds.
        free_bytes: of host memory.
        mask: hosts that have room and are fit for it.
        is_near: hosts on a machine that has a seat of the model already; one elsewhere survives its loss.
        full: load above which tokens come late.

    Least overload first, then other machines, then the least load. Memory counts a fifth of load, so that models
    nobody asks for are spread too. Ties go to the lowest index. O(hosts).
    """
    after = loads + more_load
    key = 1e3 * np.maximum(0.0, after - full) + after - 0.2 * free_bytes / max(1.0, float(free_bytes.max()))
    if is_near is not None:
        key = key + 10.0 * is_near
    return int(np.where(mask, key, np.inf).argmin())
