# SPDX-License-Identifier: Apache-2.0
"""Calls to other processes of the pool from an event loop: on few threads of their own, each for a limited time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tokenpool.wire.control import call_host
from tokenpool.wire.messages import Address

_THREADS = ThreadPoolExecutor(32, thread_name_prefix="pool-call")
"""Not those of `asyncio.to_thread`: a process that does not answer must not hold up what else runs there."""


async def call_beside(address: Address, key: bytes, method: str, *args: Any, timeout_s: float | None = None) -> Any:
    """See call_host. A caller that is cancelled leaves a thread behind until the call's own limit."""
    call = partial(call_host, address, key, method, *args, timeout_s=timeout_s)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, call)
