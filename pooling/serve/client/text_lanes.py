# SPDX-License-Identifier: Apache-2.0
"""Lets no request wait for the long texts of another tenant to become tokens.

vLLM renders, tokenizes and decodes for a model on one thread, in the order of arrival. Two million characters take it
three seconds, and all other requests of the model wait for that long. Here long texts have threads of their own, which
yield the cores, and of which one tenant has a part; short ones do not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

from tokenpool.serve.access.tenant_call import current_tenant
from tokenpool.serve.client.fair_threads import FairThreads

LONG = 1 << 16
"""Characters and tokens of a call from which on it is long: about 60 ms of work on a slow core."""
PLACES, PLACES_EACH = 2, 1
"""Long calls that run at a time, and those of one tenant."""

_MOST_PARTS = 5_000  # a call of more is long, whatever they hold


class _TextLanes(Executor):
    """What a renderer's executor becomes: it hands long calls to another."""

    long: FairThreads

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin `fn` in its lane."""
        given = (fn.args, fn.keywords) if isinstance(fn, partial) else ()
        if is_long((given, args, kwargs)):
            return self.long.submit(current_tenant(), partial(fn, *args, **kwargs))
        return super().submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End both."""
        self.long.shutdown()
        super().shutdown(wait, cancel_futures=cancel_futures)


def use_lanes(renderer: BaseRenderer[Any]) -> None:
    """Give a renderer's long texts threads of their own, if its tokenizer may be used by several."""
    if isinstance(renderer.tokenizer, ThreadSafeHFTokenizerMixin):
        executor: Any = renderer._executor  # its functions hold this very object
        executor.__class__ = type("TextLanes", (_TextLanes, type(executor)), {})
        executor.long = FairThreads("long-texts", PLACES, PLACES_EACH)


def is_long(value: Any) -> bool:
    """Whether the texts and lists of numbers in what a call is given are LONG together; O(`_MOST_PARTS`)."""
    left, stack, size = _MOST_PARTS, [value], 0
    while stack and left >= 0 and size < LONG:
        part = stack.pop()
        is_list = isinstance(part, list | tuple)
        if isinstance(part, str | bytes) or (is_list and part and isinstance(part[0], int | float)):
            size += len(part)
        elif is_list or isinstance(part, Mapping):
            left -= len(part)
            if left >= 0:
                stack.extend(part.values() if isinstance(part, Mapping) else part)
    return left < 0 or size >= LONG
