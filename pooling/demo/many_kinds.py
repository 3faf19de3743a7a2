# SPDX-License-Identifier: Apache-2.0
"""Models of six kinds in one pool, on memory for two or three of them: what docs/many_kinds.md tries by hand.

    python -m tokenpool.demo.many_kinds FOLDER

writes tiny models with random weights, `pool.yaml`, and what the requests send: `picture.png` and `speech.wav`.
"""

from __future__ import annotations

import argparse
import math
import struct
import wave
from pathlib import Path
from typing import Any

import yaml

from tokenpool.demo.tiny_models import ENGINE_ARGS, make_tiny_model
from tokenpool.demo.tiny_quantized import make_w8a8

MODELS = {
    "hybrid": "granite_hybrid",
    "eye": "qwen2_5_vl",
    "embed": "embed",
    "rerank": "rerank",
    "ear": "whisper",
    "fp8": "llama",
}
"""Name in the pool -> kind of tiny model; the last one's linear layers are quantised."""
ADMIN_KEY = "demo-admin-0123456"
_RATE = 16_000
_ARGS: dict[str, Any] = {"max_model_len": 448, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
"""Of every model; Whisper has 448 positions."""


def write_many_kinds(folder: Path) -> Path:
    """Write models, media and pool file; returns the pool file. What is there already is not made again."""
    models = []
    for name, kind in MODELS.items():
        path = make_tiny_model(kind, folder / name if name != "fp8" else folder / "unquantised")
        if name == "fp8":
            make_w8a8(path, folder / name, "fp8")
        models.append({"name": name, "model": f"./{name}", "args": _ARGS | ENGINE_ARGS.get(kind, {})})
    write_picture(folder / "picture.png", 0)
    write_speech(folder / "speech.wav", 0)
    pool = {
        "models": models,
        "device_memory": "8MiB",
        "page_size": "512KiB",
        "host_memory": "256MiB",
        "weights": "movable",
        "host": "127.0.0.1",
        "admin_key": ADMIN_KEY,
    }
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump(pool, sort_keys=False))
    return path


def write_picture(path: Path, seed: int) -> None:
    """A PNG of 84 x 56 pixels with stripes."""
    from PIL import Image

    width, height = 84, 56
    picture = Image.new("RGB", (width, height))
    picture.putdata([
        (x * 3 % 256, (y * 4 + 60 * seed) % 256, (x * y + 90 * seed) % 256) for y in range(height) for x in range(width)
    ])  # fmt: skip
    picture.save(path, "PNG")


def write_speech(path: Path, seed: int) -> None:
    """A WAV file of two seconds: a tone that rises."""
    angles = (2 * math.pi * (200 + 150 * seed + i / 40) * i / _RATE for i in range(2 * _RATE))
    samples = [round(9000 * math.sin(angle)) for angle in angles]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def main() -> None:
    """Write everything into one folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenpool.demo.many_kinds", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_many_kinds(folder)
    print(f"{folder}: pool.yaml picture.png speech.wav {' '.join(MODELS)}")


if __name__ == "__main__":
    main()
