# SPDX-License-Identifier: Apache-2.0
"""Whether Ray's head answers. Requests need it not; hosts, servers and models that come and go do.

It is looked at on a thread of its own, so that a head that hangs, or a look that never returns, holds nobody up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from tokenpool.metric_registry import metric

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
LOOK_LIMIT_S = 2.0
AWAY_AFTER_S = 5.0
"""Without an answer for so long the head counts as away; on a busy machine it answers late."""
_UP = metric("cluster_head_up").make()


class HeadWatch:
    """Looks, and says what it saw; `judge` and `told` are for the event loop."""

    def __init__(
        self, look: Callable[[float], object], *, period_s: float = LOOK_PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`look` returns if the head answers within so many seconds, and raises if not; it is called on a thread."""
        self._look, self._period_s, self._clock = look, period_s, clock
        self._num_answers = 0
        self._answered_s = self._judged_s = clock()
        self._num_seen, self._silent_s = 0, 0.0
        self.is_up = True
        """Whether it answers, as far as was judged; the server has come in by it."""

    async def follow(self) -> None:
        """Look and judge until this is cancelled."""
        stopping = threading.Event()
        threading.Thread(target=self._look_on, args=(stopping,), name="head-watch", daemon=True).start()
        _UP.set(self.is_up)
        try:
            while True:
                await asyncio.sleep(self._period_s)
                self.judge()
        finally:
            stopping.set()

    def _look_on(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self._look(LOOK_LIMIT_S)
            except Exception as error:  # Ray raises many kinds
                logger.debug("Ray's head does not answer: %s", error)
            else:
                self.answered()
            stopping.wait(self._period_s)

    def answered(self) -> None:
        """The head has answered."""
        self._answered_s = self._clock()
        self._num_answers += 1

    def judge(self) -> None:
        """Decide whether the head is up; the log has a line when that changes.

        Time in which this was not called counts little: this process may have been stopped, and not the head.
        """
        now_s = self._clock()
        self._silent_s += min(now_s - self._judged_s, 2 * self._period_s)
        self._judged_s = now_s
        if self._num_answers != self._num_seen:
            self._num_seen, self._silent_s = self._num_answers, 0.0
        is_up = self._silent_s <= AWAY_AFTER_S
        if is_up == self.is_up:
            return
        self.is_up = is_up
        _UP.set(is_up)
        if is_up:
            logger.warning("Ray's head answers again")
        else:
            logger.warning(
                "Ray's head has not answered for %.0f s: requests go on; a host, server or controller that ends is not "
                "replaced, and each of Ray's processes ends after RAY_gcs_rpc_server_reconnect_timeout_s without it",
                now_s - self._answered_s,
            )

    def told(self) -> dict[str, Any]:
        """The part of `/v1/pool/state` about it: `up`, and `away_s`, seconds since its last answer while it is away."""
        return {"up": self.is_up, "away_s": 0.0 if self.is_up else round(self._clock() - self._answered_s, 1)}
