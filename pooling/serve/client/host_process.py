# SPDX-License-Identifier: Apache-2.0
"""One engine host as a child process: started with the right thread binding, watched by its pid, called by socket."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager

from tokenpool import settings
from tokenpool.errors import HostError
from tokenpool.process.forked_child import ForkedChild, WatchedChild
from tokenpool.process.guard import HostGuard
from tokenpool.process.template import Template
from tokenpool.serve.client.host_calls import call_beside
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.spec import HostConfig

logger = logging.getLogger(__name__)

_START_LIMIT_S = 120.0


class _Child(Protocol):
    """What is needed of `asyncio.subprocess.Process`."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class HostProcess:
    """A running host; made by `start`, used on the event loop."""

    def __init__(self, process: _Child, folder: str, key: bytes, name: str) -> None:
        self.name = name
        """What frontends call the host; one that takes the place of a dead one has its name."""
        self._process = process
        self._folder = folder
        self.key = key
        """Of the socket for calls."""
        self.guard: HostGuard | None = None
        """Kills a host that hangs, which `wait` returns from then; there once it listens."""
        self._next_endpoint = 0

    @classmethod
    async def start(
        cls,
        config: HostConfig,
        first_model: VllmConfig | None,
        *,
        name: str = "host",
        template: Template | None = None,
    ) -> HostProcess:
        """Start a host; `first_model` decides the OpenMP binding, as it does for a vLLM worker.

        It is forked from `template` if that can be. Raises HostError when the host ends before it answers.
        """
        folder = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
        key = secrets.token_bytes(32)
        env = _environment_for(first_model)
        own = {settings.CONTROL_KEY.name: key.hex()}
        words = [os.path.join(folder, "control"), json.dumps(asdict(config))]
        began_s, process = time.monotonic(), await _fork(template, words, env, own) if template else None
        if process is not None:
            logger.info("engine host forked from the template pid=%d ms=%.0f", process.pid,
                        1000 * (time.monotonic() - began_s))  # fmt: skip
        else:
            process = await _spawn(words, {**env, **own})
        host = cls(process, folder, key, name)
        try:
            await asyncio.wait_for(host._wait_until_listening(), _START_LIMIT_S)
        except BaseException:
            await host.kill()
            raise
        host.guard = HostGuard.of(name, host.pid, host.control_path, key, asdict(config))
        return host

    @property
    def pid(self) -> int:
        """Process id of the host."""
        return self._process.pid

    @property
    def control_path(self) -> str:
        """Path of the Unix socket for calls."""
        return os.path.join(self._folder, "control")

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.returncode is not None

    async def wait(self) -> int:
        """Wait until the host ends; returns its exit status, negative for a signal."""
        status = await self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return status

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call the host; raises what the call raises, or HostError when the host is gone or late."""
        return await call_beside(self.control_path, self.key, method, *args, timeout_s=timeout_s)

    def new_addresses(self) -> EngineAddresses:
        """Endpoints for one more engine with one frontend."""
        self._next_endpoint += 1
        base = f"ipc://{self._folder}/{self._next_endpoint}"
        return EngineAddresses((f"{base}.in",), (f"{base}.out",))

    async def stop(self, limit_s: float) -> None:
        """Ask the host to finish and wait for it, at most `limit_s`, then kill it."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            await asyncio.wait_for(self.wait(), limit_s)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End the host at once."""
        if self._process.returncode is None:
            self._process.kill()
        await self.wait()

    async def _wait_until_listening(self) -> None:
        while not os.path.exists(self.control_path):
            if self._process.returncode is not None:
                raise HostError(f"the engine host ended with status {self._process.returncode} while starting")
            await asyncio.sleep(0.02)


def begin_template(template: Template, first_model: VllmConfig) -> None:
    """Have the template import while models are planned, for hosts whose first model this is."""
    template.begin(_environment_for(first_model), (settings.CONTROL_KEY.name,))


def _environment_for(first_model: VllmConfig | None) -> dict[str, str]:
    with OMPProcessManager(first_model).configure_omp_envs(0, 0) if first_model else nullcontext():
        return settings.environment_of_hosts()


async def _spawn(words: list[str], env: dict[str, str]) -> _Child:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tokenpool.host",
        *words,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # signals of the terminal reach the frontend only
    )


async def _fork(template: Template, words: list[str], env: dict[str, str], own: dict[str, str]) -> _Child | None:
    forking = asyncio.ensure_future(asyncio.to_thread(template.fork, words, env, own))
    try:
        child = await asyncio.shield(forking)
    except asyncio.CancelledError:
        forking.add_done_callback(_end_unwanted)
        raise
    return WatchedChild(child) if child is not None else None


def _end_unwanted(forking: asyncio.Future[ForkedChild | None]) -> None:
    """End a host that came when nobody waited for it any more."""
    if not forking.cancelled() and forking.exception() is None and (child := forking.result()) is not None:
        child.kill()
        child.wait()
