# SPDX-License-Identifier: Apache-2.0
"""Kinds that see or hear."""

from __future__ import annotations

from typing import Any

from tests.models.kind import COMMON, Kind
from tokenpool.demo.tiny_multimodal import TEXT_VOCAB, Processing

_IMAGE_TEXT = "AutoModelForImageTextToText"
_TEXT: dict[str, Any] = {**COMMON, "vocab_size": 528}
_CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": 0.12,
}
_MEAN_AND_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
_SIDE = {"height": 56, "width": 56}

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS = {
    "vision_start_token_id": TEXT_VOCAB,
    "vision_end_token_id": TEXT_VOCAB + 1,
    "image_token_id": TEXT_VOCAB + 2,
    "video_token_id": TEXT_VOCAB + 3,
}
_QWEN_PROMPT = f"image:{TEXT_VOCAB},{TEXT_VOCAB + 2},{TEXT_VOCAB + 1}"
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_INTERLEAVED = {**_SECTIONS, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.12,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}


def _qwen(patch: int, processor: str, video: str) -> Processing:
    side = (2 * patch) ** 2
    pixels = {"shortest_edge": side, "longest_edge": 16 * side}
    patches = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": pixels, **_MEAN_AND_STD}
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **patches},
        "video_preprocessor_config.json": {"video_processor_type": video, **patches},
    }
    return Processing(_IMAGE_TEXT, _QWEN_TOKENS, {k: {**v, "processor_class": processor} for k, v in files.items()})


_QWEN3 = _qwen(16, "Qwen3VLProcessor", "Qwen3VLVideoProcessor")
_LLAVA_NEXT: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": _SIDE,
        "image_grid_pinpoints": [[56, 112], [112, 56]],
        **_MEAN_AND_STD,
    },
    "processor_config.json": {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    },
}
_NEW_LINES = tuple("\n" * size for size in (1, 2, 3, 4))
"""vLLM's class looks for tokens of these."""
_GEMMA3: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": _SIDE,
        "image_seq_length": 4,
        **_MEAN_AND_STD,
    },
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
}
_MISTRAL3: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "PixtralImageProcessor",
        "processor_class": "PixtralProcessor",
        "size": {"longest_edge": 112},
        "patch_size": {"height": 14, "width": 14},
        **_MEAN_AND_STD,
    },
    "processor_config.json": {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    },
}
_PIXTRAL_TOWER = {**_CLIP, "model_type": "pixtral", "head_dim": 32, "image_size": 112}
_PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _demo(name: str, **args: Any) -> Kind:
    return Kind(name, demo=name, media=name, args=args)


MEDIA = {
    "qwen2_5_vl": _demo("qwen2_5_vl"),
    "llava": _demo("llava"),
    "whisper": _demo("whisper", max_model_len=448),
    "qwen2_vl": Kind(
        "Qwen2VL",
        {
            **_QWEN_IDS,
            "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2,
                              "patch_size": 14, "initializer_range": 0.12},
        },
        without=tuple(COMMON), processing=_qwen(14, "Qwen2VLProcessor", "Qwen2VLVideoProcessor"), media=_QWEN_PROMPT,
    ),
    "qwen3_vl": Kind(
        "Qwen3VL",
        {**_QWEN_IDS, "text_config": {**_TEXT, "rope_parameters": _INTERLEAVED}, "vision_config": _QWEN_TOWER},
        without=tuple(COMMON), processing=_QWEN3, media=_QWEN_PROMPT,
    ),
    "qwen3_vl_moe": Kind(
        "Qwen3VLMoe",
        {
            **_QWEN_IDS, "vision_config": _QWEN_TOWER,
            "text_config": {**_TEXT, **_EXPERTS, "rope_parameters": _INTERLEAVED},
        },
        transposed=r"\.experts\.", without=tuple(COMMON), processing=_QWEN3, media=_QWEN_PROMPT,
    ),
    "qwen3_5_mm": Kind(
        "Qwen3_5",
        {
            **_QWEN_IDS, "text_config": {**_TEXT, **_LINEAR, "rope_parameters": {**_INTERLEAVED,
                                                                                 "mrope_section": [2, 1, 1],
                                                                                 "partial_rotary_factor": 0.25}},
            "vision_config": {k: v for k, v in _QWEN_TOWER.items() if k != "deepstack_visual_indexes"},
        },
        without=tuple(COMMON), processing=_QWEN3, media=_QWEN_PROMPT,
    ),
    "llava_next": Kind(
        "LlavaNext",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
            "image_token_index": TEXT_VOCAB, "image_grid_pinpoints": [[56, 112], [112, 56]], "image_seq_length": 16,
        },
        without=tuple(COMMON), media=f"image:{TEXT_VOCAB}",
        processing=Processing(_IMAGE_TEXT, ("<image>",), _LLAVA_NEXT,
                              renamed=("vision_tower.", "vision_tower.vision_model.")),
    ),
    "gemma3_mm": Kind(
        "Gemma3",
        {
            "text_config": {**_TEXT, "sliding_window": 64, "query_pre_attn_scalar": 32,
                            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
            "vision_config": {**_CLIP, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
            "boi_token_index": TEXT_VOCAB, "eoi_token_index": TEXT_VOCAB + 1, "image_token_index": TEXT_VOCAB + 2,
        },
        renamed=((r"vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
        without=tuple(COMMON), media=f"image:{TEXT_VOCAB}",
        processing=Processing(_IMAGE_TEXT, ("<boi>", "<eoi>", "<image>", *_NEW_LINES), _GEMMA3),
        tokenizer={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    ),
    "mistral3": Kind(
        "Mistral3",
        {
            "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None}, "vision_config": _PIXTRAL_TOWER,
            "image_token_index": TEXT_VOCAB, "spatial_merge_size": 2, "vision_feature_layer": -1,
        },
        without=tuple(COMMON), media=f"image:{TEXT_VOCAB}",
        processing=Processing(_IMAGE_TEXT, _PIXTRAL_TOKENS, _MISTRAL3),
    ),
}  # fmt: skip
