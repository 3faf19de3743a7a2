# SPDX-License-Identifier: Apache-2.0
"""Bounds what the videos of requests unpack to, and for how long they are read.

vLLM takes memory for as many frames as it samples, up to 768 for some models, of whatever size, and reads all that lie
before the last of them. How many there are is what the file says, and a client may ask for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from io import SEEK_SET, BytesIO
from typing import Any

import numpy.typing as npt
import pybase64
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders import opencv
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from tokenpool.serve.media.image_bounds import BYTES_PER_PIXEL, size_of
from tokenpool.serve.media.live_media import Keeper

MAX_FRAMES = 1 << 18
"""Of a file: two hours and a half at 30 a second."""
MAX_READ_S = 60.0
"""From when a file is opened until its last frame is there."""
MAX_BROKEN = 1000
"""Frames in a row that cannot be read: the file has ended, whatever it says."""
_BYTES_PER_PIXEL = 3
_WIDTH, _HEIGHT = 3, 4  # OpenCV's numbers of these properties

_NOW = threading.local()
"""The keeper for whom this thread reads a video."""


class BoundedVideoIO(VideoMediaIO):
    """Refuses a video that is too large or too long, or for which others leave no room."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._keeper = Keeper()

    def load_bytes(self, data: bytes) -> MediaWithBytes[Any]:
        """See MediaIO."""
        _NOW.keeper = self._keeper
        try:
            return super().load_bytes(data)
        finally:
            _NOW.keeper = None

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Any]:
        """See MediaIO; frames may come as images, which the arrays of all of them outlive."""
        if media_type.lower() != "video/jpeg":
            return super().load_base64(media_type, data)
        parts = data.split(",", self.num_frames)[: self.num_frames] if self.num_frames > 0 else data.split(",")
        sizes = [size_of(pybase64.b64decode(part)) for part in parts]
        num_bytes = sum(size[2] * BYTES_PER_PIXEL for size in sizes if size is not None)
        with self._keeper.room(num_bytes, f"a video of {len(parts)} frames") as room:
            loaded = super().load_base64(media_type, data)
            frames = loaded.media[0]
            room.keep_for(frames, frames.nbytes)
        return loaded


class _Stream(BytesIO):
    """A file for OpenCV, which crashes the process where reading raises: -1 tells it that there is no such place."""

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        """A broken file may ask for a place before its start."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return -1


class _LimitedCapture:
    """A video that OpenCV has opened, which is read for a while and not beyond its end."""

    def __init__(self, capture: Any) -> None:
        self._capture = capture
        self._num_broken = 0
        self._end_s = time.monotonic() + MAX_READ_S

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)

    def grab(self) -> bool:
        """Read one more frame."""
        if time.monotonic() > self._end_s:
            message = f"The video takes longer than {MAX_READ_S:g} s to read: send a shorter or smaller one."
            raise VLLMValidationError(message, parameter="video_url")
        is_there = bool(self._capture.grab())
        self._num_broken = 0 if is_there else self._num_broken + 1
        if self._num_broken > MAX_BROKEN:
            message = f"The video has {self._num_broken} frames in a row that cannot be read."
            raise VLLMValidationError(message, parameter="video_url")
        return is_there


class _BoundedOpenCV(OpenCVVideoBackendMixin):
    """What all of vLLM's samplers read a video with."""

    @classmethod
    def open_video_capture(cls, data: bytes) -> Any:
        return _LimitedCapture(super().open_video_capture(data))

    @staticmethod
    def get_video_metadata(cap: Any) -> Any:
        told = OpenCVVideoBackendMixin.get_video_metadata(cap)
        if told.total_frames_num > MAX_FRAMES:
            message = f"The video has {told.total_frames_num} frames, at most {MAX_FRAMES} are taken."
            raise VLLMValidationError(message, parameter="video_url")
        return told

    @classmethod
    def read_frames(
        cls, cap: Any, frame_idx: Sequence[int], total_frames_num: int, *, frame_recovery: bool = False
    ) -> tuple[npt.NDArray[Any], list[int]]:
        keeper = getattr(_NOW, "keeper", None) or Keeper()
        count, width, height = len(set(frame_idx)), int(cap.get(_WIDTH)), int(cap.get(_HEIGHT))
        what = f"a video of {count} frames of {width}x{height} pixels"
        with keeper.room(count * width * height * _BYTES_PER_PIXEL, what) as room:
            frames, valid = super().read_frames(cap, frame_idx, total_frames_num, frame_recovery=frame_recovery)
            whole = frames if frames.base is None else frames.base
            room.keep_for(whole, whole.nbytes)
        return frames, valid


def bound_videos() -> None:
    """Let vLLM's samplers read videos within the bounds; a second call finds nothing to change."""
    opencv.OpenCVVideoBackendMixin = _BoundedOpenCV
    opencv.BytesIO = _Stream
