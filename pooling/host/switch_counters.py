# SPDX-License-Identifier: Apache-2.0
"""Running totals of what a host moves between device, host memory and disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SwitchCounters:
    """Running totals of the device's switches."""

    switches: int = 0
    """Times a model was brought in that was not ready."""
    visible_seconds: float = 0.0
    """Time the loop waited for that."""
    prefetches: int = 0
    failures: int = 0
    kv_given_up: int = 0
    """Times the requests of a model were preempted because their KV had to go and host memory was full."""
    weight_evictions: int = 0
    kv_evictions: int = 0
    """Of models with requests that had KV; what nothing refers to leaves without a copy and is not counted."""
