# SPDX-License-Identifier: Apache-2.0
"""One of several frontends as a process. It is forked from a process that has imported vLLM, so it is there at once."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import socket
from multiprocessing.context import ForkServerProcess

from tokenpool.serve.frontends.frontend_main import main
from tokenpool.serve.frontends.frontend_view import FrontendSettings

logger = logging.getLogger(__name__)


class FrontendProcess:
    """A running frontend; made by `start`, used on the event loop."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.sentinel, self._note_end)

    @classmethod
    async def start(cls, settings: FrontendSettings, sock: socket.socket) -> FrontendProcess:
        """Start a frontend that answers on `sock`; the first one waits for vLLM's import."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tokenpool.serve.frontends.frontend_main"])
        process = context.Process(target=main, args=(settings, sock), name=f"frontend-{settings.index}")
        await asyncio.to_thread(process.start)
        return cls(process)

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._ended.is_set()

    async def wait(self) -> int | None:
        """Wait until it ends; returns its exit status, negative for a signal."""
        await self._ended.wait()
        return self._process.exitcode

    async def stop(self, limit_s: float) -> None:
        """Let it finish, at most `limit_s`, then kill it."""
        if not self.ended:
            self._process.terminate()
        try:
            await asyncio.wait_for(self.wait(), limit_s)
        except TimeoutError:
            self._process.kill()
            await self.wait()

    def _note_end(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._ended.set()
