# SPDX-License-Identifier: Apache-2.0
"""Images are judged by their heads, share a budget of pixels while they live, and bad ones are the client's fault."""

from __future__ import annotations

import asyncio
import gc
import io
import struct
import zlib
from typing import Any

import aiohttp
import pytest
from PIL import Image
from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import connector

from tests.helpers.inputs.media import data_url, png
from tests.serve.access.test_tenants import Pool, tenant
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.media import image_bounds

pytestmark = pytest.mark.vllm

SIDE = 100
BYTES = 4 * SIDE * SIDE


def headed(width: int, height: int) -> bytes:
    """A PNG file that says so, and has nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


def square(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def small_budget(monkeypatch: pytest.MonkeyPatch) -> ByteShares:
    """Four squares fit."""
    shares = ByteShares(4 * BYTES)
    monkeypatch.setattr(image_bounds, "LIVE", shares)
    monkeypatch.setattr(connector, "ImageMediaIO", connector.ImageMediaIO)
    before = dict(connector.MEDIA_CONNECTOR_REGISTRY.name2class)
    image_bounds.bound_media()
    yield shares
    connector.MEDIA_CONNECTOR_REGISTRY.name2class.update(before)


def fetch(url: str) -> Any:
    """As a chat's renderer fetches an image."""
    return connector.MEDIA_CONNECTOR_REGISTRY.load("http").fetch_image_async(url)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (1, 170_000_000), (170_000_000, 1)])
def test_a_head_that_promises_too_much_is_refused(size, small_budget, monkeypatch) -> None:
    """As bad input, before anything is unpacked."""
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(VLLMValidationError, match="pixels"):
        asyncio.run(fetch(data_url(headed(*size), "image/png")))
    assert small_budget.num_bytes == 0


@pytest.mark.parametrize("data", [b"", b"text", headed(0, 0), headed(90, 90), png(1)[:60]])
def test_a_broken_image_takes_nothing(data: bytes, small_budget: ByteShares) -> None:
    """It is refused as vLLM refuses it."""
    with pytest.raises(ValueError):
        asyncio.run(fetch(data_url(data, "image/png")))
    assert small_budget.num_bytes == 0


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
    with pytest.raises(VLLMValidationError, match="local files"):
        asyncio.run(fetch("file:///etc/passwd"))
