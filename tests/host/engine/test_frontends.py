# SPDX-License-Identifier: Apache-2.0
"""A frontend that is gone is forgotten by every engine that can, whatever the others do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.errors import HostError

pytestmark = pytest.mark.vllm


def test_each_model_drops_the_frontend_and_each_failure_is_told() -> None:
    """One engine that fails to keeps no other from it; the error names it with its reason."""
    from tokenpool.host.frontends import detach_frontend

    dropped: list[tuple[str, int]] = []

    def core(name: str) -> Any:
        def detach(index: int) -> None:
            if name == "b":
                raise TimeoutError("busy")
            dropped.append((name, index))

        return SimpleNamespace(core=SimpleNamespace(detach=detach))

    host: Any = SimpleNamespace(models={name: core(name) for name in "abc"})
    with pytest.raises(HostError, match="1 of 3 models did not drop frontend 4: b: TimeoutError: busy"):
        detach_frontend(host, 4)
    assert [("a", 4), ("c", 4)] == dropped


def test_an_input_thread_that_is_busy_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks it for something learns that it is busy, and for how long."""
    from tokenpool.host.engine import input_receiver

    monkeypatch.setattr(input_receiver, "_JOIN_LIMIT_S", 0.05)
    core: Any = SimpleNamespace(tensor_ipc_receiver=None)
    receiver = input_receiver.InputReceiver(core)  # nobody runs it
    with pytest.raises(HostError, match=r"input thread has been busy for 0\.05 s"):
        receiver.detach(0)
