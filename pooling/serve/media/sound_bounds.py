# SPDX-License-Identifier: Apache-2.0
"""Bounds what the sounds of requests unpack to: a hundred kilobytes of silence are ten minutes of samples.

vLLM bounds each sound; of those that a request has, and of all requests, it keeps as many as come. In chats it changes
rates with torchaudio, whether that is there or not; av does as well.
"""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy.typing as npt
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.audio import AudioResampler
from vllm.multimodal.media.audio import AudioMediaIO, soundfile

from tokenpool.serve.media.live_media import Keeper

_BYTES_PER_SAMPLE = 4
_RESAMPLE = AudioResampler.resample


class BoundedAudioIO(AudioMediaIO):
    """Refuses a sound for which others leave no room."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._keeper = Keeper()

    def load_bytes(self, data: bytes) -> tuple[npt.NDArray[Any], float]:
        """See MediaIO."""
        self._validate_encoded_size(len(data))
        most = envs.VLLM_MAX_AUDIO_DECODE_BYTES
        num_bytes = _size_of(data)
        if num_bytes is not None and num_bytes > most:
            return super().load_bytes(data)  # vLLM says that it is too long
        with self._keeper.room(most if num_bytes is None else num_bytes, "a sound") as room:
            samples, rate = super().load_bytes(data)
            room.keep_for(samples, samples.nbytes)
        return samples, rate


def answer_other_rates() -> None:
    """Let sounds of another rate than a model's be changed by what is installed, or be the client's fault."""
    AudioResampler.resample = _resample


def _resample(self: AudioResampler, audio: npt.NDArray[Any], *, orig_sr: float) -> npt.NDArray[Any]:
    try:
        return _RESAMPLE(self, audio, orig_sr=orig_sr)
    except (ImportError, RuntimeError) as error:
        if self.method == "torchaudio" and find_spec("av") is not None:
            self.method = "pyav"
            return _resample(self, audio, orig_sr=orig_sr)
        wanted = "another rate" if self.target_sr is None else f"{self.target_sr:g}"
        message = f"The sound has {orig_sr:g} samples a second, the model takes {wanted}: {error}."
        raise VLLMValidationError(message, parameter="audio_url") from error


def _size_of(data: bytes) -> int | None:
    """Bytes of all its samples by a file's head; None where only another decoder can read it."""
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            return int(file.frames) * int(file.channels) * _BYTES_PER_SAMPLE
    except Exception:  # whatever the decoder makes of it; the package may be missing, too
        return None
