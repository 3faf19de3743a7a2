# SPDX-License-Identifier: Apache-2.0
"""Says for which pooled model an engine is being built right now; patches do nothing when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class BuildContext(Protocol):
    """What the patched names of vLLM, and our workers, call while an engine is built."""

    movable_weights: bool
    """Whether `adopt_weights` will move the model's weights: they must be loaded so that they can be."""

    def make_block_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for `vllm.v1.core.block_pool.BlockPool(...)`."""

    def allocate_kv_cache(self, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any) -> dict[str, Any]:
        """Stand in for `vllm.v1.worker.utils.allocate_kv_cache`: layer name -> view of the arena."""

    def adopt_weights(self, model_runner: Any) -> None:
        """Take over the weights of a model just loaded, before anything is computed with them."""

    def expect_blocks(self, block_bytes: int) -> None:
        """Say how large a KV block will be, 0 = not known, before anything is compiled; may refuse the model."""

    def pause(self) -> None:
        """Give way to models that run, at a point where nothing of the process is half done."""

    def enter_phase(self, phase: str) -> None:
        """Say what the build does from now on, for people who wait for it."""


_current: ContextVar[BuildContext | None] = ContextVar("tokenpool_build_context", default=None)


def current_build() -> BuildContext | None:
    """The build in progress on this thread, or None."""
    return _current.get()


@contextmanager
def building(context: BuildContext) -> Iterator[None]:
    """Make `context` the build in progress."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
