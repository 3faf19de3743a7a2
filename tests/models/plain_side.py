# SPDX-License-Identifier: Apache-2.0
"""Runs kinds of model in plain vLLM, each in a process of its own, and notes what vLLM makes of them.

Nothing of tokenpool is imported here.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tests.helpers.plain import ENGINE_ARGS, Case, RequestSpec, Result, generate, prepare, use_plain_gemm
from tests.models.forks import serve_pieces

GAP = 7
"""Steps between two requests where they are staggered: a prompt then shares a step with tokens of others."""


def case_of(fields: dict[str, Any]) -> Case:
    """A case that was written as JSON."""
    requests = [RequestSpec(**request) for request in fields["requests"]]
    return Case(fields["name"], fields["model"], fields["engine_args"], [_tuples(request) for request in requests])


def _tuples(request: RequestSpec) -> RequestSpec:
    return replace(request, media=(request.media[0], request.media[1])) if request.media else request


def _work(piece: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    if piece["plain_gemm"]:
        use_plain_gemm()
    case = case_of(piece["case"])
    llm = LLM(case.model, **ENGINE_ARGS | case.engine_args)
    facts = _facts(llm)
    how = piece.get("how", "alone" if piece.get("alone") else "batch")
    if how == "alone":
        results: dict[str, Result] = {}
        for request in case.requests:
            results |= generate(llm, replace(case, requests=[request]))
    else:
        results = generate(llm, case, gap=GAP if how == "staggered" else 0)
    return {"facts": facts, "results": {name: asdict(result) for name, result in results.items()}}


def _facts(llm: Any) -> dict[str, Any]:
    """The class, what it can do, and the bytes of its weights, of a block and of the longest request."""
    from vllm.model_executor.models.interfaces import supports_lora

    config, core = llm.llm_engine.vllm_config, llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    kv = core.scheduler.kv_cache_config
    kv_bytes = sum(tensor.size for tensor in kv.kv_cache_tensors)
    block_bytes = kv_bytes // kv.num_blocks if kv.num_blocks else 0
    blocks = sum(
        -(-config.model_config.max_model_len // group.kv_cache_spec.block_size) for group in kv.kv_cache_groups
    )
    return {
        "class": type(model).__name__,
        "lora": bool(supports_lora(model)),
        "prefix_cache": bool(config.cache_config.enable_prefix_caching),
        "multimodal": bool(config.model_config.is_multimodal_model),
        "quantised": config.model_config.quantization,
        "inner_state": bool(config.model_config.has_inner_state),
        "weight_bytes": sum(storages.values()),
        "block_bytes": block_bytes,
        "request_bytes": blocks * block_bytes,
    }


def _prepare() -> None:
    prepare(plain_gemm=False)
    from vllm import LLM

    assert LLM


if __name__ == "__main__":
    serve_pieces(_work, _prepare)
