# SPDX-License-Identifier: Apache-2.0
"""Follows the pool file of a pool with several servers: the eldest does it, and the next one when it is gone."""

from __future__ import annotations

import asyncio
import pickle

from tokenpool.cluster.pool_record import unpack
from tokenpool.config import ModelSpec
from tokenpool.serve.clustered.ray_hosts import RayHosts
from tokenpool.serve.launch.pool_file import Pool, PoolFile

_LOOK_S = 1.0


class EldestFile:
    """See the module. What the file asked for last is kept with the pool, so that nothing is done twice or left out."""

    def __init__(self, path: str, pool: Pool, hosts: RayHosts) -> None:
        self._path = path
        self._pool = pool
        self._hosts = hosts

    async def follow(self) -> None:
        """Look at the file every second while this server is the eldest, until cancelled."""
        while True:
            if self._hosts.is_eldest:
                await self._lead()
            await asyncio.sleep(_LOOK_S)

    async def _lead(self) -> None:
        told = (await self._hosts.tell("standing")).record.file_models
        running: tuple[ModelSpec, ...] = unpack(told)
        file = PoolFile(self._path, self._pool, running)
        done = file.done
        while self._hosts.is_eldest:
            await file.look()
            if file.done != done:
                await self._hosts.tell_as_this("note_file", pickle.dumps(file.done))
                done = file.done
            await asyncio.sleep(_LOOK_S)
