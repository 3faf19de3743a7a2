# SPDX-License-Identifier: Apache-2.0
"""A grammar that takes seconds for each token ends its own request, before the others have waited long."""

from __future__ import annotations

import hashlib
import queue
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from tokenpool.host.engine import grammar_cost
from tokenpool.host.engine.grammar_cost import AheadGrammar, Allowance, MeteredGrammar
from tokenpool.process.side_call import SideCall, SideCalls
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

pytestmark = pytest.mark.vllm

VOCAB = [chr(i) for i in range(128)] + [f"word{i}" for i in range(128)]


def grammar(regex: str) -> XgrammarGrammar:
    info = xgrammar.TokenizerInfo(VOCAB, vocab_size=len(VOCAB), stop_token_ids=[3])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_regex(regex)
    return XgrammarGrammar(len(VOCAB), xgrammar.GrammarMatcher(compiled), compiled)


def asking() -> Any:
    """What the scheduler keeps of a request."""
    return SimpleNamespace(stop_reason=None)


def drive(metered: MeteredGrammar, steps: int) -> int:
    """The number of tokens until one is refused."""
    mask = xgrammar.allocate_token_bitmask(1, len(VOCAB))
    for step in range(steps):
        metered.fill_bitmask(mask, 0)
        if not metered.accept_tokens("r", [ord("a")]):
            return step
    return steps


def test_one_that_grows_with_each_token_ends() -> None:
    """Its fortieth token would need a second, its sixtieth many."""
    request = asking()
    metered = MeteredGrammar(grammar("((.{1,20}){1,20}){1,20}"), request)
    assert drive(metered, 60) < 60
    assert metered.is_spent and not metered.is_terminated()
    assert request.stop_reason == GRAMMAR_FAILED
    mask = torch.zeros((1, len(VOCAB) // 32), dtype=torch.int32)
    metered.fill_bitmask(mask, 0)
    assert (mask == -1).all(), "a spent one forbids nothing: a row that allows no token has no token to sample"
    assert metered.validate_tokens([97]) == [] and not metered.accept_tokens("r", [97])


@pytest.mark.parametrize("regex", ["[a-z]{1,600}", "(a|b)*", '\\{"a": "[^"]*"\\}|a*'])
def test_one_of_people_is_never_spent(regex: str) -> None:
    request = asking()
    metered = MeteredGrammar(grammar(regex), request, allowance(0.0))
    assert drive(metered, 600) == 600
    assert not metered.is_spent and request.stop_reason is None


class Slow:
    """A grammar whose every call takes so many seconds of a clock."""

    def __init__(self, clock: list[float], costs: list[float]) -> None:
        self.clock, self.costs, self.calls = clock, costs, 0

    def _take(self) -> None:
        self.clock[0] += self.costs[self.calls % len(self.costs)]
        self.calls += 1

    def accept_tokens(self, *_: Any) -> bool:
        self._take()
        return True

    def fill_bitmask(self, *_: Any) -> None:
        self._take()

    def is_terminated(self) -> bool:
        return False


def allowance(left_s: float) -> Allowance:
    """One of which so much is left, and that gets nothing back."""
    made = Allowance()
    made.take(grammar_cost.FREE_S - left_s)
    return made


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=8), st.integers(1, 300), st.floats(0, 1))
def test_what_it_may_use_grows_with_its_tokens_alone(costs: list[float], steps: int, free_s: float) -> None:
    """Whatever its calls cost: at most one call is begun beyond the time that its tokens have earned, and none before
    is refused."""
    clock = [0.0]
    slow = Slow(clock, costs)
    mask = torch.zeros((1, 1), dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_cost, "FREE_PART", 0.0)
        patch.setattr(grammar_cost.time, "thread_time", lambda: clock[0])
        metered = MeteredGrammar(slow, asking(), allowance(free_s))  # type: ignore[arg-type]
        accepted = 0
        for _ in range(steps):
            metered.fill_bitmask(mask, 0)
            if not metered.accept_tokens("r", [1]):
                break
            accepted += 1
    earned = grammar_cost.SURE_S + free_s + grammar_cost.TOKEN_S * accepted
    last = grammar_cost.TOKEN_S if accepted < steps else 0.0
    assert clock[0] <= earned + last + max(costs) + 1e-6
    assert accepted == steps or clock[0] > earned - 1e-6


class Endless:
    """A grammar whose bitmask takes seconds in one call that lets go of the interpreter, as one of C++ does."""

    def __init__(self) -> None:
        self.calls, self.rollbacks = 0, 0
        self.is_done = threading.Event()

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self.calls += 1
        hashlib.pbkdf2_hmac("sha256", b"some", b"salt", 3_000_000)
        bitmask[batch_index].fill_(7)
        self.is_done.set()

    def rollback(self, num_tokens: int) -> None:
        self.rollbacks += 1

    def is_terminated(self) -> bool:
        return False


def test_a_bitmask_that_takes_seconds_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its grammar is spent when its time is over; what it writes in the end reaches no batch."""
    monkeypatch.setattr(grammar_cost, "_CALLS", SideCalls("bitmask", 1))
    known = MeteredGrammar(grammar("(a|b)*"), asking(), allowance(0.0))
    assert drive(known, 20) == 20
    endless, request = Endless(), asking()
    metered = MeteredGrammar(endless, request, allowance(0.0))  # type: ignore[arg-type]
    mask = torch.zeros((2, 8), dtype=torch.int32)
    metered.fill_bitmask(mask, 1)
    assert not endless.is_done.is_set() and metered.is_spent
    metered.rollback(1)
    for _ in range(100):  # tokens give it no time back
        assert not metered.accept_tokens("r", [1])
    assert request.stop_reason == GRAMMAR_FAILED and (endless.calls, endless.rollbacks) == (1, 0)

    known.fill_bitmask(mask, 0)
    assert not known.is_spent, "what is known to be quick is served while as many go on as may"
    new = MeteredGrammar(grammar("(a|b)*"), asking(), allowance(0.0))
    new.fill_bitmask(mask, 0)
    assert new.is_spent, "and what may be slow is not begun"

    assert endless.is_done.wait(60)
    assert (mask == -1).all()


def test_a_side_call_gives_its_result_or_its_own_error() -> None:
    """A TimeoutError of the call is not taken for one of the wait."""
    calls: SideCalls[int] = SideCalls("side", 1)
    assert calls.run(lambda: 3, 1.0)[0] == 3

    def fail() -> int:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        calls.run(fail, 1.0)
    assert not calls.is_full


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 2)), min_size=1, max_size=50))
def test_many_slow_grammars_share_what_one_may_use(asked: list[tuple[float, float]]) -> None:
    """Never more than what is there at the begin and comes back with time, and all of it when it is asked for."""
    now_s, taken_s = 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_cost.time, "monotonic", lambda: now_s)
        shared = Allowance()
        for wait_s, seconds in asked:
            now_s += wait_s
            got_s = shared.take(seconds)
            taken_s += got_s
            assert 0 <= got_s <= seconds
            assert taken_s <= grammar_cost.FREE_S + grammar_cost.FREE_PART * now_s + 1e-9
        now_s += grammar_cost.FREE_S / grammar_cost.FREE_PART
        assert shared.take(grammar_cost.FREE_S) == pytest.approx(grammar_cost.FREE_S)


def test_a_token_that_it_refuses_is_named_as_the_reason() -> None:
    """Also of one that has time left; a token that it takes names nothing."""
    request = asking()
    metered = MeteredGrammar(grammar("ab"), request)
    assert metered.accept_tokens("r", [ord("a")]) and request.stop_reason is None
    assert not metered.accept_tokens("r", [ord("a")])
    assert request.stop_reason == GRAMMAR_FAILED and not metered.is_spent


def ahead(inner: Any, request: Any = None, left_s: float = 0.0) -> AheadGrammar:
    return AheadGrammar(inner, request or asking(), torch.zeros((1, 8), dtype=torch.int32), allowance(left_s))


def drive_ahead(metered: AheadGrammar, steps: int, draw: random.Random) -> list[int]:
    """Tokens as a step samples them, each after its mask is there."""
    mask, tokens = xgrammar.allocate_token_bitmask(1, len(VOCAB)), []
    for _ in range(steps):
        while metered.is_late:
            pass
        if metered.is_terminated():
            break
        metered.fill_bitmask(mask, 0)
        allowed = [i for i in range(len(VOCAB)) if int(mask[0, i // 32]) >> (i % 32) & 1]
        if not allowed or not metered.accept_tokens("r", [draw.choice(allowed)]):
            break
        tokens.append(allowed)
    return tokens


@pytest.mark.parametrize("regex", ["[a-z]{1,40}", "(a|b)*c", "ab|cd", "(a|bc){2,9}d?"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_made_ahead_are_those_that_are_made_when_asked_for(regex: str, seed: int) -> None:
    """Token by token, to the end of the grammar."""
    plain, mask, draw = grammar(regex), xgrammar.allocate_token_bitmask(1, len(VOCAB)), random.Random(seed)
    expected = []
    while len(expected) < 60 and not plain.is_terminated():
        plain.fill_bitmask(mask, 0)
        expected.append([i for i in range(len(VOCAB)) if int(mask[0, i // 32]) >> (i % 32) & 1])
        assert plain.accept_tokens("r", [draw.choice(expected[-1])])
    assert expected == drive_ahead(ahead(grammar(regex)), 60, random.Random(seed))


def test_a_token_that_its_mask_forbids_is_refused() -> None:
    request = asking()
    metered = ahead(grammar("ab"), request)
    assert metered.accept_tokens("r", [ord("a")]) and request.stop_reason is None
    assert not metered.accept_tokens("r", [ord("a")])
    assert request.stop_reason == GRAMMAR_FAILED and not metered.is_spent


class Gated:
    """A grammar whose masks the test lets through, one by one; it computes nothing meanwhile."""

    def __init__(self) -> None:
        self.gates: queue.Queue[int] = queue.Queue()
        self.accepted: list[int] = []

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.accepted += tokens
        return True

    def is_terminated(self) -> bool:
        return False

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        bitmask[batch_index].fill_(self.gates.get(timeout=60))


def test_no_step_waits_for_a_mask_that_is_late() -> None:
    """It allows all meanwhile and says so; the mask of a later step is the right one, and tokens are in order."""
    gated = Gated()
    gated.gates.put(2)
    metered = ahead(gated)
    mask = torch.zeros((2, 8), dtype=torch.int32)
    metered.fill_bitmask(mask, 1)
    assert (mask[1] == 2).all() and not metered.was_late
    assert metered.accept_tokens("r", [1])
    metered.fill_bitmask(mask, 1)
    assert (mask[1] == -1).all() and metered.was_late and metered.is_late
    gated.gates.put(4)
    while metered.is_late:
        pass
    metered.fill_bitmask(mask, 0)
    assert (mask[0] == 4).all() and gated.accepted == [1]


def test_each_mask_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is late for many steps makes only the first of them wait."""
    gated, limits = Gated(), []
    gated.gates.put(2)
    metered = ahead(gated)
    wait = SideCall.wait
    monkeypatch.setattr(SideCall, "wait", lambda call, limit_s: limits.append(limit_s) or wait(call, limit_s))
    for _ in range(2):
        assert metered.accept_tokens("r", [1])
        for _ in range(3):
            metered.wait(0.001)
            assert metered.is_late
        gated.gates.put(2)
        while metered.is_late:
            pass
    assert [limit_s for limit_s in limits if limit_s] == [0.001] * 2


def test_one_that_is_late_for_seconds_is_spent_without_a_step() -> None:
    """Looking at it is enough; its call is left, and counts among those that go on."""
    calls: SideCalls[Any] = SideCalls("grammar", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_cost, "_CALLS", calls)
        endless, request = Endless(), asking()
        metered = ahead(endless, request)
        assert metered.is_spent and not metered.is_late and calls.is_full
        assert not metered.accept_tokens("r", [1]) and request.stop_reason == GRAMMAR_FAILED
        assert endless.is_done.wait(60)


class Panic(BaseException):
    """As code in Rust raises it: no Exception."""


class Failing(Gated):
    """One that raises when it takes its third token, or makes the mask after that."""

    def __init__(self, error: BaseException, place: str) -> None:
        super().__init__()
        self.error, self.place = error, place

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        super().accept_tokens(request_id, tokens)
        if self.place == "token" and len(self.accepted) == 3:
            raise self.error
        return True

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        if self.place == "mask" and len(self.accepted) == 3:
            raise self.error
        bitmask[batch_index].fill_(2)


@pytest.mark.parametrize("place", ["token", "mask"])
@pytest.mark.parametrize("error", [RuntimeError("of its making"), Panic("index out of bounds"), SystemExit(1)])
def test_one_that_raises_ends_its_request_and_no_step(error: BaseException, place: str) -> None:
    """The next token is not taken by the mask of the one before, and whoever looks at it goes on."""
    request, mask = asking(), torch.zeros((1, 8), dtype=torch.int32)
    metered = ahead(Failing(error, place), request, 5.0)
    for _ in range(3):
        assert metered.accept_tokens("r", [1]) and request.stop_reason is None
        while metered.is_late:
            pass
    metered.fill_bitmask(mask, 0)
    assert (mask == -1).all() and not metered.is_terminated()
    assert not metered.accept_tokens("r", [1])
    assert request.stop_reason == GRAMMAR_FAILED


def test_one_that_raises_at_once_is_not_made() -> None:
    failing = Failing(Panic("index out of bounds"), "mask")
    failing.accepted = [1, 2, 3]
    with pytest.raises(ValueError, match="no mask for the first token"):
        ahead(failing)


def test_whoever_drops_a_grammar_leaves_its_call() -> None:
    """A request that has ended has nobody who looks at what its grammar still computes."""
    calls: SideCalls[Any] = SideCalls("grammar", 1)
    gate = threading.Event()
    handle = calls.begin(lambda: gate.wait(60))
    assert not calls.is_full
    del handle
    assert calls.is_full
    gate.set()
    again = calls.begin(lambda: None)
    while calls.is_full:
        pass
    assert again.wait(60)
