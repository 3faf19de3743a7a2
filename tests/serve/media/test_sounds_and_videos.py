# SPDX-License-Identifier: Apache-2.0
"""Sounds and videos share the budget of images while they live, and what lies about itself is bad input."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal import audio, parse
from vllm.multimodal.media import connector

from tests.helpers.inputs.hostile_files import avi, headed_png, silence
from tests.helpers.inputs.media import data_url, png
from tests.helpers.server import poll
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.media import sound_bounds, video_bounds

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("small_budget")]


def load(kind: str, url: str, **options: Any) -> Any:
    """As a chat's renderer loads it."""
    loader = connector.MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs=options)
    return asyncio.run(getattr(loader, f"fetch_{kind}_async")(url))


def play(file: bytes, **options: Any) -> Any:
    return load("video", data_url(file, "video/avi"), video=options).media[0]


def until_free(shares: ByteShares) -> None:
    """Nothing is held any more, also by the thread that decoded: it may let go of its result after it has told it."""

    def held() -> int:
        gc.collect()
        return shares.num_bytes

    poll(held, until=lambda num_bytes: num_bytes == 0)


def test_sounds_count_for_as_long_as_they_live(small_budget: ByteShares) -> None:
    """A minute of silence has a few kilobytes as a file, and two megabytes of samples."""
    small_budget.max_bytes = 5 << 20
    url = data_url(silence(60), "audio/flac")
    assert len(url) < 100_000
    sounds = [load("audio", url) for _ in range(2)]
    assert small_budget.num_bytes == sum(samples.nbytes for samples, _ in sounds) == 2 * 4 * 60 * 8000
    with pytest.raises(GracefulHTTPError, match="too little room for a sound") as caught:
        load("audio", url)
    assert caught.value.http_status == 503
    del sounds, caught
    until_free(small_budget)
    load("audio", url)


def test_a_sound_of_hours_is_bad_input(small_budget: ByteShares) -> None:
    """Also where there is no room for it: another time it would be no better."""
    with pytest.raises(VLLMValidationError, match="a sound takes 19200000 bytes"):
        load("audio", data_url(silence(600), "audio/flac"))
    small_budget.max_bytes = 1 << 30
    with pytest.raises(ValueError, match="exceeds maximum"):
        load("audio", data_url(silence(1200), "audio/flac"))
    until_free(small_budget)


@pytest.mark.parametrize("there", [(), ("av",)])
def test_rates_are_changed_by_what_is_there(there: tuple[str, ...], monkeypatch) -> None:
    """vLLM asks torchaudio, which is not there beside CPU wheels of torch; the model's own rate needs nothing."""
    samples = np.zeros(800, np.float32)

    def missing(*args: Any, **options: Any) -> None:
        raise ImportError("no torchaudio")

    monkeypatch.setattr(sound_bounds, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(audio, "resample_audio_torchaudio", missing)
    monkeypatch.setattr(audio, "resample_audio_pyav", lambda given, **rates: given[:3] if there else missing())
    resampler = parse.MultiModalDataParser(target_sr=16_000).audio_resampler
    assert resampler.resample(samples, orig_sr=16_000) is samples
    if there:
        assert len(resampler.resample(samples, orig_sr=44_100)) == 3
        return
    with pytest.raises(VLLMValidationError, match="has 44100 samples a second, the model takes 16000: no torchaudio"):
        resampler.resample(samples, orig_sr=44_100)


def test_videos_count_for_as_long_as_they_live(small_budget: ByteShares) -> None:
    """What a request samples is taken before a frame is read."""
    frames = play(avi(32, 8))
    assert small_budget.num_bytes == frames.nbytes == 8 * 32 * 32 * 3
    part = frames[2:]
    del frames
    gc.collect()
    assert small_budget.num_bytes == 8 * 32 * 32 * 3, "a part of it keeps it whole"
    del part
    until_free(small_budget)
    with pytest.raises(VLLMValidationError, match="a video of 60 frames of 32x32 pixels takes 184320 bytes"):
        play(avi(32, 60), num_frames=-1)
    until_free(small_budget)


class Claims:
    """A video that says how many frames it has, and has none that can be read, as OpenCV tells of it."""

    def __init__(self, count: int) -> None:
        self.told = {3: 32, 4: 32, 5: 25.0, 7: count}

    def get(self, number: int) -> float:
        return self.told.get(number, 0.0)

    def set(self, number: int, value: float) -> bool:
        return False

    def grab(self) -> bool:
        return False


@pytest.mark.parametrize("claimed", [2**31 - 1, video_bounds.MAX_FRAMES + 1])
def test_a_video_that_says_too_much_is_refused(claimed: int, small_budget: ByteShares, monkeypatch) -> None:
    """Before anything is made for each of its frames, where vLLM cannot find out that it does not have them."""
    monkeypatch.setattr(
        video_bounds.OpenCVVideoBackendMixin, "open_video_capture", classmethod(lambda cls, data: Claims(claimed))
    )
    with pytest.raises(VLLMValidationError, match=f"has {claimed} frames"):
        play(b"video", num_frames=-1)
    until_free(small_budget)


def test_a_video_is_not_read_beyond_its_end(small_budget: ByteShares, monkeypatch) -> None:
    """It says that it has a hundred thousand frames, and has none."""
    monkeypatch.setattr(
        video_bounds.OpenCVVideoBackendMixin, "open_video_capture", classmethod(lambda cls, data: Claims(100_000))
    )
    with pytest.raises(VLLMValidationError, match="1001 frames in a row that cannot be read"):
        play(b"video")
    until_free(small_budget)


def test_a_slow_video_is_given_up(small_budget: ByteShares, monkeypatch) -> None:
    """Each frame is asked whether there is still time for it."""
    monkeypatch.setattr(video_bounds, "MAX_READ_S", -1.0)
    with pytest.raises(VLLMValidationError, match="longer than"):
        play(avi(32, 4))
    until_free(small_budget)


def test_frames_that_come_as_images_count(small_budget: ByteShares) -> None:
    """By their heads, all of them together, before one is unpacked."""
    sent = data_url(png(3), "video/jpeg")
    frames = ",".join([sent, *[sent.partition(",")[2]] * 3])
    loaded = load("video", frames)
    assert small_budget.num_bytes == loaded.media[0].nbytes > 0
    many = ",".join([sent, *[data_url(headed_png(90, 90), "x/y").partition(",")[2]] * 30])
    with pytest.raises(VLLMValidationError, match="a video of 31 frames takes"):
        load("video", many)
    del loaded
    until_free(small_budget)


def test_a_place_before_the_start_is_bad_input(small_budget: ByteShares) -> None:
    """The size of its stream's header leads there; reading must not raise within OpenCV, which ends the process."""
    file = avi(32, 6)
    at = file.index(b"strh") + 4
    size = struct.pack("<i", struct.unpack_from("<i", file, at)[0] - (1 << 24))
    with pytest.raises(ValueError, match="Could not open"):
        play(file[:at] + size + file[at + 4 :])
    until_free(small_budget)


def test_broken_videos_are_bad_input(small_budget: ByteShares) -> None:
    """Bytes are changed at random: a video is read, or it is the client's fault."""
    rng, file = random.Random(7), avi(32, 6)
    for _ in range(60):
        changed = bytearray(file)
        for _ in range(rng.choice((1, 4, 16))):
            changed[rng.randrange(rng.choice((300, len(changed))))] = rng.choice((0, 1, 127, 128, 255))
        with contextlib.suppress(ValueError, VLLMValidationError, GracefulHTTPError):
            play(bytes(changed))
    until_free(small_budget)


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_broken_embeddings_are_bad_input(kind: str) -> None:
    """They come as files of torch or numpy, whose readers raise errors of their own."""
    rng, made = random.Random(7), []
    for write in (torch.save, lambda tensor, file: np.save(file, tensor.numpy())):
        write(torch.zeros(4, 8), file := io.BytesIO())
        made.append(file.getvalue())
    fetch = getattr(connector.MEDIA_CONNECTOR_REGISTRY.load("http"), f"fetch_{kind}_embedding_async")
    for data in [b"", b"x", *(made * 30)]:
        changed = bytearray(data)
        for _ in range(4 if data in made else 0):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(ValueError, TypeError, VLLMValidationError):
            asyncio.run(fetch(base64.b64encode(changed).decode()))
