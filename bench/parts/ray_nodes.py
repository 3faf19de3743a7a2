# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of several nodes on this machine, in a child process with settings of its own.

    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes:
        ...                      # nodes.address
        nodes.kill(0)            # SIGKILL of a node's raylet
        nodes.add()              # a new node, the last of nodes.raylets

The child matters: Ray reads its authentication mode when it is imported, which vLLM may have done in a test process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
ENV = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """Nodes without a dashboard; the head has no CPUs, so hosts are on the others only."""

    def __init__(self, *, num_nodes: int, cpus_per_node: int) -> None:
        self._arguments = [str(num_nodes), str(cpus_per_node)]
        self.address = ""
        self.raylets: list[int] = []
        """Process id of each node's raylet, the head's aside."""

    def __enter__(self) -> RayNodes:
        self._folder = tempfile.mkdtemp(prefix="tp-ray-", dir="/tmp")  # short: it holds Unix sockets
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.parts.ray_nodes", self._folder, *self._arguments],
            cwd=Path(__file__).parents[2], env={**os.environ, **ENV}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            told = self._hear()
        except BaseException:
            self.__exit__()
            raise
        self.address, self.raylets = told["address"], told["raylets"]
        return self

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        if line is None:
            raise AssertionError("the Ray nodes do not start")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the child ends the nodes
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self, index: int) -> None:
        """End a node as if its machine had lost power, as far as Ray can tell."""
        os.kill(self.raylets[index], signal.SIGKILL)

    def add(self) -> None:
        """Start one more node, alike the others."""
        assert self._process.stdin is not None
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self.raylets.append(self._hear()["raylet"])


def _main(folder: str, num_nodes: int, cpus_per_node: int) -> None:
    from ray.cluster_utils import Cluster

    # Ray writes the address of its cluster there, and makes the folder only where it is the session's own.
    os.makedirs(os.path.join(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray"), exist_ok=True)
    common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 << 20}
    head = {**common, "num_cpus": 0, "_system_config": _SYSTEM_CONFIG, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=cpus_per_node, **common) for _ in range(num_nodes)]

    def raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    print(json.dumps({"address": cluster.address, "raylets": [raylet(node) for node in nodes]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"raylet": raylet(cluster.add_node(num_cpus=cpus_per_node, **common))}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
