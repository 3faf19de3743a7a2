# SPDX-License-Identifier: Apache-2.0
"""A warm-up gives way before each dummy run and each graph, and leaves the runner as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tokenpool.host.engine.giving_way import giving_way

pytestmark = pytest.mark.vllm


class Runner:
    """As much of a model runner as is warmed up."""

    def __init__(self) -> None:
        self.did: list[object] = []
        self.cudagraph_manager = SimpleNamespace(_capture_descs={"PIECEWISE": [8, 4], "FULL": [2]})

    def _dummy_run(self, num_tokens: int) -> int:
        self.did.append(num_tokens)
        return num_tokens

    def capture(self) -> None:
        for graphs in self.cudagraph_manager._capture_descs.values():
            for graph in graphs:
                self.did.append(f"graph {graph}")


def test_pauses_come_before_each_part():
    """Of a runner with a manager of graphs; a failure leaves it as it was."""
    runner = Runner()
    with pytest.raises(RuntimeError), giving_way(runner, lambda: runner.did.append("pause")):
        assert 16 == runner._dummy_run(16)
        runner.capture()
        raise RuntimeError
    assert ["pause", 16, "pause", "graph 8", "pause", "graph 4", "pause", "graph 2"] == runner.did
    runner.did.clear()
    runner._dummy_run(1)
    runner.capture()
    assert [1, "graph 8", "graph 4", "graph 2"] == runner.did
    assert "_dummy_run" not in vars(runner)


def test_a_runner_without_a_manager_of_graphs():
    """The first runner captures graphs in dummy runs."""
    runner = Runner()
    del runner.cudagraph_manager
    with giving_way(runner, lambda: runner.did.append("pause")):
        runner._dummy_run(2)
    assert ["pause", 2] == runner.did


def test_the_second_runner_has_what_is_paused():
    """By its source: graphs are captured in a loop over the lists that are replaced."""
    import inspect

    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    source = inspect.getsource(CudaGraphManager.capture)
    assert "descs = self._capture_descs[mode]" in source
    assert "for desc in descs:" in source
