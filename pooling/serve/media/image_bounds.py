# SPDX-License-Identifier: Apache-2.0
"""Bounds what the images of requests unpack to, by their heads, before they are unpacked.

A file of 66 bytes may say that it has 178 million pixels, which vLLM takes: a gigabyte for a column of them, and the
interpreter stands still while it is made. Some formats hold a file of another format, whose head counts.
"""

from __future__ import annotations

import struct
import sys
import warnings
from io import BytesIO
from typing import Any

from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from tokenpool.serve.media.live_media import Keeper

MAX_SIDE = 65_535
"""Pixels; what JPEG can have. Memory for rows is taken with the interpreter's lock."""
MAX_SCANS = 100
"""Of a progressive JPEG: each costs the time of a whole image. Encoders make about ten."""
BYTES_PER_PIXEL = 4
_ICON = b"\0\0\1\0"
_SCAN = b"\xff\xda"
_PNG = b"\x89PNG\r\n\x1a\n"
_OPAQUE = frozenset({"ICNS", "BLP"})
"""Formats whose head does not bound what they hold; not worth a parser."""


class BoundedImageIO(ImageMediaIO):
    """Refuses an image that is too large, or for which others leave no room."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._keeper = Keeper()

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """See MediaIO."""
        size = size_of(data)
        if size is None:  # vLLM says what is wrong with it
            return super().load_bytes(data)
        width, height, num_pixels = size
        with self._keeper.room(num_pixels * BYTES_PER_PIXEL, f"an image of {width}x{height} pixels") as room:
            loaded = super().load_bytes(data)
            width, height = loaded.media.size
            room.keep_for(loaded.media, width * height * BYTES_PER_PIXEL)
        return loaded


def size_of(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and pixels while it is unpacked, by a file's head; None if it has none that can be read.

    Raises VLLMValidationError for one that is too large or too slow.
    """
    if data.startswith(_ICON):  # Pillow unpacks it when it opens it
        sizes = _sizes_in_icon(data)
        if not sizes:
            return None
        width, height = (max(side) for side in zip(*sizes, strict=True))
        kind: str | None = "ICO"
    else:
        try:
            with open_image(BytesIO(data)) as image:
                width, height = image.size
                kind = image.format
        except Image.DecompressionBombError as error:
            raise VLLMValidationError(str(error), parameter="image_url") from None
        except Exception:  # whatever a decoder makes of it
            return None
    _refuse_large(width, height)
    if kind == "JPEG" and (count := data.count(_SCAN)) > MAX_SCANS:
        message = f"The image has {count} scans, at most {MAX_SCANS} are taken."
        raise VLLMValidationError(message, parameter="image_url")
    return width, height, _most_pixels() if kind in _OPAQUE else width * height


def _refuse_large(width: int, height: int) -> None:
    size = f"The image has {width}x{height} pixels, at most"
    if max(width, height) > MAX_SIDE:
        raise VLLMValidationError(f"{size} {MAX_SIDE} in a row or column are taken.", parameter="image_url")
    if width * height > _most_pixels():
        message = f"{size} {_most_pixels()} are taken: VLLM_MAX_IMAGE_PIXELS of the server."
        raise VLLMValidationError(message, parameter="image_url")


def _most_pixels() -> int:
    return envs.VLLM_MAX_IMAGE_PIXELS or sys.maxsize


def _sizes_in_icon(data: bytes) -> list[tuple[int, int]]:
    """Width and height that the files in an icon say they have; its own directory may say less."""
    sizes = []
    for index in range(int.from_bytes(data[4:6], "little")):
        entry = data[6 + 16 * index : 22 + 16 * index]
        if len(entry) < 16:
            break
        held = data[(at := int.from_bytes(entry[12:16], "little")) : at + 24]
        if len(held) == 24 and held.startswith(_PNG):
            sizes.append(struct.unpack(">II", held[16:24]))
        elif len(held) == 24:
            width, height = struct.unpack("<ii", held[4:12])
            sizes.append((abs(width), abs(height) // 2))
    return sizes


def bound_inner_images() -> None:
    """Let Pillow refuse what is in a file of another format by the same bound."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    if most := envs.VLLM_MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most // 2  # it warns from there on, and refuses twice as many
