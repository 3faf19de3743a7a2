# SPDX-License-Identifier: Apache-2.0
"""Ways to reduce among the ranks of a tensor parallel group that a process has once: off, and refused if asked for.

Read in vLLM 0.32.0: the fused all-reduce of FlashInfer, which is on by default on Hopper and Blackwell, has one
workspace per process, of the size of its first model (flashinfer_all_reduce.py, `get_fi_ar_workspace`), and the
compiler pass of a model that is removed takes it from all others (allreduce_rms_fusion.py, `AllReduceFusionPass`). The
others, which environment variables ask for, are switched off where the ranks start (host/ranks/rank_devices.py).
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from tokenpool.errors import ModelRefusedError
from tokenpool.settings import ALLOCATOR, OFF_IN_GROUPS

_GROWING = "expandable_segments:True"


def keep_reduces_apart(name: str, args: Any) -> None:
    """Switch fused all-reduces off in the EngineArgs of a model on several GPUs, and no others.

    Raises ModelRefusedError where the user has asked for what several engines of one process cannot share.
    """
    if args.tensor_parallel_size == 1 or current_platform.is_cpu():
        return
    passes = args.compilation_config.pass_config
    if passes.fuse_allreduce_rms:
        raise ModelRefusedError(
            name,
            "fuse_allreduce_rms of --compilation-config, whose workspace a process has once",
            "remove it, or set it to false",
        )
    passes.fuse_allreduce_rms = False
    for variable in OFF_IN_GROUPS:
        if variable.get():
            feature = f"{variable.name}={variable.get():d} with tensor parallelism ({variable.text})"
            raise ModelRefusedError(name, feature, "unset it")
    if _GROWING in (ALLOCATOR.get() or "") and not args.disable_custom_all_reduce:
        raise ModelRefusedError(
            name,
            f"{ALLOCATOR.name}={_GROWING} with tensor parallelism: other ranks cannot open such memory of a CUDA graph",
            "unset it, or give --disable-custom-all-reduce for all models",
        )
