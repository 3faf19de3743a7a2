# SPDX-License-Identifier: Apache-2.0
"""Has the code of a model compiled in a process of its own before the model is built: the models that run go on.

A compilation takes seconds to a minute and cannot be split, and the build of a model shares its thread with the steps
of all others. What the process leaves in vLLM's cache folder is found by the build, which then compiles nothing. One
that dies, hangs or cannot start costs nothing else: the build compiles by itself.

Only on the CPU. On a GPU the process would need memory for the weights there a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import select
import signal
import struct
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

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "tokenpool.host.load.compile_child")
LIMIT_S = 900.0
BLOCK_FORMAT = struct.Struct("<Q")
"""As the process tells how many bytes a KV block has, before it compiles anything."""
_LOOK_S = 0.05


class CompiledCode:
    """That of one model; made before its build, which changes the configuration. Used on one thread."""

    def __init__(self, name: str, config: VllmConfig, *, movable_weights: bool) -> None:
        self._name = name
        self._packed = b""
        mode, ranks = config.compilation_config.mode, config.parallel_config.world_size
        if mode in (None, CompilationMode.NONE) or not current_platform.is_cpu() or ranks > 1:
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
        """Run the process to its end; raises OSError, SubprocessError and what `check` does, and then it is gone."""
        deadline_s = time.monotonic() + limit_s
        hearing, telling = os.pipe()
        with open(hearing, "rb", buffering=0) as heard, tempfile.TemporaryFile() as given:
            given.write(self._packed)
            given.seek(0)
            try:
                words = [*command, str(telling)]
                process = subprocess.Popen(words, stdin=given, pass_fds=(telling,), start_new_session=True)
            finally:
                os.close(telling)
            with process:
                try:
                    while process.poll() is None and not _is_readable(heard, _LOOK_S):
                        if time.monotonic() > deadline_s:
                            raise subprocess.TimeoutExpired(command, limit_s)
                    if _is_readable(heard, 0) and (told := heard.read(BLOCK_FORMAT.size)):
                        check(*BLOCK_FORMAT.unpack(told))
                    process.wait(max(0.0, deadline_s - time.monotonic()))
                except BaseException:
                    if process.poll() is None:  # else another one may have its number
                        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
                    raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def _is_readable(file: IO[bytes], limit_s: float) -> bool:
    return bool(select.select([file], [], [], limit_s)[0])
