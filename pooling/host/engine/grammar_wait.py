# SPDX-License-Identifier: Apache-2.0
"""How long a request waits for its grammar to be compiled: on a thread of vLLM's, which nobody can end."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, InvalidStateError
from typing import Any

from vllm.v1.request import Request

GRAMMAR_LIMIT_S = 60.0
"""A request whose grammar takes longer ends with an error; the large schemas of people take seconds."""


def limited(compiling: Future[Any], limit_s: float = GRAMMAR_LIMIT_S) -> Future[Any]:
    """A future that ends as `compiling` does, or with TimeoutError after the limit."""
    if compiling.done():
        return compiling
    ending: Future[Any] = Future()
    error = TimeoutError(f"the grammar was not compiled within {limit_s:g} s: use a simpler one")
    timer = threading.Timer(limit_s, _end, (ending, None, error))
    timer.daemon = True
    timer.start()

    def copy_end(_: Future[Any]) -> None:
        timer.cancel()
        error = compiling.exception() if not compiling.cancelled() else RuntimeError("the model is being removed")
        _end(ending, None if error else compiling.result(), error)

    compiling.add_done_callback(copy_end)
    return ending


def _end(future: Future[Any], result: Any, error: BaseException | None) -> None:
    with contextlib.suppress(InvalidStateError):  # the other one, the timer or the compiler, was faster
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def pending_grammar(request: Request) -> Future[Any] | None:
    """The grammar of a request while it is being compiled, else None."""
    structured = request.structured_output_request
    grammar = structured._grammar if structured is not None else None
    return grammar if isinstance(grammar, Future) and not grammar.done() else None
