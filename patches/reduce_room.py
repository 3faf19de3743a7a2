# SPDX-License-Identifier: Apache-2.0
"""Room for the CUDA graphs of many engines in vLLM's custom all-reduce, which has it for one.

Not yet run on hardware.
"""

from __future__ import annotations

from typing import Any

from tokenpool.patches.base import Patch, known

_PLACE_BYTES = 128
"""Of one call in one graph: the address of its input on each of up to 16 ranks (custom_all_reduce.py)."""
ROOM_BYTES = 64 << 20
"""On each GPU, eight times what vLLM has for the largest model with all its graphs."""
PLACES = ROOM_BYTES // _PLACE_BYTES


def _replacement(original: Any) -> Any:
    import torch

    def init_custom_ar(ipc_tensors: list[Any], rank_data: torch.Tensor, rank: int, fully_connected: bool) -> int:
        room = torch.empty(ROOM_BYTES, dtype=rank_data.dtype, device=rank_data.device)
        _kept.append(room)
        return int(original(ipc_tensors, room, rank, fully_connected))

    return init_custom_ar


_kept: list[Any] = []
"""The library has the address only; its caller keeps what it has passed itself."""

PATCH = Patch(
    name="reduce_room",
    target="vllm._custom_ops:init_custom_ar",
    hashes=known(
        v0_32_0="a37e4aea637118f29226a09215266cf5f2a4d05b00f7d013cb92868b74bf0a7c",
        v0_29_0="a37e4aea637118f29226a09215266cf5f2a4d05b00f7d013cb92868b74bf0a7c",
    ),
    reason=(
        "all engines of a process share one custom all-reduce, in which each call in each CUDA graph takes a place "
        "for good: with room for one model's, the capture of the one model too many fails"
    ),
    removal="vLLM takes the size from a setting, or gives places of graphs that are gone back",
    sites=("vllm._custom_ops:init_custom_ar",),
    replacement=_replacement,
)
