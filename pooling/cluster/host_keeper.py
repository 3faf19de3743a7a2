# SPDX-License-Identifier: Apache-2.0
"""Has an actor for each host that is to be there, and gives back those that nobody needs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Set

from tokenpool.cluster.deciding.scaling import Scaling
from tokenpool.cluster.host_actors import HostActors
from tokenpool.cluster.pool_record import KEEP_LIMIT_S, KeptWriter, PoolStore
from tokenpool.errors import text_of
from tokenpool.host_kinds import Kind

logger = logging.getLogger(__name__)

_PERIOD_S = 5.0


class HostKeeper:
    """Lives on the controller's event loop; nothing is done that the next controller would not know of."""

    def __init__(
        self,
        hosts: HostActors,
        store: PoolStore,
        scaling: Scaling | None,
        seen: Set[str],
        on_ended: Callable[[str], None],
        writer: KeptWriter,
    ) -> None:
        """`scaling` says which hosts there are to be, None = always as many; `seen` are those that ever reported.

        `writer` has been given what is to be kept.
        """
        self._hosts = hosts
        self._store = store
        self._scaling = scaling
        self._seen = seen
        self._on_ended = on_ended
        self._writer = writer
        self._told: tuple[object, ...] = ()
        self._news = asyncio.Event()

    def tell(self) -> None:
        """Something was decided, perhaps of hosts."""
        if self._scaling is not None and self._scaling.kept != self._told:
            self._told = self._scaling.kept
            self._news.set()

    async def run(self, is_ending: Callable[[], bool]) -> None:
        """Until the pool ends."""
        while not is_ending():
            self._news.clear()
            scaling = self._scaling
            if await self._writer.written(KEEP_LIMIT_S) or scaling is None:
                wanted = None if scaling is None else {host: scaling.kind(host) for host in scaling.wanted}
                await asyncio.gather(self._start(wanted), *(self._give_back(host) for host in self._to_end()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_S):
                    await self._news.wait()

    def _to_end(self) -> list[str]:
        return [] if self._scaling is None else sorted(self._scaling.ending)

    async def _start(self, wanted: Mapping[str, Kind] | None) -> None:
        try:
            await asyncio.to_thread(self._hosts.start_missing, wanted)
        except Exception as error:  # such as Ray's head that is away
            logger.warning("hosts not looked for: %s", text_of(error)[:200])

    async def _give_back(self, host: str) -> None:
        try:
            await self._hosts.give_back(host, has_reported=host in self._seen)
            await asyncio.to_thread(self._store.forget_host, host)
        except Exception:  # it is tried again
            logger.exception("host not given back host=%s", host)
            return
        self._on_ended(host)
