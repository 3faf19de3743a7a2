# SPDX-License-Identifier: Apache-2.0
"""Images are judged by their heads, share a budget of pixels while they live, and bad ones are the client's fault."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import random
import struct
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile
from PIL import Image
from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import connector

from tests.helpers.inputs.hostile_files import headed_png, icon, many_scans
from tests.helpers.inputs.media import data_url, png
from tests.serve.access.test_tenants import Pool, tenant
from tests.serve.media.conftest import BYTES, SIDE
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import CURRENT_CALL

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("small_budget")]


def square(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def broken(file: bytes, rng: random.Random) -> bytes:
    """The file with a few other bytes, mostly in its head."""
    changed = bytearray(file)
    for _ in range(rng.choice((1, 2, 4, 16))):
        changed[rng.randrange(min(len(changed), 128))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(changed)


def fetch(url: str) -> Any:
    """As a chat's renderer fetches an image."""
    return connector.MEDIA_CONNECTOR_REGISTRY.load("http").fetch_image_async(url)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (1, 170_000_000), (170_000_000, 1)])
def test_a_head_that_promises_too_much_is_refused(size, small_budget, monkeypatch) -> None:
    """As bad input, before anything is unpacked."""
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(VLLMValidationError, match="pixels"):
        asyncio.run(fetch(data_url(headed_png(*size), "image/png")))
    assert small_budget.num_bytes == 0


@pytest.mark.parametrize(
    "inner", [headed_png(20_000, 20_000), struct.pack("<IiiHH", 40, 20_000, 40_000, 1, 8) + b"x" * 80]
)
def test_what_is_in_an_icon_is_judged(inner: bytes, small_budget: ByteShares) -> None:
    """Its directory says 16 x 16: nothing of the large one is unpacked."""
    with pytest.raises(VLLMValidationError, match="20000x20000 pixels"):
        asyncio.run(fetch(data_url(icon(inner), "image/x-icon")))
    assert small_budget.num_bytes == 0
    loaded = asyncio.run(fetch(data_url(icon(png(3)), "image/x-icon")))
    assert loaded.media.size == Image.open(io.BytesIO(png(3))).size


def test_an_image_of_many_scans_is_refused(small_budget: ByteShares) -> None:
    """Each costs the time of an image; what encoders make is taken."""
    with pytest.raises(VLLMValidationError, match="210 scans, at most 100"):
        asyncio.run(fetch(data_url(many_scans(SIDE, 200), "image/jpeg")))
    assert asyncio.run(fetch(data_url(many_scans(SIDE, 2), "image/jpeg"))).media.size == (SIDE, SIDE)


@pytest.mark.parametrize("data", [b"", b"text", headed_png(0, 0), headed_png(90, 90), png(1)[:60]])
def test_a_broken_image_takes_nothing(data: bytes, small_budget: ByteShares) -> None:
    """It is refused as vLLM refuses it."""
    with pytest.raises(ValueError):
        asyncio.run(fetch(data_url(data, "image/png")))
    assert small_budget.num_bytes == 0


def test_broken_images_of_all_formats_are_bad_input(small_budget: ByteShares) -> None:
    """Bytes of files of each format are changed at random: they are read, or are the client's fault."""
    rng, image = random.Random(7), Image.effect_noise((24, 24), 50)
    Image.init()
    files = []
    for kind in sorted(Image.SAVE):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it wants another mode, or several images
            image.save(file := io.BytesIO(), kind)
            files.append(file.getvalue())
    assert len(files) > 10

    async def main() -> None:
        for file in files * 20:
            with contextlib.suppress(ValueError, VLLMValidationError, GracefulHTTPError):
                await fetch(data_url(broken(file, rng), "image/png"))

    asyncio.run(main())
    gc.collect()
    assert small_budget.num_bytes == 0


def test_broken_sounds_are_bad_input(small_budget: ByteShares) -> None:
    """The same with what soundfile writes; for what it does not know vLLM asks a package that may not be there."""
    small_budget.max_bytes = 1 << 30
    rng, samples, files = random.Random(7), np.zeros((800, 2), np.float32), []
    for kind in sorted(soundfile.available_formats().keys() - {"SD2"}):  # which writes a second file
        with contextlib.suppress(soundfile.SoundFileError, ValueError, TypeError):  # it wants other samples
            soundfile.write(file := io.BytesIO(), samples, 16_000, format=kind)
            files.append(file.getvalue())
    assert len(files) > 10
    medium = connector.MEDIA_CONNECTOR_REGISTRY.load("http")

    async def main() -> None:
        for file in [b"", b"text", *files * 20]:
            with contextlib.suppress(ValueError, VLLMValidationError):
                await medium.fetch_audio_async(data_url(broken(file or b"x", rng), "audio/wav"))

    asyncio.run(main())
    gc.collect()
    assert small_budget.num_bytes == 0


def test_a_long_url_is_refused_before_it_is_asked_for(monkeypatch) -> None:
    """vLLM logs it whole, at each attempt; data in a URL may be long."""
    asked = []
    monkeypatch.setattr(connector.global_http_connection, "async_get_bytes", lambda *args, **options: asked.append(1))
    with pytest.raises(VLLMValidationError, match="URL has 8193 characters, at most 8192"):
        asyncio.run(fetch("http://none.invalid/".ljust(8193, "a")))
    assert not asked


def test_pixels_count_for_as_long_as_they_live(small_budget: ByteShares) -> None:
    """One more than fits is refused with 503; those that are gone make room."""

    async def main() -> None:
        images = [await fetch(data_url(square(i), "image/png")) for i in range(4)]
        assert small_budget.num_bytes == 4 * BYTES
        with pytest.raises(GracefulHTTPError, match="too little room") as caught:
            await fetch(data_url(square(9), "image/png"))
        assert caught.value.http_status == 503
        del images[0]
        gc.collect()
        assert small_budget.num_bytes == 3 * BYTES
        assert (await fetch(data_url(square(9), "image/png"))).media.size == (SIDE, SIDE)

    asyncio.run(main())


def test_a_tenant_leaves_room_for_others(small_budget: ByteShares) -> None:
    """It has what it leaves free at most; another one finds some."""
    accounts = Pool(tenant("many"), tenant("few")).book.accounts

    async def of(name: str) -> Any:
        call = accounts[name].begin({"type": "http", "method": "POST"}, "m", 0)
        token = CURRENT_CALL.set(call)
        try:
            return await fetch(data_url(square(1), "image/png"))
        finally:
            CURRENT_CALL.reset(token)
            call.close()

    async def main() -> None:
        kept = [await of("many"), await of("many")]
        with pytest.raises(GracefulHTTPError):
            await of("many")
        kept.append(await of("few"))
        assert small_budget.num_bytes == 3 * BYTES

    asyncio.run(main())


def test_media_that_cannot_be_had_are_the_clients_fault(monkeypatch) -> None:
    """A host that nobody knows or that refuses, and files where none are allowed: no error of the server."""
    for error in (aiohttp.ClientConnectionError("no such host"), aiohttp.ServerDisconnectedError(), TimeoutError()):

        async def get(*args: Any, error: Exception = error, **options: Any) -> bytes:
            raise error

        monkeypatch.setattr(connector.global_http_connection, "async_get_bytes", get)
        with pytest.raises(VLLMUnprocessableEntityError, match="Failed to fetch"):
            asyncio.run(fetch("http://none.invalid/x.png"))
    for what in ("image", "audio", "video"):
        load = getattr(connector.MEDIA_CONNECTOR_REGISTRY.load("http"), f"fetch_{what}_async")
        with pytest.raises(VLLMValidationError, match="local files"):
            asyncio.run(load("file:///etc/passwd"))
