# SPDX-License-Identifier: Apache-2.0
"""Kinds whose layers keep a state, and kinds that give vectors or scores in the place of text."""

from __future__ import annotations

from typing import Any

from tests.models.kind import Kind, pooling

_NO_PREFIX_CACHE = {"enable_prefix_caching": False}
_LINEAR: dict[str, Any] = {
    # vLLM's kernel for CPUs wants heads of 128.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_MAMBA1: dict[str, Any] = {"state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": 8}

STATES = {
    "mamba2": Kind("mamba2", demo="mamba2", args=_NO_PREFIX_CACHE),
    "granitemoehybrid": Kind("granite_hybrid", demo="granite_hybrid", args=_NO_PREFIX_CACHE),
    "nemotron_h": Kind("nemotron_h", demo="nemotron_h", args=_NO_PREFIX_CACHE),
    "falcon_h1": Kind("falcon_h1", demo="falcon_h1", args=_NO_PREFIX_CACHE),
    "qwen3_next": Kind("qwen3_next", demo="qwen3_next"),
    "zamba2": Kind(
        "Zamba2",
        {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "mamba_d_state": 32,
         "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 64, "num_mem_blocks": 1, "num_key_value_heads": 4,
         "attention_hidden_size": 256, "attention_head_dim": 64, "use_mem_rope": True, "adapter_rank": 8},
        without=("head_dim",), args=_NO_PREFIX_CACHE,
    ),
    "qwen3_5": Kind("Qwen3_5Text", _LINEAR),
    "qwen3_5_moe": Kind("Qwen3_5MoeText", {**_LINEAR, **_EXPERTS}),
    "lfm2": Kind("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
                          "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}, without=("head_dim",),
                 after={"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128, "block_ff_dim": 256}),
    "lfm2_moe": Kind("Lfm2Moe", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
                                 "conv_L_cache": 3, "num_experts": 4, "num_experts_per_tok": 2,
                                 "moe_intermediate_size": 64, "num_dense_layers": 1}, without=("head_dim",)),
    "mamba": Kind("Mamba", _MAMBA1, without=("head_dim", "num_attention_heads"), args=_NO_PREFIX_CACHE),
    "falcon_mamba": Kind("FalconMamba", _MAMBA1, without=("head_dim", "num_attention_heads"), args=_NO_PREFIX_CACHE),
    "jamba": Kind("Jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                            "mamba_d_state": 16, "use_mamba_kernels": False, "mamba_dt_rank": 8},
                  without=("head_dim",), args=_NO_PREFIX_CACHE),
    "bamba": Kind("Bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32,
                            "mamba_chunk_size": 64}, args=_NO_PREFIX_CACHE),
    "olmo_hybrid": Kind("OlmoHybrid", {"layer_types": ["linear_attention", "full_attention"],
                                       "linear_num_key_heads": 1, "linear_num_value_heads": 1,
                                       "linear_key_head_dim": 128, "linear_value_head_dim": 128}),
    "minimax": Kind("MiniMax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4,
                                "num_experts_per_tok": 2, "block_size": 64}),
}  # fmt: skip

_EMBED, _SCORE = "AutoModel", "AutoModelForSequenceClassification"
_LABELS = {"num_labels": 3}
_ONE_LABEL = {"num_labels": 1}
_ROBERTA: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 514, "type_vocab_size": 1}
_BERT: dict[str, Any] = {"max_position_embeddings": 512, "pad_token_id": 0}
_MODERN: dict[str, Any] = {"cls_token_id": 0, "sep_token_id": 1, "local_attention": 64, "global_attn_every_n_layers": 2,
                           "reference_compile": False}  # fmt: skip

_NO_GROUPS = ("head_dim", "num_key_value_heads")


_ABSOLUTE = {"position_embedding_type": "absolute"}
_NOMIC: dict[str, Any] = {
    "activation_function": "swiglu",
    **dict.fromkeys(("mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias", "rotary_emb_interleaved"), False),
    "rotary_emb_scale_base": None,
    "layer_norm_epsilon": 1e-12,
    "n_inner": 256,
    "n_embd": 128,
    "n_layer": 2,
}


def _encoder(config: str, task: str, auto: str, more: dict[str, Any] | None = None, **fields: Any) -> Kind:
    return pooling(config, task, auto, more, without=_NO_GROUPS, **fields)


POOLING = {
    "bert": _encoder("Bert", "embed", _EMBED, _BERT),
    "roberta": _encoder("Roberta", "embed", _EMBED, _ROBERTA),
    "xlm_roberta": _encoder("XLMRoberta", "embed", _EMBED, _ROBERTA, after=_ABSOLUTE),
    "modernbert": _encoder("ModernBert", "embed", _EMBED, _MODERN),
    "eurobert": pooling("EuroBert", "embed", _EMBED, {"mask_token_id": 2}),
    "gte": _encoder("Gte", "embed", _EMBED, after={"position_embedding_type": "rope"}),
    "nomic_bert": _encoder("NomicBert", "embed", _EMBED, after=_NOMIC),
    "qwen3_embed": Kind("embed", demo="embed", task="embed", args={"runner": "pooling"}),
    "llama_embed": pooling("Llama", "embed", _EMBED),
    "mistral_embed": pooling("Mistral", "embed", _EMBED),
    "qwen2_embed": pooling("Qwen2", "embed", _EMBED),
    "gemma3_embed": pooling("Gemma3Text", "embed", _EMBED, {"use_bidirectional_attention": True, "sliding_window": 64}),
    "bert_seqcls": _encoder("Bert", "classify", _SCORE, {**_BERT, **_LABELS}),
    "roberta_seqcls": _encoder("Roberta", "classify", _SCORE, {**_ROBERTA, **_LABELS}),
    "xlmr_seqcls": _encoder("XLMRoberta", "classify", _SCORE, {**_ROBERTA, **_ONE_LABEL}, after=_ABSOLUTE),
    "modernbert_seqcls": _encoder("ModernBert", "classify", _SCORE, {**_MODERN, **_LABELS}),
    "gpt2_seqcls": pooling("GPT2", "classify", _SCORE, {"n_positions": 2048, **_LABELS}, without=_NO_GROUPS),
    "llama_seqcls": pooling("Llama", "classify", _SCORE, _LABELS),
    "qwen2_seqcls": pooling("Qwen2", "classify", _SCORE, _LABELS),
    "qwen3_seqcls": pooling("Qwen3", "classify", _SCORE, _ONE_LABEL),
    "gemma_seqcls": pooling("Gemma2", "classify", _SCORE, {**_LABELS, "sliding_window": 64}),
    "bert_tokcls": _encoder("Bert", "token_classify", "AutoModelForTokenClassification", {**_BERT, **_LABELS}),
    "modernbert_tokcls": _encoder("ModernBert", "token_classify", "AutoModelForTokenClassification",
                                 {**_MODERN, **_LABELS}),
    "roberta_tokcls": _encoder("Roberta", "token_classify", "AutoModelForTokenClassification", {**_ROBERTA, **_LABELS}),
}  # fmt: skip
