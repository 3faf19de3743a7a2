# SPDX-License-Identifier: Apache-2.0
"""Bounds what the images of requests unpack to, by their heads, before they are unpacked.

A file of 66 bytes may say that it has 178 million pixels, which vLLM takes: a gigabyte for a column of them, and the
interpreter stands still while it is made. What a frontend has of images at a time is bounded, from the head of a file
until nobody needs its pixels; tenants share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from http import HTTPStatus
from io import BytesIO
from typing import Any

import aiohttp
from PIL import Image
from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MediaWithBytes, connector
from vllm.multimodal.media.image import ImageMediaIO

from tokenpool.process.heap import HeapTrimmer
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import current_tenant

MAX_SIDE = 65_535
"""Pixels; what JPEG can have. Memory for rows is taken with the interpreter's lock."""
MAX_LIVE_BYTES = 1 << 30
"""Of the pixels of all images that a frontend has."""
_BYTES_PER_PIXEL = 4
_SHOWN = 200

LIVE = ByteShares(MAX_LIVE_BYTES)
_TRIMMER = HeapTrimmer()


class BoundedImageIO(ImageMediaIO):
    """Refuses an image that is too large, or for which others leave no room."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._owner = current_tenant()  # it is made by the task of the request, and reads in a thread
        self._loop = asyncio._get_running_loop()

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """See MediaIO."""
        size = _size_of(data)
        if size is None:  # vLLM says what is wrong with it
            return super().load_bytes(data)
        num_bytes = size[0] * size[1] * _BYTES_PER_PIXEL
        if not LIVE.take(self._owner, num_bytes):
            message = (
                f"Images of requests take {LIVE.num_bytes} of {LIVE.max_bytes} bytes here, which leaves too little "
                f"room for one of {size[0]}x{size[1]} pixels: send fewer or smaller ones, or retry after 5 s."
            )
            raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            loaded = super().load_bytes(data)
        except BaseException:
            LIVE.give_back(self._owner, num_bytes)
            raise
        weakref.finalize(loaded.media, _forget, self._owner, num_bytes, self._loop)
        return loaded


def _forget(owner: str, num_bytes: int, loop: asyncio.AbstractEventLoop | None) -> None:
    """An image is gone, in whatever thread."""
    LIVE.give_back(owner, num_bytes)
    if loop is not None:
        with contextlib.suppress(RuntimeError):  # it is closed: the process ends
            loop.call_soon_threadsafe(_TRIMMER.freed, num_bytes)


def _size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height by a file's head, None if it has none that can be read; raises VLLMValidationError."""
    try:
        with open_image(BytesIO(data)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise VLLMValidationError(str(error), parameter="image_url") from None
    except Exception:  # whatever a decoder makes of it
        return None
    if max(width, height) > MAX_SIDE:
        message = f"The image has {width}x{height} pixels, at most {MAX_SIDE} in a row or column are taken."
        raise VLLMValidationError(message, parameter="image_url")
    return width, height


class _AnsweredConnector(connector.MediaConnector):
    """Media that cannot be had are the client's fault: it named them."""

    async def load_from_url_async(self, url: str, *args: Any, **options: Any) -> Any:
        try:
            return await super().load_from_url_async(url, *args, **options)
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            message = f"Failed to fetch media from URL: {reason}"
            raise VLLMUnprocessableEntityError(message, parameter="url", value=url[:_SHOWN]) from error
        except RuntimeError as error:
            if url[:5].lower() != "file:":
                raise
            raise VLLMValidationError(str(error), parameter="url") from None


def bound_media() -> None:
    """Bound the images of all models of this process; a second call finds nothing to change."""
    connector.ImageMediaIO = BoundedImageIO
    connector.MEDIA_CONNECTOR_REGISTRY.register("http")(_AnsweredConnector)
