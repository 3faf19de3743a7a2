# SPDX-License-Identifier: Apache-2.0
"""Matrix tiles of CPUs with AMX, which Linux gives a process only when it asks."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def ask_for_tiles() -> None:
    """Let this process, its threads and its forks use AMX, where the CPU has it; to be called before the first step.

    vLLM 0.32 looks only at what the CPU can do. Its kernels for attention and experts then end the process with an
    illegal instruction, unless a library, such as oneDNN, has asked before.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        logger.error(
            "this CPU has AMX and the kernel or a sandbox refuses it: bfloat16 models will end their host "
            "with an illegal instruction; hide AMX from this machine or serve them with --dtype float32"
        )
