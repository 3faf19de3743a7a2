# SPDX-License-Identifier: Apache-2.0
"""vLLM's routes for development, which VLLM_SERVER_DEV_MODE=1 opens: who answers each, and why some are refused.

They stop, change and look into whole models. So they need an admin key, like the pool's own routes, and what would put
the books of the pool's memory wrong is refused by name. Imports no vLLM: a test compares the lists with its routes.
"""

from __future__ import annotations

from collections.abc import Mapping

SLEEP_PATHS = frozenset({"/sleep", "/wake_up", "/is_sleeping"})
"""Answered by the pool."""
SERVED_PATHS = frozenset({
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc", "/server_info",
    "/pause", "/resume", "/is_paused", "/abort_requests", "/update_weight_version", "/weight_info", "/weight_checker",
    "/get_world_size",
})  # fmt: skip
"""Answered by vLLM's app of the model."""
_TRANSFER = (
    "A pool takes no weights from a trainer: they would be lost when the model leaves the device. Write a checkpoint, "
    "remove the model and add it again."
)
REFUSED_PATHS: Mapping[str, str] = {
    "/release_kv_cache_memory": (
        "The models of a pool share the memory of their KV: lend it with POST /v1/pool/budget, or let the model leave "
        "the device with POST /sleep."
    ),
    **dict.fromkeys(
        ("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update",
         "/start_draft_weight_update", "/update_weights", "/finish_weight_update"), _TRANSFER,
    ),
}  # fmt: skip
"""Path -> why it is refused, and what to do."""
DEV_PATHS = SLEEP_PATHS | SERVED_PATHS | REFUSED_PATHS.keys()


def dev_path_of(path: str) -> str:
    """Which of `DEV_PATHS` a route path is, or may be for a model that the path names; empty if none."""
    if path in DEV_PATHS:
        return path
    fits = (known for known in DEV_PATHS if path.endswith(known)) if path.startswith("/models/") else ()
    return max(fits, key=len, default="")
