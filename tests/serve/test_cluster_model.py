# SPDX-License-Identifier: Apache-2.0
"""What a model of a cluster does about the controller's views; no engine is needed for that."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.cluster.values import ModelView
from tokenpool.policy.capacity import Role

pytestmark = pytest.mark.vllm


def test_roles_of_hosts_reach_the_client() -> None:
    """By host and life, so that a host's new process has the role; a host without one does everything."""
    from tokenpool.serve.cluster_model import ClusterModel
    from tokenpool.serve.engine_client import PoolEngineClient

    async def test() -> None:
        nothing: Any = SimpleNamespace()
        model = ClusterModel(nothing, 1, nothing, nothing, lambda _: None)
        model._core = core = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()))  # type: ignore[arg-type]
        try:
            model.apply(ModelView(1, {}), {"h0": "x", "h1": "y"}, {"h0": Role.PREFILL, "h1": Role.DECODE})
            assert core.roles == {"h0/x": Role.PREFILL, "h1/y": Role.DECODE}
            model.apply(ModelView(1, {}), {"h0": "z", "h1": "y"}, {"h0": Role.PREFILL})
            assert core.roles == {"h0/z": Role.PREFILL}
        finally:
            core.close()

    asyncio.run(test())
