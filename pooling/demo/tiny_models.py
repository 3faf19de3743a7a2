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
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpool.demo import tiny_hybrids, tiny_multimodal
from tokenpool.demo.tiny_multimodal import Processing, processing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 512
MAX_POSITION = 2048
LORA_RANK = 8
LORA_ALPHA = 16

_MARKER = "tokenpool_tiny.json"
_FORMAT = 2  # raise when a change of this file changes the bytes written: old directories are then made anew
_SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
NUM_SPECIAL_TOKENS = len(_SPECIAL_TOKENS)
"""They have the lowest ids."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Enough distinct pairs for 512 - 256 - 3 merges.
_CORPUS = """
The quick brown fox jumps over the lazy dog, and the dog does not mind.
Hello world, this is a small language model.
A pool of machines serves many models at once: each request waits for its turn, each turn makes a few tokens.
user: What is the weather like in the mountains today?
assistant: It is cold, bright and windy; take a warm coat.
system: You are a helpful assistant. Answer the question with short and simple words, then stop.
When one model rests, its memory goes to another; when it wakes, the weights come back from the host.
Numbers such as 1, 2, 3, 10, 42 and 100 appear here too, with a date like 2024 and a price like 19.99 dollars.
def main(argument): return [value for value in range(argument) if value % 2 == 0]
People write letters, read books, cook dinner, travel by train and tell their children stories about the sea.
""".strip().splitlines()


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
}
"""Kind -> builder of its config."""

ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"block_size": 16},
    "embed": {"runner": "pooling"},
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
    marker = {"format": _FORMAT, "kind": kind, "seed": seed}

    def write(target: Path) -> None:
        more = processing(kind)
        _tokenizer(more).save_pretrained(target)
        _random_model(KINDS[kind](), seed, more).save_pretrained(target)
        if more is not None:
            _finish(target, more)

    _write_once(directory, marker, write)
    return directory


def _finish(target: Path, more: Processing) -> None:
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


def write_beside(base: Path, directory: Path, what: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory with something for the tiny model in `base`, as `make_tiny_model` fills one."""
    marker = {"format": _FORMAT, **what, "base": json.loads((base / _MARKER).read_text())}
    _write_once(directory, marker, write)


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


def _random_model(config: PretrainedConfig, seed: int, more: Processing | None = None) -> Any:
    import torch
    import transformers

    auto = getattr(transformers, more.auto_class if more else "AutoModelForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config).to(torch.bfloat16)
        # A zero row gives a special token the logit 0, far under the largest: greedy does not end early.
        head = model.get_output_embeddings().weight
        head[:NUM_SPECIAL_TOKENS] = 0
        # Where head and embeddings are one, the tokens that stand for media need their rows.
        head[VOCAB_SIZE + (len(more.tokens) if more and config.tie_word_embeddings else 0) :] = 0
        _sharpen(model, gemma=config.model_type == "gemma3_text", factors=more.factors if more else {})
    return model


def _sharpen(model: Any, *, gemma: bool, factors: dict[str, float]) -> None:
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


def _tokenizer(more: Processing | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly VOCAB_SIZE entries: every model token has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    assert bpe.get_vocab_size() == VOCAB_SIZE, bpe.get_vocab_size()
    bos, eos, unk = _SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, unk_token=unk, model_max_length=MAX_POSITION
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    if more is not None:
        tokenizer.add_tokens(list(more.tokens), special_tokens=True)
        tokenizer.chat_template = more.chat_template or _CHAT_TEMPLATE
    return tokenizer


def _write_once(directory: Path, marker: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Fill a sibling directory, then rename it into place; the marker tells what a directory holds."""
    if _is_complete(directory, marker):
        return
    if directory.exists():
        if any(directory.iterdir()) and not (directory / _MARKER).exists():
            raise FileExistsError(f"{directory} holds other files; give an empty or a new directory")
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(directory) as scratch:
        write(scratch)
        (scratch / _MARKER).write_text(json.dumps(marker) + "\n")
        try:
            os.rename(scratch, directory)
        except OSError:
            if not _is_complete(directory, marker):  # else another process was faster: same bytes
                raise


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_complete(directory: Path, marker: dict[str, Any]) -> bool:
    path = directory / _MARKER
    return path.is_file() and json.loads(path.read_text()) == marker


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
