# SPDX-License-Identifier: Apache-2.0
"""The expert-parallel group of a process whose first model had no experts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import parallel_state


def ensure_expert_group(worker: Any) -> None:
    """Make the group that a mixture of experts needs, if the model of `worker` is one and there is none.

    vLLM makes it together with the other groups, and only for a mixture of experts: when the first model of the
    process was dense, the first MoE model finds the groups made and this one missing (parallel_state.py,
    `initialize_model_parallel` and `ensure_model_parallel_initialized`).
    """
    if worker.model_config.is_moe and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [world.ranks],
            world.local_rank,
            torch.distributed.get_backend(world.device_group),
            group_name="ep",
            use_all2all=worker.parallel_config.use_all2all,
        )
