# SPDX-License-Identifier: Apache-2.0
"""Images, videos and sounds that are drawn from a seed, and prompts of tiny models with them. Imports no vLLM."""

from __future__ import annotations

import base64
import io
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SAMPLE_RATE = 16_000
_VISION_START, _VISION_END, _IMAGE_PAD, _VIDEO_PAD = range(512, 516)  # of tiny qwen2_5_vl
_LLAVA_IMAGE = 512
_START_OF_TRANSCRIPT, _ENGLISH = 512, 513  # of tiny whisper


def image(seed: int) -> Image.Image:
    """An image whose size and colours depend on the seed."""
    rng = np.random.default_rng(seed)
    width, height = 28 * (2 + seed % 3), 28 * (2 + seed % 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(seed: int) -> np.ndarray:
    """Four frames, (4, height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)


def mp4(seed: int) -> bytes:
    """A video file of eight frames, each a colour with a bar, all of the seed."""
    import cv2

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "video.mp4"))
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 4.0, (56, 56))
        for _ in range(8):
            frame = np.full((56, 56, 3), rng.integers(0, 256, 3), np.uint8)
            frame[:, rng.integers(0, 50) :] = rng.integers(0, 256, 3)
            writer.write(frame)
        writer.release()
        return Path(path).read_bytes()


def sound(seed: int, seconds: float = 2.0) -> np.ndarray:
    """Tones and noise, float32 samples at SAMPLE_RATE."""
    rng = np.random.default_rng(seed)
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * pitch * times) for pitch in rng.uniform(100, 4000, 3))
    return (0.2 * tones + 0.05 * rng.standard_normal(len(times))).astype(np.float32)


def png(seed: int) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image(seed).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, media_type: str) -> str:
    """The bytes of a file as a data: URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def wav(seed: int, seconds: float = 2.0) -> bytes:
    """The sound as a WAV file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(SAMPLE_RATE)
        made.writeframes((sound(seed, seconds).clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def prompt_with(kind: str, seed: int, text: list[int]) -> Any:
    """A prompt for vLLM with what a model of that kind takes, drawn from the seed, and the tokens `text`.

    `kind` is a tiny model's, or a modality with the tokens that stand for it, as image:512,513.
    """
    modality, _, tokens = kind.partition(":")
    if tokens:
        seen = {"image": image, "audio": lambda seed: (sound(seed), SAMPLE_RATE)}[modality](seed)
        return {"prompt_token_ids": [*map(int, tokens.split(",")), *text], "multi_modal_data": {modality: seen}}
    if kind == "llava":
        return {"prompt_token_ids": [_LLAVA_IMAGE, *text], "multi_modal_data": {"image": image(seed)}}
    if kind == "qwen2_5_vl":
        pads = [_IMAGE_PAD, _IMAGE_PAD, _VIDEO_PAD] if seed % 2 else [_IMAGE_PAD]
        media: dict[str, Any] = {"image": [image(seed), image(seed + 1)] if seed % 2 else image(seed)}
        if seed % 2:
            media["video"] = (video(seed), {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3],
                                            "duration": 2.0, "do_sample_frames": False})  # fmt: skip
        held = [token for pad in pads for token in (_VISION_START, pad, _VISION_END)]
        return {"prompt_token_ids": [*held, *text], "multi_modal_data": media}
    if kind == "whisper":
        return {
            "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (sound(seed), SAMPLE_RATE)}},
            "decoder_prompt": {"prompt_token_ids": [_START_OF_TRANSCRIPT, _ENGLISH, *text[:16]]},
        }
    raise ValueError(f"models of kind {kind!r} take text only")
