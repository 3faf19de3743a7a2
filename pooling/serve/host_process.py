# SPDX-License-Identifier: Apache-2.0
"""One engine host as a child process: started with the right thread binding, watched by its pid, called by socket."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager

from tokenpool.access_config import without_secrets
from tokenpool.errors import HostError
from tokenpool.host.guard import HostGuard
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.hosted_model import HostConfig
from tokenpool.serve.host_calls import call_beside

_START_LIMIT_S = 120.0


class HostProcess:
    """A running host; made by `start`, used on the event loop."""

    def __init__(self, process: asyncio.subprocess.Process, folder: str, key: bytes, name: str) -> None:
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
    async def start(cls, config: HostConfig, first_model: VllmConfig | None, *, name: str = "host") -> HostProcess:
        """Start a host; `first_model` decides the OpenMP binding, as it does for a vLLM worker.

        Raises HostError when the host ends before it answers.
        """
        folder = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
        key = secrets.token_bytes(32)
        with OMPProcessManager(first_model).configure_omp_envs(0, 0) if first_model else nullcontext():
            env = {**without_secrets(os.environ), "TOKENPOOL_CONTROL_KEY": key.hex()}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tokenpool.host",
            os.path.join(folder, "control"),
            json.dumps(asdict(config)),
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # signals of the terminal reach the frontend only
        )
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
