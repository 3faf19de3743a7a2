# SPDX-License-Identifier: Apache-2.0
"""Kinds that generate text from text, with attention in all layers."""

from __future__ import annotations

from typing import Any

from tests.models.kind import Kind
from tokenpool.demo.tiny_files import MAX_POSITION

SLIDING, FULL = "sliding_attention", "full_attention"
_FEW_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MULTIPLIERS: dict[str, float] = {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 4.0}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_POSITION // 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
MLA: dict[str, Any] = {
    # vLLM's kernel for CPUs is built for the latent size 512 + 64, and rotates plain rope wrongly.
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_parameters": _YARN,
}
_DEEPSEEK: dict[str, Any] = {**MLA, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
_DEEPSEEK |= {"topk_group": 1}
_CPU_MLA = {"block_size": 16, "attention_backend": "CPU_MLA"}
"""With AMX, vLLM would take AMX_MLA, which a pool refuses."""
_NO_HEAD_DIM = ("head_dim",)
_NO_GROUPS = ("head_dim", "num_key_value_heads")
"""Of those that have a key and a value for each head: vLLM believes any config that has the field."""

DEMO = {
    name: Kind(name, demo=name, args=_CPU_MLA if name == "deepseek_v2" else {})
    for name in ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "deepseek_v2")
}

DENSE = {
    "apertus": Kind("Apertus"),
    "arcee": Kind("Arcee"),
    "bitnet": Kind("BitNet"),
    "bloom": Kind(
        "Bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 128, "tie_word_embeddings": True}, without=_NO_GROUPS,
        factors={"dense_4h_to_h.weight": 16.0, "self_attention.dense.weight": 16.0, "query_key_value.weight": 4.0},
    ),
    "cohere": Kind("Cohere", {"logit_scale": 1.0}),
    "cohere2": Kind("Cohere2", {"logit_scale": 1.0, "sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "cwm": Kind("Cwm", {"sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "ernie4_5": Kind("Ernie4_5"),
    "exaone4": Kind("Exaone4", {"sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "falcon": Kind("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, without=_NO_HEAD_DIM),
    "falcon_alibi": Kind("Falcon", {"alibi": True, "multi_query": False, "bias": True}, without=_NO_HEAD_DIM),
    "gemma": Kind("Gemma", {"tie_word_embeddings": True}, factors={"embed_tokens.weight": 0.25}),
    "gemma2": Kind(
        "Gemma2", {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 32},
        factors={"q_proj.weight": 4.0},
    ),
    "gemma3n": Kind(
        "Gemma3nText",
        {
            "tie_word_embeddings": True, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "sliding_window": 64, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2, "laurel_rank": 16, "altup_num_inputs": 2, "intermediate_size": [256] * 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        factors={"embed_tokens.weight": 0.3},
    ),
    "gemma4": Kind(
        "Gemma4Text",
        {
            "tie_word_embeddings": True, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "sliding_window": 64, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 0, "global_head_dim": 32,
        },
        factors={"embed_tokens.weight": 0.3},
    ),
    "glm": Kind("Glm"),
    "glm4": Kind("Glm4"),
    "gpt2": Kind(
        "GPT2", {"n_positions": 2048, "tie_word_embeddings": True}, without=_NO_GROUPS,
        factors={"c_proj.weight": 8.0},
    ),
    "gpt_bigcode": Kind(
        "GPTBigCode", {"n_positions": 2048, "tie_word_embeddings": True}, without=_NO_GROUPS,
        factors={"c_proj.weight": 8.0},
    ),
    "gpt_neox": Kind(
        "GPTNeoX", without=_NO_GROUPS,
        factors={"query_key_value.weight": 4.0, "dense.weight": 4.0, "dense_4h_to_h.weight": 4.0},
    ),
    "gptj": Kind("GPTJ", {"rotary_dim": 16, "n_positions": 2048}, without=_NO_GROUPS),
    "granite": Kind("Granite", _MULTIPLIERS),
    "granite_swa": Kind("GraniteSWA", {**_MULTIPLIERS, "sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "helium": Kind("Helium"),
    "hunyuan_v1_dense": Kind("HunYuanDenseV1"),
    "hyperclovax": Kind("HyperCLOVAX"),
    "jais2": Kind("Jais2"),
    "minicpm3": Kind("MiniCPM3", {**MLA, "q_lora_rank": 64, "scale_emb": 1, "dim_model_base": 128, "scale_depth": 1.4}),
    "ministral": Kind("Ministral", {"sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "ministral3": Kind("Ministral3"),
    "mistral": Kind("Mistral", {"sliding_window": 64}),
    "modernbert_decoder": Kind("ModernBertDecoder", {"local_attention": 64}, without=_NO_GROUPS),
    "nanochat": Kind("NanoChat", factors={"q_proj.weight": 4.0}),
    "nemotron": Kind("Nemotron"),
    "olmo": Kind("Olmo"),
    "olmo2": Kind("Olmo2"),
    "olmo3": Kind("Olmo3", {"sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "opt": Kind("OPT", {"ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.12}, without=_NO_GROUPS),
    "persimmon": Kind("Persimmon", without=_NO_GROUPS),
    "phi": Kind("Phi", without=_NO_HEAD_DIM, factors={"q_proj.weight": 4.0}),
    "phi3": Kind("Phi3", without=_NO_HEAD_DIM),
    "seed_oss": Kind("SeedOss"),
    "smollm3": Kind("SmolLM3"),
    "stablelm": Kind("StableLm", without=_NO_HEAD_DIM),
    "starcoder2": Kind("Starcoder2", {"sliding_window": None}),
    "vaultgemma": Kind(
        "VaultGemma", {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 32},
        factors={"down_proj.weight": 8.0, "o_proj.weight": 8.0},
    ),
}  # fmt: skip

EXPERTS = {
    "afmoe": Kind("Afmoe", {**_FEW_EXPERTS, "num_dense_layers": 1, "sliding_window": 64,
                            "layer_types": [SLIDING, FULL]},
                  after={"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1,
                         "topk_group": 1, "mup_enabled": True}),
    "axk1": Kind("AXK1", {**_DEEPSEEK, "first_k_dense_replace": 0}, args=_CPU_MLA),
    "cohere2_moe": Kind("Cohere2Moe", {**_FEW_EXPERTS, "logit_scale": 1.0, "sliding_window": 64,
                                       "layer_types": [SLIDING, FULL]}),
    "deepseek_v3": Kind("DeepseekV3", {**_DEEPSEEK, "q_lora_rank": 64, "topk_method": "noaux_tc"}, args=_CPU_MLA),
    "dots1": Kind("Dots1", {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                            "topk_group": 1}),
    "ernie4_5_moe": Kind("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
                                          "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    "exaone_moe": Kind("ExaoneMoe", {**_FEW_EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1,
                                     "sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "flex_olmo": Kind("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": Kind("Glm4Moe", {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                                 "topk_group": 1}),
    "glm4_moe_lite": Kind("Glm4MoeLite", {**_DEEPSEEK, "q_lora_rank": 64}, args=_CPU_MLA),
    "glm_moe_dsa": Kind("GlmMoeDsa", {**_DEEPSEEK, "q_lora_rank": 64}, args=_CPU_MLA),
    "gpt_oss": Kind("GptOss", {**_LOCAL, "sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "granitemoe": Kind("GraniteMoe", {**_LOCAL, **_MULTIPLIERS}),
    "granitemoe_swa": Kind("GraniteMoeSWA", {**_LOCAL, **_MULTIPLIERS, "sliding_window": 64,
                                             "layer_types": [SLIDING, FULL]}),
    "granitemoeshared": Kind("GraniteMoeShared", {**_LOCAL, **_MULTIPLIERS, "shared_intermediate_size": 64}),
    "granite_micro": Kind("GraniteMoeHybrid", {"layer_types": ["attention", "attention"], "num_local_experts": 0,
                                               "shared_intermediate_size": 256, "position_embedding_type": "rope"}),
    "hunyuan_v1_moe": Kind("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 256}),
    "hy_v3": Kind("HYV3", {**_FEW_EXPERTS, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
                  after={"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True}),
    "laguna": Kind("Laguna", {**_FEW_EXPERTS, "sliding_window": 64, "layer_types": [SLIDING, FULL],
                              "shared_expert_intermediate_size": 64}),
    "llama4": Kind("Llama4Text", {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 256,
                                  "interleave_moe_layer_step": 2, "attention_chunk_size": 256}),
    "longcat_flash": Kind("LongcatFlash", {**MLA, **_ROUTED, "q_lora_rank": 64, "num_layers": 1, "ffn_hidden_size": 256,
                                           "expert_ffn_hidden_size": 64, "moe_topk": 2, "zero_expert_num": 2,
                                           "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
                          args=_CPU_MLA),
    "mellum": Kind("Mellum", {**_FEW_EXPERTS, "sliding_window": 64, "layer_types": [SLIDING, FULL]}),
    "mimo_v2_flash": Kind("MiMoV2Flash", {**_ROUTED, "sliding_window": 64, "layer_types": [FULL, SLIDING],
                                          "v_head_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
                          after={"layernorm_epsilon": 1e-5, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1],
                                 "sliding_window_size": 64, "swa_head_dim": 32, "swa_v_head_dim": 32,
                                 "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}),
    "minimax_m2": Kind("MiniMaxM2", {**_LOCAL, "rotary_dim": 16, "scoring_func": "sigmoid"}),
    "olmoe": Kind("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Kind("Phimoe", {**_LOCAL, "attention_bias": True, "lm_head_bias": True},
                   architecture="PhiMoEForCausalLM"),
    "qwen2_moe": Kind("Qwen2Moe", {**_FEW_EXPERTS, "shared_expert_intermediate_size": 64}),
    "solar_open": Kind("SolarOpen", {**_ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    "youtu": Kind("Youtu", {**MLA, "q_lora_rank": 64}, args=_CPU_MLA),
}  # fmt: skip

TEXT = DEMO | DENSE | EXPERTS
