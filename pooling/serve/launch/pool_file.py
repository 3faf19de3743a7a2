# SPDX-License-Identifier: Apache-2.0
"""Follows the pool file of a running cluster: models that are added, changed or removed there come and go."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from typing import Protocol

from tokenpool.config import ModelSpec, PoolConfig, load_pool_file
from tokenpool.errors import PoolError

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_DRAIN_S = 60.0


class Pool(Protocol):
    """What is changed."""

    async def add_model(self, spec: ModelSpec) -> object:
        """Load a model; raises PoolError."""
        ...

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Drain and unload a model; raises PoolError, KeyError if it is not there."""
        ...


async def follow_pool_file(path: str, pool: Pool) -> None:
    """Look at the file every second and carry out what changed, until cancelled.

    A file that is wrong changes nothing and is logged. What was added or removed through the admin API stays so unless
    the file's entry for it changes. Settings other than the models need a restart.
    """
    known, stamp = await asyncio.to_thread(load_pool_file, path), _stamp(path)
    while True:
        await asyncio.sleep(_LOOK_S)
        if (now := _stamp(path)) == stamp:
            continue
        stamp = now
        try:
            wanted = await asyncio.to_thread(load_pool_file, path)
        except (PoolError, OSError, ValueError) as error:  # also one that cannot be read, or is no text
            logger.error("pool file not taken: %s", error)
            continue
        await apply_changes(known, wanted, pool)
        known = wanted


async def apply_changes(known: PoolConfig, wanted: PoolConfig, pool: Pool) -> None:
    """Remove and add models so that `wanted` holds; what fails is logged and the rest is done."""
    if replace(known, models=wanted.models) != wanted:
        logger.warning("pool file: only changes of `models` are taken while the pool runs; restart for the others")
    before, after = ({spec.name: spec for spec in config.models} for config in (known, wanted))
    for name in [name for name, spec in before.items() if after.get(name) != spec]:
        try:
            await pool.remove_model(name, _DRAIN_S)
        except KeyError:
            logger.info("pool file: model is gone already model=%s", name)
        except Exception as error:  # whatever it is, the rest of the file counts
            logger.error("pool file: model not removed model=%s: %s", name, error, exc_info=_unless_known(error))
    for name in [name for name, spec in after.items() if before.get(name) != spec]:
        try:
            await pool.add_model(after[name])
            logger.info("pool file: model added model=%s", name)
        except Exception as error:  # as above
            logger.error("pool file: model not added model=%s: %s", name, error, exc_info=_unless_known(error))


def _unless_known(error: Exception) -> Exception | None:
    """An error whose words do not say it all."""
    return None if isinstance(error, PoolError) else error


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # such as between the two halves of a save
    return status.st_mtime_ns, status.st_ino
