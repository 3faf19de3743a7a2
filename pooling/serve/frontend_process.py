# SPDX-License-Identifier: Apache-2.0
"""One of several frontends as a process. It is forked from a process that has imported vLLM, so it is there at once."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess

from tokenpool.config import PoolConfig
from tokenpool.logs import log_to_stderr
from tokenpool.serve.launch_plan import ModelPlan

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """What a frontend is given; the same for all but for the index."""

    index: int
    config: PoolConfig
    plans: list[ModelPlan]
    """Those of the start; what is served now the supervisor tells."""
    folder: str
    """Where the supervisor's socket, the table of limits and the frontends' sockets lie."""
    key: bytes = field(repr=False)
    """Of the sockets for calls."""
    address: str = ""
    """Of this node in a cluster; empty without one."""

    @property
    def supervisor(self) -> str:
        """The supervisor's socket."""
        return os.path.join(self.folder, "supervisor")

    def own_socket(self, pid: int) -> str:
        """The socket at which the frontend with this pid answers."""
        return os.path.join(self.folder, f"frontend-{pid}")

    @property
    def limits(self) -> str:
        """The table of the tenants' limits."""
        return os.path.join(self.folder, "limits")


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
        context.set_forkserver_preload(["tokenpool.serve.cluster_frontend"])
        process = context.Process(target=_main, args=(settings, sock), name=f"frontend-{settings.index}")
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


def _main(settings: FrontendSettings, sock: socket.socket) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # its parent ends with the supervisor
    log_to_stderr()
    if settings.index:  # what is told of all models is told once
        logging.getLogger("tokenpool.serve.host_watch").setLevel(logging.WARNING)
    from tokenpool.patches import apply_all
    from tokenpool.serve.cluster_frontend import ClusterFrontend
    from tokenpool.serve.frontend_server import FrontendServer
    from tokenpool.serve.run import run

    apply_all()
    status, kind = 1, ClusterFrontend if settings.address else FrontendServer
    try:
        run(settings.config, settings.plans, lambda outer: kind(settings, outer), sock, announce=False)
        status = 0
    except Exception:
        logger.exception("frontend ends index=%d", settings.index)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
