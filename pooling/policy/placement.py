# SPDX-License-Identifier: Apache-2.0
"""Where a further seat of a model goes: to the host that it overloads least.

Of hosts without overload it takes the one on another machine with the least load. Which of a model's hosts gets a
request is `policy.routing`'s to say.

Pure: values in, an index out; shared by the cluster and the simulator. Imports neither vllm nor ray.
"""

from __future__ import annotations

import numpy as np


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
