# SPDX-License-Identifier: Apache-2.0
"""Small files that unpack to much, or say so. Imports no vLLM."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def headed_png(width: int, height: int) -> bytes:
    """A PNG file that says so, and has nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


def icon(inner: bytes) -> bytes:
    """An icon of 16 x 16, which holds another file."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    file = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * more + data[-2:]


def silence(seconds: int, rate: int = 8000) -> bytes:
    """A FLAC file of so much silence."""
    import soundfile

    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, format="FLAC", subtype="PCM_16") as writer:
        for _ in range(seconds // 10):
            writer.write(np.zeros(10 * rate, np.int16))
    return file.getvalue()


def avi(side: int, frames: int) -> bytes:
    """A video of black frames."""
    import cv2

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "video.avi"))
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (side, side))
        for _ in range(frames):
            writer.write(np.zeros((side, side, 3), np.uint8))
        writer.release()
        return Path(path).read_bytes()
