# SPDX-License-Identifier: Apache-2.0
"""`AsyncLLM` makes its engine client by name: while a pooled one is built, the pool hands in its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tokenpool.patches.base import Patch, known

_client: ContextVar[Any] = ContextVar("tokenpool_engine_client", default=None)


@contextmanager
def handing_in(client: Any) -> Iterator[None]:
    """Let the `AsyncLLM` that is built in this context take `client` as its `engine_core`."""
    token = _client.set(client)
    try:
        yield
    finally:
        _client.reset(token)


def _replacement(original: Any) -> Any:
    def make_async_mp_client(*args: Any, **options: Any) -> Any:
        client = _client.get()
        return original(*args, **options) if client is None else client

    return staticmethod(make_async_mp_client)


PATCH = Patch(
    name="engine_client",
    target="vllm.v1.engine.core_client:EngineCoreClient.make_async_mp_client",
    hashes=known(
        v0_32_0="d18e1f71512d27dea4fd79aec67c003c65d8e0ff7437e958085a1c8653d9d8cf",
        v0_29_0="974244c0c29aea1d2457b308cc7c48b7b0e5f8a3aba4a5b54e4c6a2165856b2a",
    ),
    reason="a model's requests outlive the engine that has them and may be spread over several engines",
    removal="`AsyncLLM` takes an engine client",
    sites=("vllm.v1.engine.core_client:EngineCoreClient.make_async_mp_client",),
    replacement=_replacement,
)
