# SPDX-License-Identifier: Apache-2.0
"""No request waits for the long texts of another tenant to become tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.client.text_lanes import LONG, is_long, use_lanes

pytestmark = pytest.mark.vllm
LONG_TEXT = "x" * LONG


def lanes() -> Any:
    """A renderer's executor with one thread, as vLLM has it."""
    renderer = SimpleNamespace(tokenizer=ThreadSafeHFTokenizerMixin(), _executor=ThreadPoolExecutor(1))
    use_lanes(renderer)  # type: ignore[arg-type]
    return renderer._executor


@contextmanager
def by(owner: str) -> Iterator[None]:
    """What is begun inside is for a request of this tenant."""
    call: Any = SimpleNamespace(account=SimpleNamespace(config=SimpleNamespace(name=owner)))
    token = CURRENT_CALL.set(call)
    try:
        yield
    finally:
        CURRENT_CALL.reset(token)


def submit(executor: Any, owner: str, work: Callable[..., Any], text: str = LONG_TEXT) -> Future[Any]:
    with by(owner):
        return executor.submit(partial(lambda prompt: work(), {"prompt": text}))


def test_short_texts_and_other_tenants_do_not_wait() -> None:
    """One tenant's long text takes for ever: of all others only his own next long one waits for it."""
    executor, ends = lanes(), threading.Event()
    first = submit(executor, "a", lambda: ends.wait(60))
    second = submit(executor, "a", lambda: "second")
    assert submit(executor, "a", lambda: "short", "hello").result(60) == "short"
    assert submit(executor, "b", lambda: "other").result(60) == "other"
    assert not first.done() and not second.done()
    ends.set()
    assert second.result(60) == "second"
    executor.shutdown()


def test_what_a_call_raises_comes_to_its_caller() -> None:
    executor = lanes()
    with pytest.raises(ZeroDivisionError):
        submit(executor, "a", lambda: 1 // 0).result(60)
    assert submit(executor, "a", lambda: 3).result(60) == 3, "its place is free again"
    executor.shutdown()


def test_at_the_end_what_waits_is_dropped_and_nothing_more_is_taken() -> None:
    executor, ends = lanes(), threading.Event()
    runs, waits = submit(executor, "a", lambda: ends.wait(60)), submit(executor, "a", lambda: 1)
    executor.shutdown()
    with pytest.raises(CancelledError):
        waits.result(60)
    with pytest.raises(RuntimeError, match="gone"):
        submit(executor, "a", lambda: 1)
    ends.set()
    assert runs.result(60)


def test_a_tokenizer_that_only_one_may_use_keeps_its_one_thread() -> None:
    executor = ThreadPoolExecutor(1)
    use_lanes(SimpleNamespace(tokenizer=object(), _executor=executor))  # type: ignore[arg-type]
    assert type(executor) is ThreadPoolExecutor
    executor.shutdown()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x" * (LONG - 1), False),
        (LONG_TEXT, True),
        ([1] * LONG, True),
        ([{"role": "user", "content": [{"type": "text", "text": LONG_TEXT}]}], True),
        (["x" * (LONG // 2), {"a": ("y" * (LONG // 2),)}], True),
        ([[]] * 20_000, True),
        ({"prompt": "hello", "more": [1, 2.5, None, True]}, False),
    ],
)
def test_what_is_long(value: Any, expected: bool) -> None:
    """All texts and numbers count, wherever they are, and very many parts too."""
    assert is_long(value) is expected
