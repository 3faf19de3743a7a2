# SPDX-License-Identifier: Apache-2.0
"""Where a model is: one table of legal transitions for its weights and for its KV, checked on every change."""

from __future__ import annotations

from enum import StrEnum


class WeightState(StrEnum):
    """Where a model's weights are."""

    ON_DISK = "on disk"
    """Nowhere else than in the checkpoint."""
    READING = "reading"
    """Being read from disk into host memory."""
    IN_HOST = "in host memory"
    """A copy is there, and nothing on the device."""
    COPYING = "copying"
    """Pages are mapped on the device and being filled from host memory."""
    ON_DEVICE = "on device"
    """On the device; the host copy stays."""


class KVState(StrEnum):
    """Where the KV of a model's unfinished requests is."""

    IN = "in"
    """On the device; also a model that has none."""
    LEAVING = "leaving"
    """On its way to host memory: the model must not step."""
    OUT = "out"
    """In host memory; the model holds no slab."""
    RETURNING = "returning"
    """On its way back: requests whose blocks are there run."""


TRANSITIONS: dict[StrEnum, frozenset[StrEnum]] = {
    WeightState.ON_DISK: frozenset({WeightState.READING}),
    WeightState.READING: frozenset({WeightState.IN_HOST, WeightState.ON_DISK}),
    WeightState.IN_HOST: frozenset({WeightState.COPYING, WeightState.ON_DISK}),
    WeightState.COPYING: frozenset({WeightState.ON_DEVICE, WeightState.IN_HOST}),
    WeightState.ON_DEVICE: frozenset({WeightState.IN_HOST}),
    KVState.IN: frozenset({KVState.LEAVING}),
    KVState.LEAVING: frozenset({KVState.OUT}),
    KVState.OUT: frozenset({KVState.RETURNING}),
    KVState.RETURNING: frozenset({KVState.IN, KVState.OUT}),
}


def check_transition(old: StrEnum, new: StrEnum) -> None:
    """Raise AssertionError unless the table allows this change."""
    assert new in TRANSITIONS[old], f"illegal change from {old} to {new}"
