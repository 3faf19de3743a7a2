# SPDX-License-Identifier: Apache-2.0
"""Puts single models to sleep: they take no turn, and from level 1 on they leave the device; requests wait for them.

| level | what leaves |
|---|---|
| 0 | nothing; it stays on the device until another model needs the room |
| 1 | weights, of which the host has a copy; KV of its requests goes to host memory |
| 2 | the same; the host's copy of the weights goes too, if the checkpoint can be read again |

KV of unfinished requests is kept on every level, and they go on when the model wakes up.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from tokenpool.errors import ConfigError, PoolError
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.room_maker import RoomMaker
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.weights import WeightStore

logger = logging.getLogger(__name__)

LET_GO_S = 0.5
"""How long the loop waits for a copy that is cancelled: a disk that gives no answer never lets go."""


class Sleepers:
    """Called on the host loop's thread only."""

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        room: RoomMaker,
        weights: WeightStore,
        notify: Callable[[str], None],
    ) -> None:
        self._models = models
        self._room = room
        self._weights = weights
        self._notify = notify

    def sleep(self, name: str, level: int = 1, mode: str = "keep") -> bool:
        """Put a model to sleep; False if running requests have to end first, with mode `wait`: call it again.

        Mode `abort` ends its requests. Raises KeyError for an unknown model, PoolError when it cannot leave: it is
        awake then.
        """
        hosted = self._models[name]
        if level and name not in self._weights:
            raise ConfigError(
                f"model {name!r} cannot leave the device: its pool has weights: fixed. Set weights: movable, or sleep "
                "with level=0"
            )
        hosted.core._process_input_queue()
        hosted.admits = mode != "wait"
        if mode == "abort":
            hosted.core.abort_all()
        elif mode == "wait" and hosted.core.scheduler.running:
            return False
        hosted.admits = True
        before, hosted.asleep = hosted.asleep, level
        if level:
            try:
                self._room.leave(hosted)
            except PoolError:
                hosted.asleep = before
                raise
        if level == 2:
            self._drop_host_copy(name)
        self._room.changed()
        self._notify(name)
        logger.info("model sleeps model=%s level=%d", name, level)
        return True

    def wake(self, name: str) -> None:
        """Let a model take turns again; without effect if it is awake. Raises KeyError."""
        hosted = self._models[name]
        hosted.admits, hosted.asleep = True, None
        self._room.changed()
        self._notify(name)
        logger.info("model awake model=%s", name)

    def _drop_host_copy(self, name: str) -> None:
        is_there = self._weights.host.held(name, HostUse.WEIGHTS) >= self._weights.bytes_of(name)
        if is_there and self._weights.stop_job(name, LET_GO_S):
            with contextlib.suppress(PoolError):  # it cannot be read again: the copy stays
                self._weights.drop_host(name)
