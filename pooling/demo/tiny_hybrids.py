# SPDX-License-Identifier: Apache-2.0
"""Configs of tiny models whose layers, all or some, keep a state in place of KV: Mamba 2 and gated delta nets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
}
_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}


def mamba2() -> PretrainedConfig:
    """States alone."""
    from transformers import Mamba2Config

    shapes = {"num_heads": 8, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 64}
    return Mamba2Config(**_COMMON, **shapes, num_hidden_layers=2)


def granite_hybrid() -> PretrainedConfig:
    """Granite 4: two layers of states, one of attention, experts."""
    from transformers import GraniteMoeHybridConfig

    return GraniteMoeHybridConfig(
        **_COMMON,
        **_ATTENTION,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_chunk_size=64,
        position_embedding_type="rope",
    )


def nemotron_h() -> PretrainedConfig:
    """Nemotron-H: states, attention and dense layers after one another."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        **_COMMON,
        **_ATTENTION,
        layers_block_type=["mamba", "mlp", "attention", "mamba"],
        head_dim=32,
        ssm_state_size=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        chunk_size=64,
    )


def falcon_h1() -> PretrainedConfig:
    """Falcon-H1: each layer has states and attention beside each other."""
    from transformers import FalconH1Config

    return FalconH1Config(
        **_COMMON,
        **_ATTENTION,
        num_hidden_layers=2,
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_chunk_size=64,
    )


def qwen3_next() -> PretrainedConfig:
    """Qwen3-Next: gated delta nets, for which vLLM's CPU kernel wants heads of 128, attention and experts."""
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    return _qwen3_next(layers, head_dim=32, linear_num_value_heads=2)


def qwen3_next_wide() -> PretrainedConfig:
    """The same with much KV per token and small states.

    vLLM gives a block of KV as many bytes as a state has: here that holds a few dozen tokens, so that short prompts
    fill blocks, which the prefix cache wants.
    """
    layers = ["linear_attention", "linear_attention", "full_attention"]
    return _qwen3_next(layers, head_dim=128, linear_num_value_heads=1, num_key_value_heads=4)


def _qwen3_next(layer_types: list[str], **fields: Any) -> PretrainedConfig:
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig(
        **{**_COMMON, **_ATTENTION, **fields},
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
