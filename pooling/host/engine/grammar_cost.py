# SPDX-License-Identifier: Apache-2.0
"""Bounds what a request's grammar computes, and makes no step of a host wait for it.

A grammar that compiles at once may need seconds for each token: `((.{1,20}){1,20}){1,20}` for its fortieth, more for
each one after, and the next one may take two hundred times as long as the last. No look at its text finds all of these.
So a grammar takes a token and makes the mask for the next one on a side thread, while the model computes. What is not
there when a step needs it is late: `grammar_hold` keeps its request out of steps until it is. What a grammar uses is
measured, and its own request ends in the end. Many such requests share what one may use, so that they cannot take the
cores of the others.

A request that ends because of its grammar says so: its client is told that, and not of an error of the server.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from tokenpool.process.side_call import SideCall, SideCallError, SideCalls
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

logger = logging.getLogger(__name__)
SURE_S = 0.05
"""CPU seconds that a grammar may use over its request's life, beside those of its tokens."""
FREE_S = 1.0
"""CPU seconds that all grammars of a host may use beyond that: they are had anew at the rate `FREE_PART`."""
FREE_PART = 0.02
TOKEN_S = 0.002
"""And for each token. Grammars of people use a twentieth of it or less."""

PATIENCE_S = 0.003
"""How long a step waits for a mask."""
SLOW_S = 0.003
"""A grammar whose last mask took longer is slow: its request waits for the next one outside of steps."""
_MOST_LEFT = 16
"""Calls that go on though nobody waits for them; none that may be slow is begun beside so many."""
_LOOK_S = 0.02

_T = TypeVar("_T")


class Allowance:
    """What the grammars of a host may use beyond what each has for sure; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left_s, self._seen_s = FREE_S, time.monotonic()

    @property
    def left_s(self) -> float:
        """What is left now."""
        with self._lock:
            return self._now_left()

    def take(self, seconds: float) -> float:
        """Take so much, or what is left; returns what was taken."""
        with self._lock:
            taken_s = min(seconds, self._now_left())
            self._left_s -= taken_s
            return taken_s

    def _now_left(self) -> float:
        now_s = time.monotonic()
        self._left_s = min(FREE_S, self._left_s + FREE_PART * (now_s - self._seen_s))
        self._seen_s = now_s
        return self._left_s


_OF_HOST = Allowance()
_CALLS: SideCalls[Any] = SideCalls("grammar", _MOST_LEFT)


class MeteredGrammar(StructuredOutputGrammar):
    """A request's grammar; once it has used its time it computes nothing more, and accepts no token."""

    def __init__(self, grammar: StructuredOutputGrammar, request: Request, allowance: Allowance = _OF_HOST) -> None:
        self._grammar = grammar
        self._request = request
        self._allowance = allowance
        self._left_s = SURE_S
        self._is_new = True
        self.is_slow = False
        """Whether what it computed last took long."""
        self.is_spent = False
        """Whether it has used its time; it is not touched any more then, for a side thread may still have it."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """As the grammar does; False ends the request.

        A grammar that allows no token allows any by mistake, and so does one that has used its time.
        """
        self._left_s += TOKEN_S * len(tokens)
        is_accepted = not self.is_spent and self._accept(request_id, tokens)
        if not is_accepted:
            self._request.stop_reason = GRAMMAR_FAILED
        return is_accepted

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """As the grammar does; none of them when it is spent."""
        return [] if self.is_spent else self._metered(self._grammar.validate_tokens, tokens)

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """As the grammar does; allows all when it is spent: whatever comes, `accept_tokens` ends the request."""
        if not self.is_spent:
            self._fill(bitmask, batch_index)
        if self.is_spent:
            bitmask[batch_index].fill_(-1)

    def _accept(self, request_id: str, tokens: list[int]) -> bool:
        return self._metered(self._grammar.accept_tokens, request_id, tokens)

    def _fill(self, bitmask: torch.Tensor, batch_index: int) -> None:
        if not (self._is_new or self.is_slow):
            self._metered(self._grammar.fill_bitmask, bitmask, batch_index)
        elif _CALLS.is_full:
            self.is_spent = True
        else:
            self._fill_beside(bitmask, batch_index)

    def _fill_beside(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self._is_new = False
        own = bitmask[batch_index : batch_index + 1].clone()  # it may be written when the batch is long over
        try:
            _, used_s = _CALLS.run(lambda: self._grammar.fill_bitmask(own, 0), self._may_use_s)
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

    @property
    def _may_use_s(self) -> float:
        return self._left_s + self._allowance.left_s

    def _used(self, seconds: float) -> None:
        self.is_slow = seconds > SLOW_S
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


class AheadGrammar(MeteredGrammar):
    """One that makes each mask before it is asked for, on a side thread; for requests without drafts.

    A token that its mask allows is accepted at once, before the grammar has taken it.
    """

    def __init__(
        self, grammar: StructuredOutputGrammar, request: Request, row: torch.Tensor, allowance: Allowance = _OF_HOST
    ) -> None:
        """`row` is a bitmask of one row, int32 of shape (1, words). Waits for the first mask as long as it may take.

        Raises ValueError if the grammar raises.
        """
        super().__init__(grammar, request, allowance)
        self._row = row
        self._call: SideCall[tuple[bool, bool]] | None = None
        self._waited_for: SideCall[tuple[bool, bool]] | None = None
        self._has_ended, self._has_failed = False, False
        self.was_late = False
        """Whether a step went on without its mask."""
        self._begin([])
        self._settle()
        if self._has_failed:
            raise ValueError("the grammar gives no mask for the first token")

    @property
    def is_late(self) -> bool:
        """Whether its next mask is still being made; ends it when it has used its time."""
        if self._call is not None:
            self._look(0.0)
        if self._call is not None and self._call.used_s > PATIENCE_S:
            self._call.give_way()
        return self._call is not None

    def wait(self, limit_s: float) -> None:
        """Wait so many seconds at most for its next mask, the first time that this one is asked for."""
        if self._call is not None and self._call is not self._waited_for:
            self._waited_for = self._call
            self._look(limit_s)

    def is_terminated(self) -> bool:
        """As the grammar says, as far as is known."""
        return self._call is None and self._has_ended and not self.is_spent

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """As the grammar does; none of them when it is spent."""
        self._settle()
        return super().validate_tokens(tokens)

    def rollback(self, num_tokens: int) -> None:
        """As the grammar does."""
        self._settle()
        super().rollback(num_tokens)
        self._begin([])

    def reset(self) -> None:
        """As the grammar does; what it has used stays used."""
        self._settle()
        super().reset()
        self._begin([])

    def _accept(self, request_id: str, tokens: list[int]) -> bool:
        self._settle()
        if self.is_spent or self._has_failed:
            return False
        if not self._has_ended:
            if len(tokens) == 1 and not self._allows(tokens[0]):
                return False
            self._begin(tokens)
            if len(tokens) > 1:
                self._settle()
        return not self._has_failed

    def _allows(self, token: int) -> bool:
        word, bit = divmod(token, 32)
        return bool(int(self._row[0, word]) >> bit & 1)

    def _fill(self, bitmask: torch.Tensor, batch_index: int) -> None:
        if self._call is not None:
            self._look(PATIENCE_S)
        if self._call is not None:
            self.was_late = True
            self._call.give_way()
        if self._call is not None or self._has_failed or self._has_ended:
            bitmask[batch_index].fill_(-1)
        elif not self.is_spent:
            bitmask[batch_index].copy_(self._row[0])

    def _begin(self, tokens: list[int]) -> None:
        if self.is_spent:
            return
        gives_way, self._is_new = self._is_new or self.is_slow, False  # no step waits for it
        if _CALLS.is_full and gives_way:
            self.is_spent = True
            return
        # Not this object: once nobody has it, the call is left.
        grammar, row, request_id = self._grammar, self._row, getattr(self._request, "request_id", "")

        def go_on() -> tuple[bool, bool]:
            if tokens and not grammar.accept_tokens(request_id, tokens):
                return False, False
            has_ended = grammar.is_terminated()
            if not has_ended:
                grammar.fill_bitmask(row, 0)
            return True, has_ended

        self._call = _CALLS.begin(go_on)
        if gives_way:
            self._call.give_way()

    def _settle(self) -> None:
        while self._call is not None:
            self._look(_LOOK_S)

    def _look(self, wait_s: float) -> None:
        """Wait so long at most for what is under way; a grammar that raises has failed."""
        call = self._call
        assert call is not None
        if call.wait(wait_s):
            self._call = None
            try:
                is_accepted, self._has_ended = call.result()
            except BaseException:  # whatever it is: no step of others, and no host, ends by it
                logger.exception("a grammar failed request=%s", getattr(self._request, "request_id", ""))
                is_accepted = False
            self._has_failed = not is_accepted
            self._used(call.used_s)
        elif (used_s := call.used_s) > self._may_use_s:
            call.leave()
            self._call, self.is_spent = None, True
            self._used(used_s)
