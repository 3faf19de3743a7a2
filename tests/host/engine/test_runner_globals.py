# SPDX-License-Identifier: Apache-2.0
"""Engines step and close with their own values of what vLLM keeps once per process, whatever the host did before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.cases import greedy, make_cases

pytestmark = pytest.mark.vllm


def test_a_model_that_comes_and_goes_leaves_the_others_workspace_alone(tmp_path):
    """A model keeps its workspace, which its CUDA graphs point into; one that closes resets its own."""
    from vllm.v1.worker import workspace

    from tests.helpers.pooled import PooledModels

    case = make_cases(tmp_path, ("llama",), greedy(2, 20))["llama"]
    pooled = PooledModels(16 << 20, 256 << 10)
    seen = []

    def watch(name: str) -> None:
        """Note the workspace at each step of the model's runner, and when it closes."""
        runner = pooled.host.models[name].core.model_executor.driver_worker.worker.model_runner
        execute_model, shutdown = runner.execute_model, runner.shutdown

        def execute(*args, **kwargs):
            seen.append((name, workspace._manager))
            return execute_model(*args, **kwargs)

        def close():
            seen.append((f"close {name}", workspace._manager))
            shutdown()
            assert workspace._manager is None

        runner.execute_model, runner.shutdown = execute, close

    def add(name: str) -> None:
        pooled.add(replace(case, name=name))
        workspace._manager = f"workspace of {name}"  # as a GPU worker does while its engine is built
        watch(name)

    add("stays")
    for request in case.requests:
        pooled.submit_one("stays", request, [])
    for _ in range(3):
        pooled.run_once()
    add("goes")
    for _ in range(3):
        pooled.run_once()
    pooled.host.remove_model("goes")
    pooled.run()
    assert 20 < len(seen)
    assert {("stays", "workspace of stays"), ("close goes", "workspace of goes")} == set(seen)
    pooled.close()
