# SPDX-License-Identifier: Apache-2.0
"""Make tiny checkpoints with random weights, on this machine and without any download.

The tests and the demo need real model directories (config.json, safetensors, tokenizer) of several
architectures that vLLM loads on a CPU in about a second. Weights are drawn with a wide standard deviation:
with the usual 0.02 a random model repeats one token for ever, and a token comparison would prove nothing.

    python -m tokenpool.demo.tiny_models DIR [kind ...]     # makes DIR/<kind> for each kind

Imports neither vllm nor ray; torch and transformers are imported on first use.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tokenpool.demo import tiny_hybrids, tiny_multimodal
from tokenpool.demo.tiny_files import (
    FORMAT,
    MAX_POSITION,
    NUM_SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_tokenizer,
    write_beside,
    write_once,
)
from tokenpool.demo.tiny_multimodal import Processing, processing

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

LORA_RANK = 8
LORA_ALPHA = 16


def _common(num_layers: int, num_kv_heads: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITION,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
    }


def _llama() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_common(2))


def _qwen2() -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**_common(3, num_kv_heads=4))


def _qwen3() -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(**_common(2))


def _rerank() -> PretrainedConfig:
    """One score for a question and a text."""
    from transformers import Qwen3Config

    return Qwen3Config(**_common(2), num_labels=1, pad_token_id=1)


def _gemma3() -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    sliding, full = "sliding_attention", "full_attention"
    return Gemma3TextConfig(
        **_common(5) | {"tie_word_embeddings": True},  # as real Gemma 3; also the kind with shared weights
        sliding_window=64,
        layer_types=[sliding, full, sliding, sliding, full],
        query_pre_attn_scalar=32,
    )


def _mixtral() -> PretrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(**_common(2), num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> PretrainedConfig:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_common(2), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    )


def _deepseek_v2() -> PretrainedConfig:
    """One dense and one expert layer; vLLM's CPU kernel is built for the latent size 512 + 64 only.

    YaRN as in the published models: vLLM 0.32 on CPU rotates the strided MLA queries of a plain rope wrongly,
    and its tokens then depend on the other requests of the step.
    """
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **_common(2, num_kv_heads=4) | {"head_dim": 64},
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITION // 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
    )


KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "embed": _qwen3,
    "mamba2": tiny_hybrids.mamba2,
    "granite_hybrid": tiny_hybrids.granite_hybrid,
    "nemotron_h": tiny_hybrids.nemotron_h,
    "falcon_h1": tiny_hybrids.falcon_h1,
    "qwen3_next": tiny_hybrids.qwen3_next,
    "qwen2_5_vl": tiny_multimodal.qwen2_5_vl,
    "llava": tiny_multimodal.llava,
    "whisper": tiny_multimodal.whisper,
    "rerank": _rerank,
    "qwen3_next_wide": tiny_hybrids.qwen3_next_wide,
}
"""Kind -> builder of its config."""
_AUTO_CLASSES = {"rerank": "AutoModelForSequenceClassification"}
"""Where it is not a model that writes text."""

ENGINE_ARGS: dict[str, dict[str, Any]] = {
    # With AMX vLLM would take AMX_MLA, which a pool refuses.
    "deepseek_v2": {"block_size": 16, "attention_backend": "CPU_MLA"},
    "embed": {"runner": "pooling"},
    "rerank": {"runner": "pooling"},
    # With its prefix cache vLLM 0.32 ends at the first request of such a model on the CPU.
    **{kind: {"enable_prefix_caching": False} for kind in ("mamba2", "granite_hybrid", "nemotron_h", "falcon_h1")},
}
"""vLLM engine arguments a kind cannot do without; kinds not listed need none."""


def make_tiny_model(kind: str, directory: Path | str, *, seed: int | None = None) -> Path:
    """Write a checkpoint of `kind` to `directory` and return it; do nothing when the same one is there.

    Without `seed` each kind has its own, so that no two kinds share weights. The directory appears whole or
    not at all: several processes may ask for it at the same time.

    Raises:
        ValueError: no such kind.
        FileExistsError: the directory holds files that this module did not write.
    """
    if kind not in KINDS:
        raise ValueError(f"no tiny model of kind {kind!r}; choose one of {', '.join(KINDS)}")
    directory = Path(directory)
    if seed is None:
        seed = 1 + list(KINDS).index(kind)
    marker = {"format": FORMAT, "kind": kind, "seed": seed}

    def write(target: Path) -> None:
        more = processing(kind)
        make_tokenizer(more).save_pretrained(target)
        if more is None:
            model = random_model(KINDS[kind](), seed, auto_class=_AUTO_CLASSES.get(kind, "AutoModelForCausalLM"))
        else:
            made_by, tokens = more.auto_class, len(more.tokens)
            model = random_model(KINDS[kind](), seed, auto_class=made_by, num_media_tokens=tokens, factors=more.factors)
        model.save_pretrained(target)
        if more is not None:
            add_processing(target, more)

    write_once(directory, marker, write)
    return directory


def add_processing(target: Path, more: Processing) -> None:
    """Add what the processor of a multimodal model needs, and give weights the names that vLLM knows."""
    for name, content in more.files.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n")
    if more.renamed is not None:
        from safetensors.torch import load_file, save_file

        (old, new), file = more.renamed, target / "model.safetensors"
        weights = {re.sub(f"^{re.escape(old)}", new, name): weight for name, weight in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})


def make_tiny_lora(base: Path, directory: Path, *, seed: int = 0) -> Path:
    """Write a rank-8 adapter for q_proj and v_proj of the llama-like model in `base`, in PEFT's file format.

    Both factors are non-zero and large enough to change the tokens. Does nothing when it is already there.
    Give vLLM on CPU a `max_loras` above the number of adapters: in 0.32 the last slot leaks into requests
    without an adapter.
    """
    config = json.loads((base / "config.json").read_text())

    def write(target: Path) -> None:
        from safetensors.torch import save_file

        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name,
            "r": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["q_proj", "v_proj"],
            "inference_mode": True,
        }
        (target / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
        save_file(_lora_weights(config, seed), target / "adapter_model.safetensors")

    write_beside(base, Path(directory), {"kind": "lora", "seed": seed}, write)
    return Path(directory)


def _lora_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    import torch

    out_features = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out_size in out_features.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for factor, shape in (("A", (LORA_RANK, config["hidden_size"])), ("B", (out_size, LORA_RANK))):
                values = torch.randn(shape, generator=generator) * 0.12
                weights[f"{prefix}.lora_{factor}.weight"] = values.to(torch.bfloat16)
    return weights


def random_model(
    config: PretrainedConfig,
    seed: int,
    *,
    auto_class: str = "AutoModelForCausalLM",
    num_media_tokens: int = 0,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> Any:
    """A model of `config` in bfloat16 with weights drawn from `seed`, made by a class of transformers.

    The last `num_media_tokens` entries stand for media. `factors` has by the end of a weight's name what it is
    multiplied by.
    """
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config).to(torch.bfloat16)
        output = model.get_output_embeddings()
        if output is not None:
            # A zero row gives a special token the logit 0, far under the largest: greedy does not end early.
            output.weight[:NUM_SPECIAL_TOKENS] = 0
            # Where head and embeddings are one, the tokens that stand for media need their rows.
            output.weight[VOCAB_SIZE + (num_media_tokens if getattr(config, "tie_word_embeddings", False) else 0) :] = 0
        _sharpen(model, gemma=config.model_type.startswith(("gemma", "vaultgemma")), factors=factors)
    return model


def _sharpen(model: Any, *, gemma: bool, factors: Mapping[str, float]) -> None:
    """Make the next token depend on the whole context, in the kinds whose norms flatten the wide weights.

    With unit query and key norms attention is nearly an average, and streams fall into short cycles. Gemma
    scales by 1 + weight, and its head is tied to the embeddings: without heavier layers the token just read
    wins for ever.
    """
    scales = {"q_norm.weight": 1.0 if gemma else 2.0, "k_norm.weight": 1.0 if gemma else 2.0}
    if gemma:
        scales |= {"post_attention_layernorm.weight": 4.0, "post_feedforward_layernorm.weight": 4.0}
    for name, weight in model.named_parameters():
        for suffix, scale in scales.items():
            if name.endswith(suffix):
                weight.fill_(scale)
        for suffix, factor in factors.items():
            if name.endswith(suffix):
                weight.mul_(factor)


def main(argv: list[str] | None = None) -> None:
    """Make the named kinds, or all of them, under one directory."""
    parser = argparse.ArgumentParser(prog="python -m tokenpool.demo.tiny_models", description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"any of {', '.join(KINDS)}; default: all")
    args = parser.parse_args(argv)
    unknown = [kind for kind in args.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"unknown kind {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for kind in args.kinds or KINDS:
        print(make_tiny_model(kind, args.directory / kind))


if __name__ == "__main__":
    main()
