# SPDX-License-Identifier: Apache-2.0
"""What a process that serves has of a model: how many requests wait for it, and who uses it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tokenpool.serve.pool.models import PoolModel


class ModelUse(NamedTuple):
    """What one frontend has of a model; times on the monotonic clock, which is the same for all processes."""

    num_held: int = 0
    """Requests that wait for it to be loaded."""
    due_by_tenant: Mapping[str, float] = MappingProxyType({})
    """When the most urgent of each tenant's is due."""
    since_s: float = math.inf
    """Since when the first of them waits."""
    inflight: int = 0
    """Calls into its app."""
    last_used_s: float = 0.0
    """When the last one began or ended."""


def use_of(model: PoolModel) -> ModelUse:
    """What this process has of a model; of several frontends their supervisor has what all have."""
    app, client = model.app, model.client
    inflight = app.inflight + (client.num_unfinished if client is not None else 0)
    return ModelUse(len(app.hold), app.hold.due_by_tenant, app.hold.since_s, inflight, app.last_used_s)
