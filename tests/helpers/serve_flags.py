# SPDX-License-Identifier: Apache-2.0
"""Every flag of `vllm serve`: what becomes of it in a pool, and a use of it that differs from its default."""

from __future__ import annotations

import argparse

from tokenpool.serve.launch.flag_table import PORT, REFUSED, TAKEN_OVER


def names(text: str) -> frozenset[str]:
    """Flags, written without their dashes."""
    return frozenset(f"--{name}" for name in text.split())


ENGINE = names("""
    additional-config aggregate-engine-logging all2all-backend allow-deprecated-quantization allowed-local-media-path
    allowed-media-domains async-scheduling attention-backend attention-config aux-output-config block-size
    code-revision collect-detailed-traces compilation-config config-format convert cp-kv-cache-interleave-size
    cudagraph-capture-sizes cudagraph-metrics custom-histogram-buckets
    dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size
    dcp-q-replicate default-mm-loras diffusion-config disable-cascade-attn disable-chunked-mm-input
    disable-hybrid-kv-cache-manager disable-log-stats disable-nccl-for-dp-synchronization
    disable-sliding-window download-dir dp-sync-interval dtype ec-manager-config enable-batch-sharded-sampling
    enable-chunked-prefill enable-dbo enable-ep-weight-filter enable-expert-parallel enable-flashinfer-autotune
    enable-hc-sp enable-layerwise-nvtx-tracing enable-log-requests enable-logging-iteration-details enable-lora
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-prefix-caching enable-prompt-embeds
    enable-return-routed-experts enable-tower-connector-lora enable-trace-replay enforce-eager engram-config
    expert-placement-strategy fail-on-environ-validation fully-sharded-loras gdn-prefill-backend generation-config
    hf-config-path hf-overrides hf-token ignore-patterns interleave-mm-strings io-processor-plugin ir-op-priority
    jit-monitor-mode jit-monitor-verbose kda-decode-backend kda-prefill-backend kernel-config kv-cache-dtype
    kv-cache-dtype-skip-layers kv-cache-metrics kv-cache-metrics-sample kv-events-config kv-sharing-fast-prefill
    language-model-only limit-mm-per-prompt linear-backend load-format logits-processors logprobs-mode
    long-prefill-token-threshold long-prefill-token-threshold-adaptive lora-dtype lora-target-modules mamba-backend
    mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype
    mamba-ssu-algorithm max-cpu-loras max-cudagraph-capture-size max-logprobs max-lora-cls-labels max-lora-rank
    max-loras max-model-len max-num-active-seqs max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
    max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers media-io-kwargs mm-device-do-normalize
    mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
    mm-encoder-fp8-scale-save-path mm-encoder-only mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb
    mm-processor-cache-gb mm-processor-device mm-processor-kwargs model model-class-overrides model-impl
    model-loader-extra-config moe-backend
    optimization-level otlp-traces-endpoint override-generation-config
    per-request-spec-decode-metrics performance-mode pooler-config prefill-schedule-interval
    prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit profiler-config pt-load-map-location
    quantization quantization-config reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers
    replayssm-buffer-len return-sampling-mask revision runner safetensors-load-strategy
    safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls scheduler-reserve-full-isl
    scheduling-policy seed served-model-name show-hidden-metrics-for-version skip-mm-profiling skip-tokenizer-init
    sparse-indexer-topk-backend spec-method spec-model spec-tokens specialize-active-lora speculative-config
    stream-interval structured-outputs-config swa-bounded-replay
    tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision tokens-only trust-remote-code ubatch-size
    use-fp64-gumbel use-replayssm use-tqdm-on-load video-pruning-method video-pruning-rate watermark watermark-config
    worker-extension-cls
""")
"""Flags that vLLM makes a part of the engine's config, and of the client's: each model has its own."""

APP = names("""
    anthropic-disabled-thinking-effort chat-template chat-template-content-format cohere-format
    cohere-is-reasoning-model default-chat-template-kwargs disable-fastapi-docs enable-auto-tool-choice
    enable-flash-late-interaction enable-force-include-usage enable-log-deltas enable-log-outputs enable-offline-docs
    enable-per-request-metrics enable-prompt-tokens-details enable-scale-out
    enable-server-load-tracking enable-tokenizer-info-endpoint exclude-tools-when-tool-choice-none fingerprint-mode
    fingerprint-value log-error-stack lora-modules max-log-len response-role return-tokens-as-token-ids
    sse-keep-alive-interval tool-call-parser tool-parser-plugin tool-server tool-strict-level
    trust-request-chat-template trust-request-mm-kwargs
""")
"""Flags of vLLM's app: each model has its own."""

TABLE: dict[str, frozenset[str]] = {
    "engine": ENGINE,
    "app": APP,
    "port": frozenset(PORT),
    "taken over": frozenset(TAKEN_OVER),
    "refused": frozenset(REFUSED),
}
"""What becomes of each flag, which is in exactly one of these; docs/flags.md tells of all but the first two."""

_USES: dict[str, str | None] = {
    "--additional-config": '{"a": 1}',
    "--allowed-local-media-path": "/tmp",
    "--attention-backend": "CPU_ATTN",
    "--attention-config": '{"flash_attn_version": 2}',
    "--aux-output-config": '{"max_bytes": 5}',
    "--chat-template": "{{ messages }}",
    "--compilation-config": '{"debug_dump_path": "/tmp"}',
    "--config-format": "hf",
    "--async-scheduling": None,
    "--enable-chunked-prefill": None,
    "--enable-prefix-caching": None,
    "--cudagraph-capture-sizes": "1",
    "--custom-histogram-buckets": '{"a": [1.0]}',
    "--default-mm-loras": '{"image": "org/a"}',
    "--ec-manager-config": '{"encoder_cache_manager_cls": "a.B"}',
    "--ec-transfer-config": '{"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}',
    "--eplb-config": '{"window_size": 5}',
    "--fault-tolerance-config": '{"engine_recovery_timeout_sec": 5}',
    "--generation-config": "vllm",
    "--hf-overrides": '{"rope_theta": 5.0}',
    "--ir-op-priority": '{"rms_norm": ["native"]}',
    "--kernel-config": '{"moe_backend": "triton"}',
    "--kv-events-config": '{"enable_kv_cache_events": true}',
    "--kv-transfer-config": '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
    "--limit-mm-per-prompt": '{"image": 1}',
    "--load-format": "dummy",
    "--logging-config": '{"log_level": "WARNING"}',
    "--log-level": "WARNING",
    "--lora-modules": "a=org/a",
    "--lora-target-modules": "q_proj",
    "--media-io-kwargs": '{"video": {"num_frames": 4}}',
    "--mm-encoder-attn-backend": "TORCH_SDPA",
    "--model-class-overrides": '{"LlamaForCausalLM": "vllm.model_executor.models.llama:LlamaForCausalLM"}',
    "--model-impl": "vllm",
    "--model-loader-extra-config": '{"enable_multithread_load": true}',
    "--optimization-level": "0",
    "--override-generation-config": '{"temperature": 0.5}',
    "--pooler-config": '{"use_activation": false}',
    "--profiler-config": '{"profiler": "torch", "torch_profiler_dir": "/tmp"}',
    "--quantization": "fp8",
    "--quantization-config": '{"linear": "fp8_per_tensor_dynamic"}',
    "--reasoning-config": '{"reasoning_start_str": "<a>", "reasoning_end_str": "</a>"}',
    "--reasoning-parser": "granite",
    "--speculative-config": '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}',
    "--structured-outputs-config": '{"backend": "guidance"}',
    "--tokenizer-mode": "slow",
    "--weight-transfer-config": '{"backend": "nccl"}',
    "--watermark-config": "{}",
}


BESIDE = {
    flag: ("--enable-lora",)
    for flag in names("""
        lora-dtype lora-target-modules max-cpu-loras max-lora-cls-labels max-lora-rank max-loras specialize-active-lora
        fully-sharded-loras enable-tower-connector-lora enable-mixed-moe-lora-format enable-moe-shared-loras
    """)
}
"""Flags without which others mean nothing."""


def first_name(action: argparse.Action) -> str | None:
    """The long name by which the table knows a flag; None for a positional."""
    return next((name for name in action.option_strings if name.startswith("--")), None)


def use_of(action: argparse.Action) -> tuple[str, ...]:
    """A use of the flag with a value that is not its default, by its declaration where no better one is known."""
    flag = first_name(action)
    assert flag is not None
    if value := _USES.get(flag):
        return flag, value
    if action.nargs == 0:
        return (f"--no-{flag[2:]}",) if action.default is True or flag in _USES else (flag,)
    if action.choices:
        return flag, [str(choice) for choice in action.choices if choice not in (action.default, None)][-1]
    if action.dest.endswith("_config") or isinstance(action.default, dict):
        return flag, "{}"
    if isinstance(action.default, int | float):
        return flag, str(type(action.default)(2))
    return flag, "2"
