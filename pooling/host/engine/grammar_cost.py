# SPDX-License-Identifier: Apache-2.0
"""Bounds the time that a request's grammar takes out of the steps of all requests of a host.

A grammar that compiles at once may need seconds for each token: `((.{1,20}){1,20}){1,20}` for its fortieth, more for
each one after. No look at its text finds all of these, so what it uses is measured, and its own request ends. Many such
requests share what one may use, so that they cannot hold up the others in turn. With the vocabulary of a large model
one bitmask may take a minute, so those that may be slow are made on a side thread, which nobody waits for then.

A request that ends because of its grammar says so: its client is told that, and not of an error of the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from tokenpool.process.side_call import SideCallError, SideCalls
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

SURE_S = 0.05
"""CPU seconds that a grammar may use over its request's life, beside those of its tokens."""
FREE_S = 1.0
"""CPU seconds that all grammars of a host may use beyond that: they are had anew at the rate `FREE_PART`."""
FREE_PART = 0.02
TOKEN_S = 0.002
"""And for each token. Grammars of people use a twentieth of it or less."""

SLOW_S = 0.005
"""A grammar whose last bitmask took longer has the next made on a side thread; each takes little more than the last."""
_MOST_LEFT = 16
"""Bitmasks that are still being made though nobody waits for them; none that may be slow is begun beside so many."""

_T = TypeVar("_T")


class Allowance:
    """What the grammars of a host may use beyond what each has for sure; for the thread that steps."""

    def __init__(self) -> None:
        self._left_s, self._seen_s = FREE_S, time.monotonic()

    @property
    def left_s(self) -> float:
        """What is left now."""
        now_s = time.monotonic()
        self._left_s = min(FREE_S, self._left_s + FREE_PART * (now_s - self._seen_s))
        self._seen_s = now_s
        return self._left_s

    def take(self, seconds: float) -> float:
        """Take so much, or what is left; returns what was taken."""
        taken_s = min(seconds, self.left_s)
        self._left_s -= taken_s
        return taken_s


_OF_HOST = Allowance()
_BITMASKS: SideCalls[None] = SideCalls("bitmask", _MOST_LEFT)


class MeteredGrammar(StructuredOutputGrammar):
    """A request's grammar; once it has used its time it computes nothing more, and accepts no token."""

    def __init__(self, grammar: StructuredOutputGrammar, request: Request, allowance: Allowance = _OF_HOST) -> None:
        self._grammar = grammar
        self._request = request
        self._allowance = allowance
        self._left_s = SURE_S
        self._is_new, self._is_slow = True, False
        self.is_spent = False
        """Whether it has used its time; it is not touched any more then, for a side thread may still have it."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """As the grammar does; False ends the request.

        A grammar that allows no token allows any by mistake, and so does one that has used its time.
        """
        self._left_s += TOKEN_S * len(tokens)
        is_accepted = not self.is_spent and self._metered(self._grammar.accept_tokens, request_id, tokens)
        if not is_accepted:
            self._request.stop_reason = GRAMMAR_FAILED
        return is_accepted

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """As the grammar does; none of them when it is spent."""
        return [] if self.is_spent else self._metered(self._grammar.validate_tokens, tokens)

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """As the grammar does; allows all when it is spent: whatever comes, `accept_tokens` ends the request."""
        if not self.is_spent:
            if not (self._is_new or self._is_slow):
                self._metered(self._grammar.fill_bitmask, bitmask, batch_index)
            elif _BITMASKS.is_full:
                self.is_spent = True
            else:
                self._fill_beside(bitmask, batch_index)
        if self.is_spent:
            bitmask[batch_index].fill_(-1)

    def _fill_beside(self, bitmask: torch.Tensor, batch_index: int) -> None:
        own = bitmask[batch_index : batch_index + 1].clone()  # it may be written when the batch is long over
        self._is_new = False
        try:
            limit_s = self._left_s + self._allowance.left_s
            _, used_s = _BITMASKS.run(lambda: self._grammar.fill_bitmask(own, 0), limit_s)
        except SideCallError as error:
            self.is_spent, used_s = True, error.used_s
        else:
            bitmask[batch_index].copy_(own[0])
        self._used(used_s)

    def _metered(self, call: Callable[..., _T], *args: Any) -> _T:
        began_s = time.thread_time()
        try:
            return call(*args)
        finally:
            self._used(time.thread_time() - began_s)

    def _used(self, seconds: float) -> None:
        self._is_slow = seconds > SLOW_S
        self._left_s -= seconds
        if self._left_s < 0:
            self._left_s += self._allowance.take(-self._left_s)
            self.is_spent = self.is_spent or self._left_s < 0

    def rollback(self, num_tokens: int) -> None:
        """As the grammar does."""
        if not self.is_spent:
            self._grammar.rollback(num_tokens)

    def is_terminated(self) -> bool:
        """As the grammar says; not when it is spent, so that it is asked about the next token."""
        return not self.is_spent and self._grammar.is_terminated()

    def reset(self) -> None:
        """As the grammar does; what it has used stays used."""
        if not self.is_spent:
            self._grammar.reset()
