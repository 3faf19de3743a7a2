# SPDX-License-Identifier: Apache-2.0
"""Tiny models that see or hear: their configs, and the files with which their processors are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TEXT_VOCAB = 512
"""Entries of the tokenizer's text; the tokens that stand for media come behind them."""
_PADDED = 528
_TEXT: dict[str, Any] = {
    "vocab_size": _PADDED,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
}
_MEAN_AND_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_PATCH = 14
_QWEN_SIDE = 2 * _QWEN_PATCH
"""Pixels that one token of an image stands for, each way."""
_QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_LLAVA_SIDE, _LLAVA_PATCH = 56, 14

_WHISPER_SECONDS = 4
"""Length of the piece of audio that the encoder sees at a time; published models have 30."""
_WHISPER_RATE, _WHISPER_HOP = 16_000, 160
_WHISPER_VOCAB = 640


@dataclass(frozen=True, slots=True)
class Processing:
    """What a checkpoint of a multimodal kind has beside its config, its weights and its text tokenizer."""

    auto_class: str
    """The class of transformers that makes the model of its config."""
    tokens: tuple[str, ...]
    """Special tokens, from `TEXT_VOCAB` on in this order."""
    files: dict[str, dict[str, Any]]
    """JSON by file name."""
    chat_template: str | None = None
    """In the place of the text models'."""
    renamed: tuple[str, str] | None = None
    """The beginning of weights' names as transformers writes them, and as published checkpoints and vLLM have it."""
    factors: dict[str, float] = field(default_factory=dict)
    """By the end of a weight's name, what it is multiplied by so that streams do not collapse."""


def qwen2_5_vl() -> PretrainedConfig:
    """Qwen2.5-VL: images and videos of any size, positions in three dimensions."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": _QWEN_PATCH,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.12,
    }
    start, end, image, video = range(TEXT_VOCAB, TEXT_VOCAB + len(_QWEN_TOKENS))
    ids = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image, "video_token_id": video}
    return Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, **ids)


def llava() -> PretrainedConfig:
    """LLaVA: a CLIP tower in front of a llama, and one size for all images."""
    from transformers import LlavaConfig

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 64,
        "image_size": _LLAVA_SIDE,
        "patch_size": _LLAVA_PATCH,
        "initializer_range": 0.12,
    }
    return LlavaConfig(
        text_config={**_TEXT, "model_type": "llama", "head_dim": 32},
        vision_config=vision,
        image_token_index=TEXT_VOCAB,
        image_seq_length=(_LLAVA_SIDE // _LLAVA_PATCH) ** 2,
    )


def whisper() -> PretrainedConfig:
    """Whisper: an encoder for audio, and a decoder that attends to what it made."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=_WHISPER_VOCAB,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=_WHISPER_SECONDS * _WHISPER_RATE // _WHISPER_HOP // 2,
        max_target_positions=448,
        init_std=0.12,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=TEXT_VOCAB,
        begin_suppress_tokens=None,
    )


def _whisper_tokens() -> tuple[str, ...]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    words = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    return tuple(f"<|{word}|>" for word in ("startoftranscript", *LANGUAGES, *words))


def processing(kind: str) -> Processing | None:
    """The further files of a kind; None for one that takes text only."""
    makers = {"qwen2_5_vl": _qwen_processing, "llava": _llava_processing, "whisper": _whisper_processing}
    return makers[kind]() if kind in makers else None


def _qwen_processing() -> Processing:
    pixels = {"shortest_edge": _QWEN_SIDE**2, "longest_edge": 16 * _QWEN_SIDE**2}
    patches = {"patch_size": _QWEN_PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": pixels, **_MEAN_AND_STD}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", **patches}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2_5_VLProcessor", **patches}
    return Processing(
        "AutoModelForImageTextToText",
        _QWEN_TOKENS,
        {"preprocessor_config.json": image, "video_preprocessor_config.json": video},
        _QWEN_TEMPLATE,
    )


def _llava_processing() -> Processing:
    side = {"height": _LLAVA_SIDE, "width": _LLAVA_SIDE}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": _LLAVA_SIDE},
        "crop_size": side,
        **_MEAN_AND_STD,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": _LLAVA_PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    files: dict[str, dict[str, Any]] = {"preprocessor_config.json": image, "processor_config.json": processor}
    renamed = "vision_tower.", "vision_tower.vision_model."
    return Processing("AutoModelForImageTextToText", ("<image>",), files, renamed=renamed)


def _whisper_processing() -> Processing:
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": 80,
        "sampling_rate": _WHISPER_RATE,
        "hop_length": _WHISPER_HOP,
        "chunk_length": _WHISPER_SECONDS,
    }
    return Processing(
        "AutoModelForSpeechSeq2Seq",
        _whisper_tokens(),
        {"preprocessor_config.json": extractor},
        factors={"decoder.embed_positions.weight": 16.0},
    )
