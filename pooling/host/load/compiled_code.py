# SPDX-License-Identifier: Apache-2.0
"""Has the code of a model compiled in a process of its own before the model is built: the models that run go on.

A compilation takes seconds to a minute and cannot be split, and the build of a model shares its thread with the steps
of all others. What the process leaves in vLLM's cache folder is found by the build, which then compiles nothing. One
that dies, hangs or cannot start costs nothing else: the build compiles by itself.

Code is compiled for each rank of a tensor parallel group: each has other shards, and vLLM a cache for each. So there is
a process for each, and they meet in what they compute as the ranks of the host do; one that fails ends all.

Only on the CPU. On a GPU the process would need memory for the weights there a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from vllm import envs
from vllm.config import CompilationMode, VllmConfig
from vllm.config.utils import hash_factors
from vllm.platforms import current_platform

import tokenpool
from tokenpool.host.load.compile_child import BLOCK_FORMAT

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "tokenpool.host.load.compile_child")
LIMIT_S = 900.0
_LOOK_S = 0.05


class CompiledCode:
    """That of one model; made before its build, which changes the configuration. Used on one thread."""

    def __init__(self, name: str, config: VllmConfig, *, movable_weights: bool) -> None:
        self._name = name
        self._packed = b""
        self._num_ranks = config.parallel_config.world_size
        if config.compilation_config.mode in (None, CompilationMode.NONE) or not current_platform.is_cpu():
            return
        self._packed = pickle.dumps((config, movable_weights))
        facts = [hash_factors(envs.compile_factors()), config.compute_hash(), movable_weights, torch.__version__]
        key = hashlib.sha256(repr([*facts, tokenpool.__version__]).encode()).hexdigest()
        self._mark = Path(envs.VLLM_CACHE_ROOT, "tokenpool", "compiled", key)

    @property
    def is_missing(self) -> bool:
        """Whether the build would compile, as far as is known."""
        return bool(self._packed) and not self._mark.exists()

    def make_aside(
        self,
        command: Sequence[str] = COMMAND,
        limit_s: float = LIMIT_S,
        check: Callable[[int], None] = lambda block_bytes: None,
    ) -> bool:
        """Compile in another process if that is to be done; returns whether it is done. Blocks.

        `check` is told how large a KV block will be, before anything is compiled. What it raises ends the process, and
        is raised; nothing else is.
        """
        if not self.is_missing:
            return True
        start_s = time.monotonic()
        try:
            self._run(command, limit_s, check)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("compiled while it is built, not aside model=%s: %s", self._name, error)
            return False
        self.note_made()
        logger.info("compiled aside model=%s seconds=%.1f", self._name, time.monotonic() - start_s)
        return True

    def note_made(self) -> None:
        """The code is in the cache: a build has succeeded."""
        if self.is_missing:
            with contextlib.suppress(OSError):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()

    def _run(self, command: Sequence[str], limit_s: float, check: Callable[[int], None]) -> None:
        """Run a process for each rank to its end; raises OSError, SubprocessError and what `check` does.

        Then nothing is left of them.
        """
        processes: list[subprocess.Popen[bytes]] = []
        with tempfile.TemporaryDirectory(prefix="tokenpool-compile-") as folder:
            given = Path(folder, "model")
            given.write_bytes(self._packed)
            # vLLM names the ranks' shared memory after this file, which must be like no other on the machine.
            meet_at = f"file://{folder}/tokenpool-{secrets.token_hex(8)}"
            hearing, telling = os.pipe()
            os.set_blocking(hearing, False)  # to look at it without `select`, which takes no file number above 1023
            try:
                with open(hearing, "rb", buffering=0) as heard:
                    try:
                        for rank in range(self._num_ranks):
                            words = [*command, str(rank), meet_at, str(telling)]
                            with given.open("rb") as file:
                                processes.append(
                                    subprocess.Popen(words, stdin=file, pass_fds=(telling,), start_new_session=True)
                                )
                    finally:
                        os.close(telling)
                    _wait_for_all(processes, limit_s, heard, check)
            finally:
                for process in processes:
                    if process.poll() is None:  # it may wait for one that has ended
                        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
                        process.wait()


def _wait_for_all(
    processes: Sequence[subprocess.Popen[bytes]], limit_s: float, heard: IO[bytes], check: Callable[[int], None]
) -> None:
    """Until all have ended well; raises SubprocessError when one has not, or the time is over, and what `check` does.

    `heard` must not block. All ranks have blocks of one size: the first word of any of them is checked.
    """
    end_s, has_heard = time.monotonic() + limit_s, False
    while True:
        are_running = [process for process in processes if process.poll() is None]
        if not has_heard and (told := heard.read(BLOCK_FORMAT.size)):
            has_heard = True
            check(*BLOCK_FORMAT.unpack(told))
        for process in processes:
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args)
        if not are_running:
            return
        if time.monotonic() >= end_s:
            raise subprocess.TimeoutExpired(are_running[0].args, limit_s)
        time.sleep(_LOOK_S)
