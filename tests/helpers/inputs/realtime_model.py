# SPDX-License-Identifier: Apache-2.0
"""A tiny model that transcribes sound as it comes: Qwen3-ASR, as vLLM serves it at /v1/realtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.kind import COMMON, Kind, make
from tokenpool.demo.tiny_multimodal import TEXT_VOCAB, Processing

SAMPLE_RATE = 16_000
SEGMENT_S = 5.0
"""Seconds of sound that vLLM's class gives to the model at a time."""
_TOKENS = ("<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>", "<asr_text>")
_TEXT: dict[str, Any] = {**COMMON, "vocab_size": TEXT_VOCAB + 16, "model_type": "qwen3"}
_EAR: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "d_model": 64,
    "output_dim": COMMON["hidden_size"],
    "downsample_hidden_size": 32,
    "initializer_range": 0.12,
}
_EXTRACTOR: dict[str, Any] = {
    "feature_extractor_type": "Qwen3ASRFeatureExtractor",
    "processor_class": "Qwen3ASRProcessor",
    "feature_size": 128,
    "sampling_rate": SAMPLE_RATE,
}


def make_realtime_model(directory: Path) -> Path:
    """Write the checkpoint to `directory`, unless it is there."""
    kind = Kind(
        "Qwen3ASR",
        {"text_config": _TEXT, "audio_config": _EAR, "audio_token_id": TEXT_VOCAB + 3, "eos_token_id": 1},
        without=tuple(COMMON),
        architecture="Qwen3ASRRealtimeGeneration",
        processing=Processing("AutoModelForSpeechSeq2Seq", _TOKENS, {"preprocessor_config.json": _EXTRACTOR}),
        tokenizer={
            "audio_token": "<|audio_pad|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
            "pad_token": "<|im_end|>",
        },
    )
    return make(kind, "realtime", directory, seed=1)
