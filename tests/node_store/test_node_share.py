# SPDX-License-Identifier: Apache-2.0
"""A host gives its node no more of its memory than is wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.host import node_share
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.wire.spec import HostConfig

pytestmark = pytest.mark.vllm

BUDGET = 1000


@given(st.lists(st.sampled_from(["ask", "ask", "turn"]), max_size=30), st.integers(1, 300))
def test_what_is_wanted_is_given_once_however_late_the_loop_comes_to_it(events: list[str], wanted: int) -> None:
    """The keeper's side asks once a second for what is missing; a loop in a long step or build hears of it late."""
    ledger, calls, told = HostLedger(BUDGET), deque[tuple[Callable[[], Any], Future[Any]]](), list[Any]()
    ledger.take("models without work", HostUse.WEIGHTS, BUDGET)

    def give_back(nbytes: int) -> None:
        ledger.give("models without work", HostUse.WEIGHTS, min(nbytes, BUDGET - ledger.free_bytes))

    def call(function: Callable[[], Any]) -> Future[Any]:
        calls.append((function, Future()))
        return calls[-1][1]

    def turn() -> None:
        while calls:
            function, future = calls.popleft()
            future.set_result(function())

    def store(folder: Any, budget: int, on_wanted: Callable[[int], None], register: Any) -> Any:
        told.append(on_wanted)
        return SimpleNamespace(start=lambda: None, cover=lambda nbytes: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_share, "NodeStore", store)
        config = HostConfig(1 << 20, 1 << 16, movable_weights=True, host_store="test")
        room, device = SimpleNamespace(give_back=give_back), SimpleNamespace(register_host=None)
        node_share.join_node(config, ledger, room, call, device)  # type: ignore[arg-type]
    for event in events:
        if event == "turn":
            turn()
        elif missing := max(0, wanted - ledger.free_bytes):
            told[0](missing)
    turn()
    assert ledger.free_bytes == (wanted if "ask" in events else 0)
