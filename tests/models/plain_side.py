# SPDX-License-Identifier: Apache-2.0
"""Runs kinds of model in plain vLLM, each in a process of its own, and notes what vLLM makes of them.

Nothing of tokenpool is imported here.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tests.helpers.plain import ENGINE_ARGS, Case, RequestSpec, Result, generate, prepare, use_plain_gemm
from tests.models.forks import serve_pieces

GAPS = (1, 2, 5, 11, 23)
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
    if piece["how"] == "alone":
        results: dict[str, Result] = {}
        for request in case.requests:
            results |= generate(llm, replace(case, requests=[request]))
    else:
        results = generate(llm, case)
    if piece["how"] == "staggered":
        results |= _differing(llm, case, results)
    return {"facts": facts, "results": {name: asdict(result) for name, result in results.items()}}


def _differing(llm: Any, case: Case, results: dict[str, Result]) -> dict[str, Result]:
    """What requests give that come later than others, where that is not what they gave when all came at once."""
    found: dict[str, Result] = {}
    for gap in GAPS:
        llm.reset_prefix_cache()
        for name, result in generate(llm, case, gap=gap).items():
            if (result.tokens, result.logprobs, result.embedding) != (
                results[name].tokens, results[name].logprobs, results[name].embedding,
            ):  # fmt: skip
                found[name] = result
    return found


def _facts(llm: Any) -> dict[str, Any]:
    """The class, what it can do, and the bytes of its weights, of a block, of the longest request, of seen images."""
    from vllm.model_executor.models.interfaces import supports_lora

    config, core = llm.llm_engine.vllm_config, llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    kv = core.scheduler.kv_cache_config
    kv_bytes = sum(tensor.size for tensor in kv.kv_cache_tensors)
    block_bytes = kv_bytes // kv.num_blocks if kv.num_blocks else 0
    longest, heard = config.model_config.max_model_len, core.scheduler.max_num_encoder_input_tokens
    blocks = sum(
        -(-(heard if "Cross" in type(group.kv_cache_spec).__name__ else longest) // group.kv_cache_spec.block_size)
        for group in kv.kv_cache_groups
    )
    layers = getattr(getattr(config.model_config.hf_config, "vision_config", None), "deepstack_visual_indexes", None)
    width = config.model_config.get_inputs_embeds_size() * (1 + len(layers or ()))
    outputs = core.scheduler.encoder_cache_manager.cache_size * width * config.model_config.dtype.itemsize
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
        "encoder_bytes": outputs,
    }


def _prepare() -> None:
    prepare(plain_gemm=False)
    from vllm import LLM

    assert LLM


if __name__ == "__main__":
    serve_pieces(_work, _prepare)
