# SPDX-License-Identifier: Apache-2.0
"""vLLM's media loaders within the pool's bounds, and a budget that is easily full."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tokenpool.serve.access.byte_shares import ByteShares

SIDE = 100
BYTES = 4 * SIDE * SIDE


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[ByteShares]:
    """Four square images fit."""
    # pytest keeps what is logged, and with an error the frames that it went through, and their samples
    caplog.set_level(logging.ERROR, logger="vllm.multimodal.media.audio")
    from PIL import Image
    from vllm.multimodal.audio import AudioResampler
    from vllm.multimodal.media import connector
    from vllm.multimodal.video_decoders import opencv

    from tokenpool.serve.media import live_media
    from tokenpool.serve.media.bounded_media import bound_media

    shares = ByteShares(4 * BYTES)
    monkeypatch.setattr(live_media, "LIVE", shares)
    for name in ("ImageMediaIO", "AudioMediaIO", "VideoMediaIO"):
        monkeypatch.setattr(connector, name, getattr(connector, name))
    monkeypatch.setattr(AudioResampler, "resample", AudioResampler.resample)
    monkeypatch.setattr(opencv, "OpenCVVideoBackendMixin", opencv.OpenCVVideoBackendMixin)
    monkeypatch.setattr(opencv, "BytesIO", opencv.BytesIO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    before = dict(connector.MEDIA_CONNECTOR_REGISTRY.name2class)
    bound_media()
    yield shares
    connector.MEDIA_CONNECTOR_REGISTRY.name2class.update(before)
