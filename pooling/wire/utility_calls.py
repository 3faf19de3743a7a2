# SPDX-License-Identifier: Apache-2.0
"""Utility calls of vLLM's engine protocol: which an engine of a pool answers, when, and how it refuses.

Made for requests, they wait for their model as requests do. Made for an operator, they get an answer: the model comes
onto the device for them, or they are refused with the reason why it does not.
"""

from __future__ import annotations

NEED_NO_WEIGHTS = frozenset({
    "get_supported_tasks", "get_weight_version", "is_scheduler_paused", "is_sleeping", "list_loras", "reset_mm_cache",
    "resume_scheduler", "set_weight_version",
})  # fmt: skip
"""Answered although the model is not on the device."""
FOR_REQUESTS = frozenset({"add_lora", "export_kv", "import_kv", "pin_lora", "remove_lora"})
REPEATED = NEED_NO_WEIGHTS | FOR_REQUESTS
"""Made again on the next host when one dies before it has answered."""
_HARMLESS_RPC = frozenset({
    "check_health", "compute_weight_checksums", "get_compilation_match_table", "get_encoder_timing_stats",
    "get_model_inspection", "get_supported_tasks", "list_loras", "supports_draft_weight_updates", "synchronize_device",
})  # fmt: skip
_REFUSED = "refused by the pool: "


def rpc_problem(method: object, extension: type | None) -> str:
    """Why `collective_rpc` may not call a method of the worker; empty if it may.

    The others would move weights or KV beside the books of the pool. Those of a `--worker-extension-cls` are its own.
    """
    own = isinstance(method, str) and not method.startswith("_") and hasattr(extension, method)
    if own or (isinstance(method, str) and method in _HARMLESS_RPC):
        return ""
    return (
        f"collective_rpc calls only {', '.join(sorted(_HARMLESS_RPC))} and the methods of the model's "
        "--worker-extension-cls: others could put the books of the pool's memory wrong"
    )


def refusal(reason: str) -> str:
    """What an engine sends in place of an answer."""
    return _REFUSED + reason


def reason_of(failure: str) -> str:
    """The reason of a refusal; empty if a call has failed otherwise."""
    return failure.removeprefix(_REFUSED) if failure.startswith(_REFUSED) else ""
