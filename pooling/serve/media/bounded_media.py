# SPDX-License-Identifier: Apache-2.0
"""Has vLLM's connector of media load them within bounds, and tells clients what is wrong with theirs."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

import aiohttp
import torch
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import connector

from tokenpool.serve.media.image_bounds import BoundedImageIO, bound_inner_images
from tokenpool.serve.media.sound_bounds import BoundedAudioIO, answer_other_rates
from tokenpool.serve.media.video_bounds import BoundedVideoIO, bound_videos

MAX_URL_CHARS = 8192
"""Of media that are fetched: vLLM logs the URL at each attempt."""
_SHOWN = 200
_T = TypeVar("_T")


class _AnsweredConnector(connector.MediaConnector):
    """Media that cannot be had or read are the client's fault, whatever a decoder raises: it named them."""

    async def load_from_url_async(self, url: str, *args: Any, **options: Any) -> Any:
        if len(url) > MAX_URL_CHARS and url[:5].lower() != "data:":
            message = f"The URL has {len(url)} characters, at most {MAX_URL_CHARS} are taken."
            raise VLLMValidationError(message, parameter="url")
        try:
            return await _read(super().load_from_url_async(url, *args, **options))
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            message = f"Failed to fetch media from URL: {reason}"
            raise VLLMUnprocessableEntityError(message, parameter="url", value=url[:_SHOWN]) from error

    async def fetch_image_embedding_async(self, data: str) -> torch.Tensor:
        return await _read(super().fetch_image_embedding_async(data))

    async def fetch_audio_embedding_async(self, data: str) -> torch.Tensor:
        return await _read(super().fetch_audio_embedding_async(data))

    async def fetch_video_embedding_async(self, data: str) -> torch.Tensor:
        return await _read(super().fetch_video_embedding_async(data))


async def _read(loading: Awaitable[_T]) -> _T:
    """What is loaded; raises VLLMValidationError for what cannot be, whatever the decoder raised."""
    try:
        return await loading
    except (aiohttp.ClientError, TimeoutError, ValueError, TypeError, VLLMError, MemoryError):
        raise
    except ImportError as error:
        message = "Failed to load media: their format needs a package that is not installed here."
        raise VLLMValidationError(message, parameter="url") from error
    except Exception as error:
        raise VLLMValidationError(f"Failed to load media: {error}", parameter="url") from error


def bound_media() -> None:
    """Bound the media of all models of this process; a second call finds nothing to change."""
    bound_inner_images()
    bound_videos()
    answer_other_rates()
    connector.ImageMediaIO = BoundedImageIO
    connector.AudioMediaIO = BoundedAudioIO
    connector.VideoMediaIO = BoundedVideoIO
    connector.MEDIA_CONNECTOR_REGISTRY.register("http")(_AnsweredConnector)
